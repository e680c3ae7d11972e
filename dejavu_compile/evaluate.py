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
    name the same next token.
    """

    tokens: int
    perplexity_dense: float
    perplexity_sparse: float
    kl: float
    top1_agreement: float

    @property
    def perplexity_increase(self) -> float:
        """Relative: 0.01 is one per cent."""
        return self.perplexity_sparse / self.perplexity_dense - 1

    def to_dict(self) -> dict[str, float]:
        """For JSON."""
        return {**asdict(self), "perplexity_increase": self.perplexity_increase}

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


class Tally:
    """Adds up what an `Evaluation` is made of, batch by batch."""

    def __init__(self) -> None:
        self._totals = torch.zeros(4, dtype=torch.float64)
        self._tokens = 0

    def add(self, dense: torch.Tensor, other: torch.Tensor, target: torch.Tensor) -> None:
        """Log probabilities [tokens, vocabulary] of both, and the tokens that came."""
        self._totals += torch.stack(
            [
                F.nll_loss(dense, target, reduction="sum"),
                F.nll_loss(other, target, reduction="sum"),
                F.kl_div(other, dense, reduction="sum", log_target=True),
                (dense.argmax(-1) == other.argmax(-1)).sum(),
            ]
        ).double().cpu()  # fmt: skip
        self._tokens += target.numel()

    def result(self) -> Evaluation:
        """Of all that was added."""
        nll_dense, nll_sparse, kl, agreeing = (self._totals / max(self._tokens, 1)).tolist()
        return Evaluation(self._tokens, math.exp(nll_dense), math.exp(nll_sparse), kl, agreeing)


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
            tally.add(dense, log_probabilities(sparse(**kwargs), keep), target)
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
