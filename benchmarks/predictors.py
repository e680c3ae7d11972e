"""Predictors of MLP units at equal bytes: what they learn from, how they start, how they are rounded, what they read.

    python benchmarks/predictors.py --model demo/models/opt-python-8m --seeds 3

Each variant differs from the library's default in what its row says, and in nothing else. All are fitted on the same
tokens, the first three quarters of demo/text/calibration.txt; thresholds are set on the last quarter, in the running
model, and variants are chosen by their divergence there ("choice"). demo/text/heldout.txt is only reported on.
Selections are applied by module hooks on the eager model, outside of our graph, token by token; layer 0 runs dense.
The variants of the least divergence, and the default, are fitted with all seeds; the others with the first.

recall: share of the contributions' sum that runs, and of the units that pass `contribution_cutoff`. density: of what
ran on the held-out text. Prints one table last and writes JSON.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import stack_module_state, vjp, vmap
from transformers import AutoModelForCausalLM, AutoTokenizer

from dejavu_compile.batches import check_batches
from dejavu_compile.bench import environment, mlps, write
from dejavu_compile.collect import Recording, collect
from dejavu_compile.evaluate import Evaluation, Tally, log_probabilities, predicted
from dejavu_compile.passes.site import SiteKind
from dejavu_compile.predictors import (
    QUIET,
    SiteExamples,
    contribution_cutoff,
    fit_predictors,
    rank_for_budget,
    threshold_for_density,
)
from dejavu_compile.text import windows

ROOT = Path(__file__).parents[1]
DENSITIES = {"relu": (0.1, 0.2, 0.3), "silu": (0.3, 0.4, 0.5)}
BUDGET = 0.05
BATCH_TOKENS = 512
UNROUNDED = 32
CONTENDERS = 2
GRADIENT_WINDOWS = 48


@dataclass(frozen=True, slots=True)
class Variant:
    """What differs from the library's default. `bits` 32 is not rounded, at the rank of 8; 16 is bf16."""

    name: str
    bits: int = 8
    label: str = "contribution"  # energy: its square; active: 0 or 1; log
    norm: str = (
        "column"  # fisher: of the column in the metric of the loss, in one unit for all layers
    )
    start: str = "random"  # svd: of the projection into the units; regression: of reduced rank
    between: str = "nothing"  # relu
    ahead: int = 1
    steps: int = 500
    aware: bool = False  # of rounding, while it is fitted
    ranks: str = "equal"  # uneven: where a rank lowers the loss most
    threshold: str = "shared"  # layer: one each; token: the same number of units for each token
    quiet: float = (
        QUIET  # source channels that deviate less, as a share of the median, are ignored
    )
    refill: bool = False  # skipped units count as their mean where they are skipped

    @property
    def comparable(self) -> bool:
        """Of the default's bytes, from a source that is there in time."""
        return self.bits != UNROUNDED and self.ahead >= 1


VARIANTS = (
    Variant("default"),
    Variant("not rounded", bits=UNROUNDED),
    Variant("quiet channels", quiet=1e-6),
    Variant("quiet channels, not rounded", quiet=1e-6, bits=UNROUNDED),
    Variant("bf16", bits=16),
    Variant("int4", bits=4),
    Variant("int8, aware", aware=True),
    Variant("0/1 labels", label="active"),
    Variant("0/1 labels, bf16", label="active", bits=16),
    Variant("log contribution", label="log"),
    Variant("squared contribution", label="energy"),
    Variant("fisher norm", norm="fisher"),
    Variant("relu between", between="relu"),
    Variant("svd start", start="svd"),
    Variant("regression start", start="regression"),
    Variant("same layer's input", ahead=0),
    Variant("two layers ahead", ahead=2),
    Variant("uneven ranks", ranks="uneven"),
    Variant("1000 steps", steps=1000),
    Variant("threshold of each layer", threshold="layer"),
    Variant("units of each token", threshold="token"),
    Variant("mean of what is skipped", refill=True),
)

BETWEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda x: x,
    "relu": F.relu,
}


def rounded(matrix: Tensor, bits: int) -> Tensor:
    """Symmetric, one scale a row, as the library's int8; the gradient passes as if nothing were rounded."""
    if bits == UNROUNDED:
        return matrix
    if bits == 16:
        return matrix.bfloat16().float()
    most = 2 ** (bits - 1) - 1
    scale = (matrix.detach().abs().amax(dim=1, keepdim=True) / most).clamp(min=1e-12)
    return matrix + ((matrix / scale).round() * scale - matrix).detach()


def rounded_pair(down: Tensor, up: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Both matrices; the scale of a row of `down` moves into a column of `up` first, as in the library."""
    if bits >= 16:
        return rounded(down, bits), rounded(up, bits)
    scale = down.detach().abs().amax(dim=1).clamp(min=1e-12)
    return rounded(down, bits), rounded(up * scale, bits) / scale


@dataclass(frozen=True, slots=True, eq=False)
class Scorer:
    """score = up @ between(down @ source + middle) + bias."""

    down: Tensor
    up: Tensor
    bias: Tensor
    middle: Tensor | None = None
    between: str = "nothing"

    def __call__(self, source: Tensor) -> Tensor:
        """Scores [tokens, units]."""
        inner = F.linear(source, self.down, self.middle)
        return F.linear(BETWEEN[self.between](inner), self.up, self.bias)

    def rounded(self, bits: int) -> "Scorer":
        """As it would be stored."""
        down, up = rounded_pair(self.down, self.up, bits)
        return replace(self, down=down, up=up)

    def num_bytes(self, bits: int) -> int:
        """What one evaluation reads, biases in fp32."""
        weights = self.down.numel() + self.up.numel()
        biases = self.bias.numel() + (0 if self.middle is None else self.middle.numel())
        return weights * bits // 8 + biases * 4


@dataclass(slots=True)
class Text:
    """Windows of tokens, and what the dense model predicts there."""

    batches: list[dict[str, Tensor]]
    dense: list[Tensor]

    @classmethod
    def of(cls, model: nn.Module, rows: Tensor) -> "Text":
        """Rows [windows, length]."""
        batches = [{"input_ids": batch} for batch in rows.split(4)]
        with torch.no_grad():
            dense = [
                log_probabilities(model(**b, use_cache=False), predicted(b)[0]) for b in batches
            ]
        return cls(batches, dense)


@dataclass(slots=True)
class Study:
    """A model, its recorded tokens, and the two texts that it is run on."""

    model: nn.Module
    recordings: list[Recording]
    choice_recordings: list[Recording]
    choice: Text
    held_out: Text
    column: list[Tensor]
    cutoffs: list[float]
    fisher: list[Tensor]
    fisher_cutoff: float
    fits: dict[tuple, list[Scorer]] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The default's, int8."""
        units, width = self.recordings[0].site.units, self.recordings[0].source[0].shape[1]
        bf16_bytes = self.recordings[0].site.bytes_dense // 2
        return rank_for_budget(bf16_bytes, width, units, 1, BUDGET)

    def source_of(self, layer: int, variant: Variant) -> int:
        """The layer that the predictor reads the input of; the first has none before it."""
        return max(layer - variant.ahead, 0)

    def examples(self, layer: int, variant: Variant, choice: bool = False) -> SiteExamples:
        """What the variant's predictor learns at this layer, in the library's terms."""
        recordings = self.choice_recordings if choice else self.recordings
        source = recordings[self.source_of(layer, variant)].stacked("source")
        hidden = recordings[layer].stacked("hidden")
        norm = (self.fisher if variant.norm == "fisher" else self.column)[layer]
        cutoff = self.fisher_cutoff if variant.norm == "fisher" else self.cutoffs[layer]
        if variant.label == "energy":
            squared = (hidden.float() * norm / cutoff).square().bfloat16()
            return SiteExamples(source, squared, torch.ones_like(norm), 1.0)
        return SiteExamples(source, hidden, norm, cutoff)


def columns(model: nn.Module) -> list[Tensor]:
    """The output projection of each layer, [output width, units]."""
    return [part.out.detach().float() for part in mlps(model)]


def gradient_covariance(model: nn.Module, rows: Tensor, seed: int) -> list[Tensor]:
    """E[g g'] of the gradient g of log p by each MLP's output; next tokens drawn from the prediction."""
    outputs = {id(m.weight): m for m in model.modules() if isinstance(m, nn.Linear)}
    parts, opened = mlps(model), {}
    moments: list[Tensor | float] = [0.0] * len(parts)

    def open_at(layer: int) -> Callable[..., Tensor]:
        def shifted(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            opened[layer] = torch.zeros_like(output, requires_grad=True)
            return output + opened[layer]

        return shifted

    handles = [
        outputs[id(part.out)].register_forward_hook(open_at(i)) for i, part in enumerate(parts)
    ]
    generator = torch.Generator().manual_seed(seed)
    for batch in rows.split(4):
        logits = model(input_ids=batch, use_cache=False).logits.log_softmax(-1).flatten(0, 1)
        drawn = torch.multinomial(logits.detach().exp(), 1, generator=generator)
        gradients = torch.autograd.grad(logits.gather(1, drawn).sum(), [*opened.values()])
        for layer, gradient in zip(opened, gradients, strict=True):
            g = gradient.flatten(0, -2)
            moments[layer] += g.T @ g / rows.numel()
    for handle in handles:
        handle.remove()
    return moments


def prepare(path: Path, seed: int, fit_windows: int, choice: int, held_out: int) -> Study:
    """Everything that the variants share: recorded once, kept in memory."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model.requires_grad_(False)
    rows = torch.cat(windows(tokenizer, ROOT / "demo/text/calibration.txt"))
    cut = len(rows) * 3 // 4
    learn, rest = _spread(rows[:cut], fit_windows), _spread(rows[cut:], choice)
    test = torch.cat(windows(tokenizer, ROOT / "demo/text/heldout.txt", limit=held_out))
    recorded = [
        collect(
            model, check_batches(model, part.split(4)), max_tokens=10**9,
            progress=lambda *_: None, kinds=(SiteKind.MLP,),
        )
        for part in (learn, rest)
    ]  # fmt: skip
    weights = columns(model)
    moments = gradient_covariance(model, _spread(learn, GRADIENT_WINDOWS), seed)
    fisher = [
        ((w.T @ g) * w.T).sum(1).clamp(min=0).sqrt() for w, g in zip(weights, moments, strict=True)
    ]
    pooled = torch.cat(
        [
            r.stacked("hidden")[::16].float().abs() * f
            for r, f in zip(recorded[0], fisher, strict=True)
        ]
    )
    cutoff = contribution_cutoff(SiteExamples(pooled, pooled, torch.ones(pooled.shape[1])))
    column = [w.norm(dim=0) for w in weights]
    cutoffs = [
        contribution_cutoff(SiteExamples(r.stacked("source"), r.stacked("hidden"), norm))
        for r, norm in zip(recorded[0], column, strict=True)
    ]
    return Study(
        model, *recorded, Text.of(model, rest), Text.of(model, test), column, cutoffs, fisher, cutoff
    )  # fmt: skip


def _spread(rows: Tensor, count: int) -> Tensor:
    return rows[torch.linspace(0, len(rows) - 1, min(count, len(rows))).long()]


class _Start(nn.Module):
    """The parameters that a site's scorer begins with, of the source standardised by `mean` and `scale`."""

    def __init__(
        self, site: SiteExamples, study: Study, layer: int, rank: int, variant: Variant, seed: int
    ) -> None:
        super().__init__()
        sample = site.source[::8]
        mean, scale = sample.mean(0), sample.std(0)
        scale = torch.where(scale > variant.quiet * scale.median(), scale, torch.inf)
        target = labels(site, slice(None, None, 8), variant.label)
        down = torch.randn(rank, site.source_width, generator=torch.Generator().manual_seed(seed))
        down, up = down / math.sqrt(site.source_width), torch.zeros(site.units, rank)
        if variant.start == "svd":
            into = mlps(study.model)[layer].into[0].detach().float()
            into = into * scale.nan_to_num(posinf=0.0)
            u, s, v = torch.linalg.svd(into, full_matrices=False)
            down, up = v[:rank], u[:, :rank] * s[:rank]
            up = up / ((sample - mean) / scale @ down.T @ up.T).std()
        elif variant.start == "regression":
            down, up = reduced_rank((sample - mean) / scale, target.log1p(), rank)
        first = target.mean(0)
        bias = {
            "active": first.clamp(1e-3, 1 - 1e-3).logit(), "log": first,
        }.get(variant.label, first.clamp(min=1e-4).log())  # fmt: skip
        self.down, self.up, self.bias = (nn.Parameter(t.clone()) for t in (down, up, bias))
        if variant.between != "nothing":
            self.middle = nn.Parameter(torch.zeros(rank))
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)


def reduced_rank(x: Tensor, y: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(down, up) of the best linear prediction of y from x that has this rank; inner values have variance one."""
    covariance = x.T @ x / len(x) + 1e-3 * torch.eye(x.shape[1])
    root = torch.linalg.cholesky(covariance)
    whitened = torch.linalg.solve_triangular(root, x.T @ (y - y.mean(0)) / len(x), upper=False)
    u, s, v = torch.linalg.svd(whitened, full_matrices=False)
    down = torch.linalg.solve_triangular(root.T, u[:, :rank], upper=True).T
    return down, v[:rank].T * s[:rank]


def labels(site: SiteExamples, rows: Tensor | slice, label: str) -> Tensor:
    """What the scores of these tokens are fitted to, [tokens, units]."""
    weight = site.hidden[rows].abs() * (site.column_norm / site.cutoff)
    if label == "active":
        return (weight > 1).float()
    return (weight + 0.05).log() if label == "log" else weight


def slope(score: Tensor, target: Tensor, label: str) -> Tensor:
    """The derivative of the loss by the scores."""
    if label == "log":
        return score - target
    runs = score.sigmoid()
    if label == "active":  # as the paper: skipped units weigh the share of those that run
        share = target.mean() + 0.005
        return (runs - target) * (target * (1 - share) + share)
    return runs.addcmul_(runs, target).sub_(target)


def descend(
    study: Study, layers: Sequence[int], rank: int, variant: Variant, seed: int
) -> list[Scorer]:
    """As the library's `fit_predictors`, with what it doesn't have."""
    sites = [study.examples(layer, variant) for layer in layers]
    starts = [
        _Start(site, study, layer, rank, variant, seed)
        for site, layer in zip(sites, layers, strict=True)
    ]
    params, moments = stack_module_state(starts)
    params = {name: value.detach() for name, value in params.items()}
    rates = {"down": 8 / sites[0].source_width, "up": 0.5 / rank, "bias": 0.03, "middle": 0.03}
    optimizer = torch.optim.Adam([{"params": [params[k]], "lr": rates[k]} for k in params])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, variant.steps)
    generator = torch.Generator().manual_seed(seed)

    def score(p: dict[str, Tensor], source: Tensor, scale: Tensor) -> Tensor:
        down, up = p["down"], p["up"]
        if variant.aware:
            down, up = rounded_pair(down / scale, up, variant.bits)
            down = down * scale.nan_to_num(posinf=0.0)
        return Scorer(down, up, p["bias"], p.get("middle"), variant.between)(source)

    for _ in range(variant.steps):
        rows = torch.randint(sites[0].tokens, (BATCH_TOKENS,), generator=generator)
        source = torch.stack([site.source[rows] for site in sites])
        source = (source - moments["mean"][:, None]) / moments["scale"][:, None]
        target = torch.stack([labels(site, rows, variant.label) for site in sites])
        scores, pull_back = vjp(lambda p, x=source: vmap(score)(p, x, moments["scale"]), params)
        (gradients,) = pull_back(slope(scores, target, variant.label))
        for name, gradient in gradients.items():
            params[name].grad = gradient / BATCH_TOKENS
        optimizer.step()
        schedule.step()
    return [
        _folded({k: v[i] for k, v in params.items()}, start, variant)
        for i, start in enumerate(starts)
    ]


def _folded(p: dict[str, Tensor], start: _Start, variant: Variant) -> Scorer:
    """The standardisation moved into the weights."""
    down, up = p["down"] / start.scale, p["up"]
    if variant.aware:  # the bias was fitted to the rounded ones
        down, up = rounded_pair(down, up, variant.bits)
    if "middle" in p:
        return Scorer(down, up, p["bias"], p["middle"] - down @ start.mean, variant.between)
    return Scorer(down, up, p["bias"] - up @ (down @ start.mean))


def fit(
    study: Study, variant: Variant, seed: int, ranks: Sequence[int] | int | None = None
) -> list[Scorer]:
    """A scorer for each layer but the first, not rounded yet; by the library where it can."""
    layers = range(1, len(study.recordings))
    if ranks is None:
        ranks = study.rank if variant.bits == UNROUNDED else study.rank * 8 // variant.bits
        ranks = uneven_ranks(study, seed) if variant.ranks == "uneven" else ranks
    ranks = [ranks] * len(layers) if isinstance(ranks, int) else ranks
    aware = variant.bits if variant.aware else None
    key = (
        variant.label, variant.norm, variant.start, variant.between, variant.ahead, variant.steps,
        variant.quiet, aware, tuple(ranks), seed,
    )  # fmt: skip
    if key not in study.fits:
        ours = variant.label in ("contribution", "energy") and variant.start == "random"
        ours = ours and variant.between == "nothing" and variant.quiet == QUIET
        if ours and not variant.aware:
            fitted = fit_predictors(
                [study.examples(layer, variant) for layer in layers],
                ranks,
                seed=seed,
                steps=variant.steps,
            )
            study.fits[key] = [Scorer(p.down, p.up, p.bias) for p in fitted]
        else:
            study.fits[key] = descend(study, layers, ranks[0], variant, seed)
    return study.fits[key]


def uneven_ranks(study: Study, seed: int, step: int = 16) -> list[int]:
    """The same sum of ranks, given where the loss on the choice text falls most. By truncating predictors of twice the rank."""
    default, most = Variant("default"), 2 * study.rank
    wide = fit(study, replace(default, bits=4), seed, ranks=most)
    losses = []
    for layer, scorer in enumerate(wide, start=1):
        site = study.examples(layer, default, choice=True)
        target = labels(site, slice(None), "contribution")
        spread = study.examples(layer, default).source[::8].std(0).clamp(min=1e-6)
        u, s, v = torch.linalg.svd(scorer.up @ (scorer.down * spread), full_matrices=False)
        losses.append({})
        for rank in range(step, most + 1, step):
            cut = Scorer(v[:rank] / spread, u[:, :rank] * s[:rank], scorer.bias)
            shift = (scorer.up @ scorer.down - cut.up @ cut.down) @ site.source.mean(0)
            score = replace(cut, bias=scorer.bias + shift)(site.source)
            losses[-1][rank] = ((1 + target) * F.softplus(score) - target * score).sum().item()
    ranks = [step] * len(wide)
    for _ in range((study.rank - step) * len(wide) // step):
        gains = [
            loss[rank] - loss.get(rank + step, math.inf)
            for loss, rank in zip(losses, ranks, strict=True)
        ]
        ranks[max(range(len(ranks)), key=gains.__getitem__)] += step
    return ranks


@dataclass(slots=True)
class Counts:
    """What ran, over all layers but the first."""

    ran: float = 0.0
    units: float = 0.0
    kept: float = 0.0
    contribution: float = 0.0
    found: float = 0.0
    active: float = 0.0


Selection = Callable[[int, Tensor], Tensor]


@contextmanager
def masked(
    study: Study, variant: Variant, select: Selection, refill: list[Tensor] | None, counts: Counts
) -> Iterator[None]:
    """The eager model with each token's selection applied, by hooks: `select(layer, source)` says what runs."""
    modules = {id(m.weight): m for m in study.model.modules() if isinstance(m, nn.Linear)}
    sources: dict[int, Tensor] = {}

    def remember(layer: int) -> Callable[..., None]:
        return lambda module, args: sources.__setitem__(layer, args[0].flatten(0, -2))

    def keep(layer: int) -> Callable[..., tuple]:
        norm = study.column[layer]
        cutoff = study.cutoffs[layer]

        def masking(module: nn.Module, args: tuple) -> tuple:
            hidden = args[0].flatten(0, -2)
            runs = select(layer, sources[study.source_of(layer, variant)])
            contribution = hidden.abs() * norm
            active = contribution > cutoff
            counts.ran += runs.sum().item()
            counts.units += runs.numel()
            counts.kept += (contribution * runs).sum().item()
            counts.contribution += contribution.sum().item()
            counts.found += (active & runs).sum().item()
            counts.active += active.sum().item()
            other = 0.0 if refill is None else refill[layer - 1]
            return (torch.where(runs, hidden, other).view_as(args[0]),)

        return masking

    handles = []
    for layer, part in enumerate(mlps(study.model)):
        handles.append(modules[id(part.into[0])].register_forward_pre_hook(remember(layer)))
        if layer:
            handles.append(modules[id(part.out)].register_forward_pre_hook(keep(layer)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run_text(
    study: Study, text: Text, variant: Variant, select: Selection, refill: list[Tensor] | None
) -> tuple[Evaluation, Counts]:
    """The masked model against dense."""
    tally, counts = Tally(), Counts()
    with torch.no_grad(), masked(study, variant, select, refill, counts):
        for batch, dense in zip(text.batches, text.dense, strict=True):
            keep, target = predicted(batch)
            output = study.model(**batch, use_cache=False)
            tally.add(dense, log_probabilities(output, keep), target)
    return tally.result(), counts


def selection(
    scorers: list[Scorer], variant: Variant, thresholds: list[float], density: float
) -> Selection:
    """Units above the threshold, or the same number for each token."""

    def select(layer: int, source: Tensor) -> Tensor:
        score = scorers[layer - 1](source)
        if variant.threshold == "token":
            kept = score.topk(round(density * score.shape[-1]), dim=-1).indices
            return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, kept, True)
        return score > thresholds[layer - 1]

    return select


def thresholds_of(scores: list[Tensor], variant: Variant, density: float) -> list[float]:
    """Of every layer: one for all, or one each."""
    if variant.threshold == "layer":
        return [threshold_for_density(score, density) for score in scores]
    return [threshold_for_density(torch.cat(scores), density)] * len(scores)


def on_choice_text(
    study: Study, scorers: list[Scorer], variant: Variant, thresholds: list[float], density: float,
    refill: list[Tensor] | None,
) -> tuple[Evaluation, Counts, list[float]]:  # fmt: skip
    """Quality there, and the thresholds of this density where predictors read what the masked model gives."""
    seen: list[list[Tensor]] = [[] for _ in scorers]
    select = selection(scorers, variant, thresholds, density)

    def watched(layer: int, source: Tensor) -> Tensor:
        seen[layer - 1].append(scorers[layer - 1](source)[::4])
        return select(layer, source)

    quality, counts = run_text(study, study.choice, variant, watched, refill)
    return quality, counts, thresholds_of([torch.cat(s) for s in seen], variant, density)


def skipped_means(
    study: Study, scorers: list[Scorer], variant: Variant, thresholds: list[float]
) -> list[Tensor]:
    """What each unit is on average where it is skipped, on the choice text."""
    means = []
    for layer, scorer in enumerate(scorers, start=1):
        site = study.examples(layer, variant, choice=True)
        skipped = scorer(site.source) <= thresholds[layer - 1]
        means.append((site.hidden.float() * skipped).sum(0) / skipped.sum(0).clamp(min=1))
    return means


def measure(study: Study, variant: Variant, seed: int) -> dict[str, Any]:
    """Fit one variant and run it at every density."""
    begin = time.perf_counter()
    scorers = fit(study, variant, seed)
    fit_s, rows = time.perf_counter() - begin, []
    scorers = [scorer.rounded(variant.bits) for scorer in scorers]
    dense_scores = [
        scorer(study.examples(layer, variant, choice=True).source)
        for layer, scorer in enumerate(scorers, start=1)
    ]
    activation = study.model.config.to_dict().get("hidden_act", "relu")
    for density in DENSITIES[activation]:
        thresholds = thresholds_of(dense_scores, variant, density)
        refill = skipped_means(study, scorers, variant, thresholds) if variant.refill else None
        choice, ran, thresholds = on_choice_text(
            study, scorers, variant, thresholds, density, refill
        )
        select = selection(scorers, variant, thresholds, density)
        held_out, counts = run_text(study, study.held_out, variant, select, refill)
        rows.append(
            {
                "density": density, "measured_density": counts.ran / counts.units,
                "recall_contribution": counts.kept / counts.contribution,
                "recall_active": counts.found / counts.active,
                "choice_density": ran.ran / ran.units, "choice_kl": choice.kl, **held_out.to_dict(),
            }
        )  # fmt: skip
    dense_bytes = sum(r.site.bytes_dense // 2 for r in study.recordings[1:])
    predictor_bytes = sum(scorer.num_bytes(variant.bits) for scorer in scorers)
    return {
        **asdict(variant), "seed": seed, "fit_s": fit_s, "bytes": predictor_bytes,
        "share_of_bytes": predictor_bytes / dense_bytes,
        "rank_of_layer": [scorer.down.shape[0] for scorer in scorers],
        "choice": at_densities(rows, "choice_density", "choice_kl"),
        "held_out": at_densities(rows, "measured_density", "kl"),
        "rows": rows,
    }  # fmt: skip


def at_densities(rows: list[dict[str, float]], ran: str, kl: str) -> float:
    """Divergence at the densities asked, which differ a little from those that ran: log-linear; geometric mean."""
    points, total = [(row[ran], math.log(row[kl])) for row in rows], 0.0
    for row in rows:
        right = next((i for i in range(1, len(points)) if points[i][0] >= row["density"]), -1)
        (x0, y0), (x1, y1) = points[right - 1], points[right]
        total += y0 + (y1 - y0) * (row["density"] - x0) / (x1 - x0)
    return math.exp(total / len(rows))


def table(results: list[dict[str, Any]]) -> str:
    """One row a variant, best choice first: means over seeds, ± half of the range over them."""
    names = list(dict.fromkeys(r["name"] for r in results))
    runs = {name: [r for r in results if r["name"] == name] for name in names}

    def shown(values: list[float], form: str) -> str:
        unit = 100 if form.endswith("%") else 1
        half = f"{(max(values) - min(values)) / 2 * unit:{form.strip('+%f')}f}"
        spread = f" ± {half}" if len(values) > 1 else ""
        return f"{statistics.fmean(values):{form}}{spread}"

    densities = [row["density"] for row in results[0]["rows"]]
    head = ["variant", "seeds", "bytes", "KL, choice", "KL, held out"]
    for density in densities:
        head += [f"perplexity at {density:.0%}", "ran", "top-1"]
    head += [f"recall at {densities[0]:.0%}: norm", "active"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in sorted(names, key=lambda n: statistics.fmean(r["choice"] for r in runs[n])):
        of = runs[name]
        cells = [name, str(len(of)), f"{of[0]['share_of_bytes']:.1%}"]
        cells += [shown([r[key] for r in of], ".4f") for key in ("choice", "held_out")]

        def over_seeds(i: int, key: str, form: str, of: list = of) -> str:
            return shown([r["rows"][i][key] for r in of], form)

        for i in range(len(densities)):
            cells.append(over_seeds(i, "perplexity_increase", "+.2%"))
            cells.append(over_seeds(i, "measured_density", ".1%"))
            cells.append(over_seeds(i, "top1_agreement", ".2%"))
        cells += [over_seeds(0, f"recall_{what}", ".1%") for what in ("contribution", "active")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, run, write JSON after every variant."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "demo/models/opt-python-8m")
    parser.add_argument("--only", nargs="*", help="names of variants; all by default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=192, help="of 512 tokens, to fit on")
    parser.add_argument("--choice-windows", type=int, default=8)
    parser.add_argument("--held-out-windows", type=int, default=12)
    parser.add_argument(
        "--out", type=Path, help="default: predictors-MODEL.json among the results"
    )
    parser.add_argument("--resume", action="store_true", help="keep what --out holds already")
    parser.add_argument("--table", type=Path, help="a JSON: print its table, run nothing")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.table.read_text(encoding="utf-8"))["variants"]))
        return
    out = args.out or ROOT / f"benchmarks/results/predictors-{args.model.name}.json"
    print(environment(), flush=True)
    study = prepare(args.model, 0, args.windows, args.choice_windows, args.held_out_windows)
    sizes = [args.windows, args.choice_windows, args.held_out_windows]
    results: list[dict[str, Any]] = []
    if args.resume and out.exists():
        before = json.loads(out.read_text(encoding="utf-8"))
        results = before["variants"] if before["windows"] == sizes else []

    def add(variant: Variant, seed: int) -> None:
        if any((r["name"], r["seed"]) == (variant.name, seed) for r in results):
            return
        result = measure(study, variant, seed)
        results.append(result)
        write(out, {"model": args.model.name, "windows": sizes, "variants": results})
        increases = ", ".join(f"{row['perplexity_increase']:+.2%}" for row in result["rows"])
        print(
            f"{variant.name:<28} seed {seed}: KL {result['choice']:.5f} (held out "
            f"{result['held_out']:.5f}), perplexity {increases}, fitted in {result['fit_s']:.0f} s",
            flush=True,
        )

    chosen = [v for v in VARIANTS if not args.only or v.name in args.only]
    for variant in chosen:
        add(variant, 0)
    comparable = {v.name for v in chosen if v.comparable}
    by_choice = sorted((r for r in results if r["name"] in comparable), key=lambda r: r["choice"])
    repeated = {"default", *(r["name"] for r in by_choice[:CONTENDERS])}
    for seed in range(1, args.seeds):
        study.fits.clear()
        for variant in (v for v in chosen if v.name in repeated):
            add(variant, seed)
    print(table(results))


if __name__ == "__main__":
    main()
