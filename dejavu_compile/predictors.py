"""Low-rank predictors of which units of a site matter, fitted from recorded activations.

    score = up @ (down @ source) + bias        a unit runs when score > threshold

`source` is a value at least one layer before the site; `down` [rank, source width] and `up`
[units, rank] are small enough that reading them costs a fixed share of the site's own weights.
A unit's contribution to a token is |hidden| * ||its column of the output projection||; the score
is the logarithm of the contribution to be expected, in units of one that a site can barely miss
(`contribution_cutoff`), so scores of different sites compare. Skipping a large contribution costs
more than skipping a small one, and the loss says so; labels of zero and one don't.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vjp, vmap

from dejavu_compile.kernels import nibbles

from .errors import CalibrationError
from .workdir import Rows

RANK_MULTIPLE = 16
LARGEST_RANK = 1024  # the paper's predictors have 1,000, up to d = 12288
MIN_TOKENS = 256
HELD_OUT = 0.15  # of the recorded tokens: for thresholds and metrics
# fmt: off
DENSITY_GRID = (
    0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9,
)
# fmt: on

# Units whose squared contributions add up to this share of a site's total are not labelled.
ENERGY_LEFT_OUT = 0.01

# Channels of the source that deviate by less than this share of their median are ignored. Two or three of them, in two
# layers of an OPT decoder, raised its divergence once rounded from 0.0082 to 0.0146 nats. (docs/predictors.md)
QUIET = 0.1

_BATCH_TOKENS = 512
_CHUNK_TOKENS = 8192
# More values than this are thinned, evenly over tokens, before they are sorted.
_MAX_SORTED = 1 << 22


def rank_for_budget(
    dense_bytes: int, source_width: int, units: int, bits: int, budget: float = 0.05
) -> int:
    """Largest rank, a multiple of 16, whose two matrices fit `budget` of the dense bytes; 0: none.

    bits: of an element. In four bits the rank is a multiple of 32: rows of whole 16 bytes are read by whole vectors.
    Never above min(source_width, units), past which the low rank saves nothing, nor above LARGEST_RANK.
    """
    bytes_per_rank = (source_width + units) * bits / 8
    # The nudge keeps a rank that fits exactly from being lost to the rounding of `budget`.
    affordable = math.floor(budget * dense_bytes / bytes_per_rank * (1 + 1e-12))
    multiple = RANK_MULTIPLE * 8 // min(bits, 8)
    return min(affordable, source_width, units, LARGEST_RANK) // multiple * multiple


def rank_and_bits(
    dense_bytes: int, source_width: int, units: int, budget: float = 0.05, *, least_bits: int = 4
) -> tuple[int, int]:
    """The largest rank for the budget in int4 or int8, and which: int8 where four bits buy no rank or don't fit.

    Twice the rank for the same bytes is worth far more than the rounding costs (docs/predictors.md); where int8 affords
    the largest rank too, int4 is half of its bytes.
    """
    rank = rank_for_budget(dense_bytes, source_width, units, 8, budget)
    if least_bits <= 4 and source_width % nibbles.MULTIPLE == 0:
        longer = rank_for_budget(dense_bytes, source_width, units, 4, budget)
        if longer > rank or longer == LARGEST_RANK:
            return longer, 4
    return rank, 8


@dataclass(frozen=True, slots=True, eq=False)
class SiteExamples:
    """What one site did on some tokens.

    source [tokens, source width] is what its predictor sees, hidden [tokens, units] the input of
    its output projection, column_norm [units] the norm of each unit's column there. Any float
    dtype, one device; source and hidden may lie on disk. cutoff: the contribution that the site can
    barely miss, where it is known; else `contribution_cutoff`.
    """

    source: Tensor | Rows
    hidden: Tensor | Rows
    column_norm: Tensor
    cutoff: float | None = None

    @property
    def tokens(self) -> int:
        return self.source.shape[0]

    @property
    def source_width(self) -> int:
        return self.source.shape[1]

    @property
    def units(self) -> int:
        return self.hidden.shape[1]

    def split(self, held_out: float = HELD_OUT) -> tuple[SiteExamples, SiteExamples]:
        """The first tokens to fit on; the last `held_out` for thresholds and metrics."""
        cut = self.tokens - round(self.tokens * held_out)
        return self._part(0, cut), self._part(cut, self.tokens)

    def _part(self, start: int, stop: int) -> SiteExamples:
        source, hidden = (
            values.narrow(0, min(start, len(values)), max(min(stop, len(values)) - start, 0))
            for values in (self.source, self.hidden)
        )
        return SiteExamples(source, hidden, self.column_norm, self.cutoff)


@dataclass(frozen=True, slots=True, eq=False)
class Predictor:
    """score = scale * (up @ (down @ source)) + bias.

    down [rank, source width] and up [units, rank] of one dtype, once `quantized` int8 or packed
    (`kernels/nibbles.py`); bias and scale [units] fp32. Once `full_rank`, there is no down, and up is
    [units, source width].
    """

    down: Tensor | None
    up: Tensor
    bias: Tensor
    scale: Tensor

    @property
    def rank(self) -> int:
        return self.up.shape[0] if self.down is None else self.down.shape[0]

    @property
    def matrices(self) -> tuple[Tensor, ...]:
        """What an evaluation reads, but for a few numbers a unit."""
        return (self.up,) if self.down is None else (self.down, self.up)

    def score(self, source: Tensor) -> Tensor:
        """Scores [..., units] in fp32, whatever dtype the two matrices are stored in."""
        inner = source.float()
        if self.down is not None:
            inner = F.linear(inner, nibbles.unpacked(self.down).float())
        return F.linear(inner, nibbles.unpacked(self.up).float()) * self.scale + self.bias

    def quantized(self, bits: int) -> Predictor:
        """The predictor as it is stored and run: both matrices in 8 or 4 bits. Set thresholds with this one.

        A row of `down` has one scale, which moves into the columns of `up`; a row of `up` has one,
        which is kept.
        """
        down, down_scale = _rounded(self.down.float(), bits)
        up, up_scale = _rounded(self.up.float() * down_scale, bits)
        if bits == 4:
            down, up = nibbles.pack(down), nibbles.pack(up)
        return Predictor(down, up, self.bias, self.scale * up_scale)

    def full_rank(self) -> Predictor:
        """Both matrices multiplied out: less to read, and one product, where units are as few as ranks."""
        return Predictor(None, self.up.float() @ self.down.float(), self.bias, self.scale)

    def selector_bias(self, threshold: float) -> Tensor:
        """b such that `score > threshold` is `up @ (down @ source) + b > 0`, [units] fp32."""
        # A finite stand-in for -inf, a threshold that everything passes: inf - inf is nothing.
        threshold = max(threshold, -1e30)
        return (self.bias - threshold) / self.scale


def _rounded(matrix: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Symmetric, one scale a row: `matrix` is about `rounded * scale[:, None]`, which is int8 of so many bits."""
    scale = (matrix.abs().amax(dim=1) / (2 ** (bits - 1) - 1)).clamp(min=1e-12)
    return (matrix / scale[:, None]).round().to(torch.int8), scale


def _contribution(hidden: Tensor, column_norm: Tensor) -> Tensor:
    return hidden.float().abs() * column_norm.float()


def _thinned(values: Tensor | Rows) -> Tensor:
    """At most `_MAX_SORTED` of the values [tokens, units], whole tokens, spread evenly."""
    return values[:: math.ceil(max(values.numel(), 1) / _MAX_SORTED)]


def thinned_for(values: Tensor | Rows, units: int) -> Tensor:
    """Tokens of the values [tokens, width] such that `units` scores of each are few enough to be sorted."""
    return values[:: math.ceil(max(len(values) * units, 1) / _MAX_SORTED)]


def contribution_cutoff(examples: SiteExamples, left_out: float = ENERGY_LEFT_OUT) -> float:
    """The contribution below which all units together hold `left_out` of the site's energy."""
    energy = _contribution(_thinned(examples.hidden), examples.column_norm).square().flatten()
    energy = energy[energy > 0].sort().values.double()
    if energy.numel() == 0:
        return 0.0
    below = torch.searchsorted(energy.cumsum(0), left_out * energy.sum())
    return math.sqrt(energy[below.clamp(max=energy.numel() - 1)].item())


class _Scorer(nn.Module):
    """Starts at what each unit does on average: `up` is zero, so the first scores are the bias."""

    def __init__(self, down: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(torch.zeros(len(bias), len(down), device=down.device))
        self.bias = nn.Parameter(bias)

    def forward(self, source: Tensor) -> Tensor:
        return F.linear(F.linear(source, self.down), self.up, self.bias)


@dataclass(frozen=True, slots=True, eq=False)
class _Prepared:
    """A site, what standardises its source, and the scale and mean of its weights."""

    examples: SiteExamples
    mean: Tensor
    scale: Tensor
    unit_scale: Tensor
    mean_weight: Tensor

    def source(self, rows: Tensor) -> Tensor:
        return (self.examples.source[rows].float() - self.mean) / self.scale

    def weight(self, rows: Tensor | slice) -> Tensor:
        return self.examples.hidden[rows].abs() * self.unit_scale


def _check(site: int, examples: SiteExamples, rank: int) -> None:
    source, hidden = examples.source, examples.hidden
    shapes = f"source {list(source.shape)}, hidden {list(hidden.shape)}"
    if (
        source.ndim != 2
        or hidden.ndim != 2
        or source.shape[0] != hidden.shape[0]
        or examples.column_norm.shape != hidden.shape[1:]
    ):
        raise CalibrationError(
            f"examples of site {site} don't belong together",
            found=f"{shapes}, column_norm {list(examples.column_norm.shape)}",
            expected="[tokens, width], [tokens, units], [units]",
        )
    if examples.tokens < MIN_TOKENS:
        raise CalibrationError(
            f"site {site} has too few examples for a predictor",
            found=f"{examples.tokens} tokens",
            expected=f"at least {MIN_TOKENS}",
            fix="calibrate on more text",
        )
    most = min(examples.source_width, examples.units)
    if not 1 <= rank <= most:
        raise CalibrationError(
            f"site {site} can't have a predictor of this rank",
            found=f"rank {rank} for {shapes}",
            expected=f"1 to {most}",
        )
    for name in ("source", "hidden", "column_norm"):
        if not _finite(getattr(examples, name)):
            raise CalibrationError(
                f"examples of site {site} hold NaN or inf in {name}",
                fix="check that the dense model stays finite on the calibration text",
            )


def chunks(tokens: int) -> list[slice]:
    """Parts of so many tokens that can be held in fp32."""
    return [slice(i, i + _CHUNK_TOKENS) for i in range(0, tokens, _CHUNK_TOKENS)]


def _finite(values: Tensor | Rows) -> bool:
    # A sum is finite only if every element is; fp32, because fp16 sums overflow.
    return all(values[c].sum(dtype=torch.float32).isfinite() for c in chunks(len(values)))


def _prepare(examples: SiteExamples) -> _Prepared:
    source, tokens = examples.source, examples.tokens
    parts = chunks(tokens)
    mean = (sum(source[c].double().sum(0) for c in parts) / tokens).float()
    variance = sum((source[c].float() - mean).double().square().sum(0) for c in parts) / tokens
    scale = variance.sqrt().float()
    # Stretched like the others, a channel that hardly moves would have the largest weights, whose steps are too
    # coarse for all others. Infinitely wide, it is read as zero and has no weight.
    scale = torch.where(scale > QUIET * scale.median(), scale, torch.inf)
    cutoff = contribution_cutoff(examples) if examples.cutoff is None else examples.cutoff
    unit_scale = examples.column_norm.float() / (cutoff or 1.0)
    mean_weight = sum(examples.hidden[c].float().abs().sum(0) for c in parts) * unit_scale / tokens
    return _Prepared(examples, mean, scale, unit_scale, mean_weight)


def _start(site: _Prepared, rank: int, seed: int) -> _Scorer:
    # Drawn on the CPU, so that a seed means the same on every device.
    generator = torch.Generator().manual_seed(seed)
    width = site.examples.source_width
    down = torch.randn(rank, width, generator=generator) / math.sqrt(width)
    bias = site.mean_weight.clamp(min=1e-4).log()
    return _Scorer(down.to(site.mean.device), bias)


def _slope(score: Tensor, weight: Tensor) -> Tensor:
    """The derivative of the loss by the score: a third of the time that differentiating it would take.

    Cross entropy of "runs", weighted by the contribution, and "is skipped", weighted by one:
    weight * softplus(-score) + softplus(score), minimal where score = log E[weight | source].
    """
    runs = score.sigmoid()
    # (1 + weight) * runs - weight, in place: these are the largest tensors of a step
    return runs.addcmul_(runs, weight).sub_(weight)


def _descend(
    group: Sequence[_Prepared],
    rank: int,
    *,
    seed: int,
    steps: int,
    progress: Callable[[int], None],
) -> list[Predictor]:
    """Adam on all sites of the group at once; each sees the tokens that it would see alone."""
    examples = group[0].examples
    generator = torch.Generator().manual_seed(seed)
    scorers = [_start(site, rank, seed) for site in group]
    params, _ = stack_module_state(scorers)
    params = {name: value.detach() for name, value in params.items()}
    # Adam moves every entry alike, so a score moves in proportion to the fan-in: divide by it.
    rates = {"down": 8 / examples.source_width, "up": 0.5 / rank, "bias": 0.03}
    optimizer = torch.optim.Adam([{"params": [params[k]], "lr": rates[k]} for k in rates])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    forward = vmap(partial(functional_call, scorers[0]))
    for step in range(steps):
        rows = torch.randint(examples.tokens, (_BATCH_TOKENS,), generator=generator)
        rows = rows.to(examples.source.device)
        source = torch.stack([site.source(rows) for site in group])
        weight = torch.stack([site.weight(rows) for site in group])
        score, pull_back = vjp(lambda p, x=source: forward(p, (x,)), params)
        (gradients,) = pull_back(_slope(score, weight))
        for name, gradient in gradients.items():
            params[name].grad = gradient / len(rows)
        optimizer.step()
        schedule.step()
        progress(step + 1)
    return [
        _fold(site, params["down"][i], params["up"][i], params["bias"][i])
        for i, site in enumerate(group)
    ]


def _fold(site: _Prepared, down: Tensor, up: Tensor, bias: Tensor) -> Predictor:
    """Move the standardisation of the source into `down` and `bias`."""
    folded = down / site.scale
    return Predictor(folded, up.clone(), bias - up @ (folded @ site.mean), torch.ones_like(bias))


def fit_predictors(
    sites: Sequence[SiteExamples],
    ranks: Sequence[int],
    *,
    seed: int,
    steps: int = 500,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Predictor]:
    """One fp32 predictor per site, in order; a seed fixes them, the global RNG isn't touched.

    `progress(stage, done, total)` hears of stages "prepare" (a site) and "fit" (a step).
    """
    if len(sites) != len(ranks):
        raise ValueError(f"{len(sites)} sites, but {len(ranks)} ranks")
    for i, (examples, rank) in enumerate(zip(sites, ranks, strict=True)):
        _check(i, examples, rank)
    report = progress or (lambda stage, done, total: None)

    groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for i, (examples, rank) in enumerate(zip(sites, ranks, strict=True)):
        shape = (examples.tokens, examples.source_width, examples.units)
        groups[(*shape, rank, examples.source.device)].append(i)

    total, done, prepared_sites = steps * len(groups), 0, 0
    predictors: dict[int, Predictor] = {}
    for members in groups.values():
        prepared = []
        for i in members:
            prepared.append(_prepare(sites[i]))
            prepared_sites += 1
            report("prepare", prepared_sites, len(sites))
        fitted = _descend(
            prepared,
            ranks[members[0]],
            seed=seed,
            steps=steps,
            progress=lambda step, before=done: report("fit", before + step, total),
        )
        done += steps
        predictors.update(zip(members, fitted, strict=True))
    return [predictors[i] for i in range(len(sites))]


def _cut(ascending: Tensor, fraction: float) -> float:
    """The value that `fraction` of the sorted values are above, ties aside."""
    above = round(fraction * ascending.numel())
    if above >= ascending.numel():
        return -math.inf
    return ascending[ascending.numel() - 1 - above].item()


def threshold_for_density(scores: Tensor, density: float) -> float:
    """The threshold that this share of the scores [tokens, units] is above; -inf for all."""
    return _cut(_thinned(scores).float().flatten().sort().values, density)


def threshold_for_recall(scores: Tensor, labels: Tensor, recall: float) -> float:
    """The threshold that this share of the labelled units' scores is above."""
    wanted = scores[labels].float()
    if wanted.numel() == 0:
        return math.inf
    return _cut(wanted.sort().values, recall)


@dataclass(frozen=True, slots=True)
class ThresholdCurve:
    """The trade-off between density and threshold of a site, densities ascending."""

    densities: tuple[float, ...]
    thresholds: tuple[float, ...]

    def at(self, density: float) -> float:
        """The threshold at `density`, linear between the stored points; -inf at 1."""
        if density >= 1.0:
            return -math.inf
        grid, values = self.densities, self.thresholds
        if density <= grid[0]:
            return values[0]
        if density >= grid[-1]:
            return values[-1]
        right = next(i for i, d in enumerate(grid) if d >= density)
        share = (density - grid[right - 1]) / (grid[right] - grid[right - 1])
        return values[right - 1] + share * (values[right] - values[right - 1])


def threshold_curve(scores: Tensor, densities: Sequence[float] = DENSITY_GRID) -> ThresholdCurve:
    """`threshold_for_density` at every density of the grid, for one sort."""
    ascending = _thinned(scores).float().flatten().sort().values
    grid = tuple(sorted(densities))
    return ThresholdCurve(grid, tuple(_cut(ascending, density) for density in grid))


def shared_threshold_curve(
    scores: Iterable[Tensor], densities: Sequence[float] = DENSITY_GRID
) -> ThresholdCurve:
    """One curve for all sites: the threshold at which they run that share of all their units.

    Each site's own density then follows from how much its units matter, while equal densities
    waste units where few matter and starve sites where many do. `scores` may be a generator: only
    a sample of each site's scores is kept.
    """
    return threshold_curve(
        torch.cat([_thinned(site).flatten() for site in scores])[:, None], densities
    )


@dataclass(frozen=True, slots=True)
class SiteMetrics:
    """How a predictor with its threshold does on tokens that it wasn't fitted on.

    density: share of units selected. recall: share of the labelled units that are selected.
    precision: share of the selected units that are labelled. output_error: norm of what the
    skipped units would have added to the site's output, over the norm of that output.
    """

    density: float
    recall: float
    precision: float
    output_error: float


def measure(
    predictor: Predictor,
    threshold: float,
    examples: SiteExamples,
    w_out: Tensor,
    *,
    cutoff: float | None = None,
) -> SiteMetrics:
    """Metrics of `score > threshold` on `examples`; w_out [output width, units].

    A unit is labelled when its contribution passes `cutoff` (default: `contribution_cutoff`).
    """
    cutoff = contribution_cutoff(examples) if cutoff is None else cutoff
    selected = labelled = both = total = 0
    lost = kept = 0.0
    for rows in chunks(examples.tokens):
        hidden = examples.hidden[rows].float()
        mask = predictor.score(examples.source[rows]) > threshold
        label = _contribution(hidden, examples.column_norm) > cutoff
        selected += mask.sum().item()
        labelled += label.sum().item()
        both += (mask & label).sum().item()
        total += mask.numel()
        lost += F.linear(hidden.masked_fill(mask, 0.0), w_out.float()).square().sum().item()
        kept += F.linear(hidden, w_out.float()).square().sum().item()
    return SiteMetrics(
        density=selected / max(total, 1),
        recall=both / labelled if labelled else 1.0,
        precision=both / selected if selected else 1.0,
        output_error=math.sqrt(lost / kept) if kept else 0.0,
    )
