"""Quality of the sparse model against dense, on the graph that runs fast."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .backend import dejavu_eager
from .batches import Batch, call_kwargs, check_batches, check_model, counted, logits_of


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Next-token quality over `tokens` predicted tokens.

    `kl` is the mean of KL(dense || sparse) in nats, `top1_agreement` the share of tokens for which both
    name the same next token. `margin`: so much more than the mean that was measured may the increase of the log loss
    be on other text like this, at 95 % confidence; 0 where a single sequence doesn't tell.
    """

    tokens: int
    perplexity_dense: float
    perplexity_sparse: float
    kl: float
    top1_agreement: float
    margin: float = 0.0

    @property
    def perplexity_increase(self) -> float:
        """Relative: 0.01 is one per cent."""
        return self.perplexity_sparse / self.perplexity_dense - 1

    @property
    def perplexity_increase_at_most(self) -> float:
        """With 95 % confidence, on other text like the one that was measured."""
        return (1 + self.perplexity_increase) * math.exp(self.margin) - 1

    def to_dict(self) -> dict[str, float]:
        """For JSON."""
        return {
            **asdict(self),
            "perplexity_increase": self.perplexity_increase,
            "perplexity_increase_at_most": self.perplexity_increase_at_most,
        }

    def __str__(self) -> str:
        return (
            f"perplexity {self.perplexity_dense:.4f} dense, {self.perplexity_sparse:.4f} sparse "
            f"({self.perplexity_increase:+.2%}); top-1 agreement {self.top1_agreement:.2%}; "
            f"KL {self.kl:.5f} nats; {self.tokens} tokens"
        )


def masked(model: nn.Module) -> Any:
    """The model's forward with every token's selection applied, prefill too, without Inductor."""
    return torch.compile(
        model.forward, backend=dejavu_eager, options={"dejavu.execution": "masked"}
    )


def margin_of(increases: torch.Tensor, tokens: torch.Tensor) -> float:
    """How far the mean increase of a token's log loss may be off, upwards, at 95 % confidence.

    increases: of the log loss, summed over each sequence; tokens: of each sequence; both [sequences], in reading order.
    With d = increases - mean * tokens over n sequences, the margin is the greater of two,

        t(n - 1) * sqrt(n / (n - 1) * sum(d^2)) / sum(tokens)
        t(k) * sqrt(mean over j = 1 .. k of (sqrt(2) * sum(d * cos(pi * j * (i - 1/2) / n)))^2) / sum(tokens)

    with t(f) the 95 % quantile of Student's distribution with f degrees of freedom and i = 1 .. n. The first is right
    where sequences are independent (Cochran 1977, section 6.3: the standard error of a ratio). Neighbours of one document
    aren't: they lose alike, which slow waves through the text show and single sequences don't; k = 0.4 n^(2/3).
    (Lazarus, Lewis, Stock and Watson 2018, "HAR inference": equal-weighted cosines, with their rule for k)
    """
    n = len(tokens)
    if n < 2:
        return 0.0
    increases, tokens = increases.double(), tokens.double()
    residuals = increases - increases.sum() / tokens.sum() * tokens
    independent = _student(n - 1) * (n / (n - 1) * residuals.square().sum()).sqrt()
    count = min(n - 1, max(2, round(0.4 * n ** (2 / 3))))
    place = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    waves = torch.cos(math.pi * torch.arange(1, count + 1)[:, None] * place)
    correlated = _student(count) * (2 * (waves @ residuals).square().mean()).sqrt()
    return (torch.maximum(independent, correlated) / tokens.sum()).item()


def _student(freedom: int) -> float:
    """The 95 % quantile: from 3 on an expansion around the normal distribution's, 0.3 % off there."""
    if freedom <= 2:
        return (math.tan(0.45 * math.pi), 0.9 / math.sqrt(0.095))[freedom - 1]
    z = 1.6448536269514722
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )


class Tally:
    """Adds up what an `Evaluation` is made of, batch by batch."""

    def __init__(self) -> None:
        self._totals = torch.zeros(4, dtype=torch.float64)
        self._tokens = 0
        self._sequences: list[torch.Tensor] = []  # increase of the log loss, and tokens, of each

    def add(
        self, dense: torch.Tensor, other: torch.Tensor, target: torch.Tensor,
        sequence: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """Log probabilities [tokens, vocabulary] of both, the tokens that came, and which sequence each is of."""
        losses = [F.nll_loss(p, target, reduction="none").double() for p in (dense, other)]
        self._totals += torch.stack(
            [
                *(loss.sum() for loss in losses),
                F.kl_div(other, dense, reduction="sum", log_target=True),
                (dense.argmax(-1) == other.argmax(-1)).sum(),
            ]
        ).double().cpu()  # fmt: skip
        self._tokens += target.numel()
        if sequence is not None and target.numel():
            pairs = torch.stack((losses[1] - losses[0], torch.ones_like(losses[0])), dim=1)
            sums = [pairs[sequence == number].sum(0) for number in sequence.unique()]
            self._sequences.append(torch.stack(sums).cpu())

    def result(self) -> Evaluation:
        """Of all that was added."""
        nll_dense, nll_sparse, kl, agreeing = (self._totals / max(self._tokens, 1)).tolist()
        margin = margin_of(*torch.cat(self._sequences).T) if self._sequences else 0.0
        return Evaluation(
            self._tokens, math.exp(nll_dense), math.exp(nll_sparse), kl, agreeing, margin
        )


def predicted(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Which logits [B * (T - 1)] predict a token that counts, and those tokens."""
    keep = counted(batch)
    keep = (keep[:, 1:] & keep[:, :-1]).flatten()
    return keep, batch["input_ids"][:, 1:].flatten()[keep]


def compare(model: nn.Module, batches: list[Batch], sparse: Any) -> Evaluation:
    """Run each batch through `model.forward` and through `sparse`, and compare next-token logits."""
    tally = Tally()
    with torch.no_grad():
        for batch in batches:
            kwargs = call_kwargs(model, batch)
            keep, target = predicted(batch)
            dense = log_probabilities(model.forward(**kwargs), keep)
            rows, width = batch["input_ids"].shape
            sequence = torch.arange(rows, device=keep.device).repeat_interleave(width - 1)[keep]
            tally.add(dense, log_probabilities(sparse(**kwargs), keep), target, sequence)
    return tally.result()


def log_probabilities(output: Any, keep: torch.Tensor) -> torch.Tensor:
    """Of the next token, [tokens, vocabulary] fp32, at the tokens to keep."""
    return F.log_softmax(logits_of(output)[:, :-1].flatten(0, 1)[keep].float(), dim=-1)


def evaluate(
    model: nn.Module, batches: Iterable[torch.Tensor | Mapping[str, torch.Tensor]]
) -> Evaluation:
    """Perplexity, KL and top-1 agreement of the model with what is attached, against itself dense.

    `batches`: `input_ids` [B, T] or dicts of model inputs. Selections are applied token by token in the
    dense shape (masked execution), by the same predictors and thresholds that decode uses.
    Raises ModelStateError (training mode, offloaded) and CalibrationError (unusable batches).
    """
    check_model(model, "evaluate")
    return compare(model, check_batches(model, batches), masked(model))
