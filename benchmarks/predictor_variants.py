"""Variants of an MLP's predictor: what each changes of the library's default, and how it is fitted.

What the library can fit, it does; `descend` is its `fit_predictors` with what it doesn't have.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vjp, vmap

from dejavu_compile.predictors import QUIET, SiteExamples, fit_predictors

BATCH_TOKENS = 512
UNROUNDED = 32
SAMPLE = slice(None, None, 8)


@dataclass(frozen=True, slots=True)
class Variant:
    """What differs from the library's default."""

    name: str
    bits: int = 8  # 16: bf16; 32: not rounded, at the rank of 8
    label: str = "contribution"  # energy: its square; active: 0 or 1; log
    norm: str = "column"  # fisher: in the metric of the loss, in one unit for all layers
    start: str = "random"  # svd: of the projection into the units; regression: of reduced rank
    between: str = "nothing"  # relu
    ahead: int = 1
    steps: int = 500
    aware: bool = False  # of rounding, while it is fitted
    ranks: str = "equal"  # uneven: where a rank lowers the loss most
    threshold: str = "shared"  # layer: one each; token: the same number of units for each token
    quiet: float = QUIET  # share of the median deviation below which source channels are ignored
    refill: bool = False  # skipped units count as their mean where they are skipped

    @property
    def fitted_like(self) -> "Variant":
        """The same for all variants of one fit: they differ in what is done with it."""
        bits = self.bits if self.aware else 8
        return replace(self, name="", bits=bits, ranks="equal", threshold="shared", refill=False)

    def rank(self, default: int) -> int:
        """The rank that the default's bytes buy."""
        return default if self.bits == UNROUNDED else default * 8 // self.bits


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
    Variant("fisher norm, threshold of each layer", norm="fisher", threshold="layer"),
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


def rounded(matrix: Tensor, bits: int) -> Tensor:
    """Symmetric, one scale a row, as the library's int8; the gradient passes as if nothing were rounded."""
    if bits == UNROUNDED:
        return matrix
    if bits == 16:
        return matrix.bfloat16().float()
    most = 2 ** (bits - 1) - 1
    scale = (matrix.detach().abs().amax(dim=1, keepdim=True) / most).clamp(min=1e-12)
    return matrix + ((matrix / scale).round() * scale - matrix).detach()


@dataclass(frozen=True, slots=True, eq=False)
class Scorer:
    """score = up @ (down @ source) + bias, or up @ relu(down @ source + middle) + bias."""

    down: Tensor
    up: Tensor
    bias: Tensor
    middle: Tensor | None = None

    def __call__(self, source: Tensor) -> Tensor:
        """Scores [tokens, units]."""
        inner = F.linear(source, self.down, self.middle)
        return F.linear(inner if self.middle is None else inner.relu(), self.up, self.bias)

    def rounded(self, bits: int) -> "Scorer":
        """As it would be stored; the scale of a row of `down` moves into a column of `up` first, as in the library."""
        scale = torch.ones(len(self.down))
        if bits < 16:
            scale = self.down.detach().abs().amax(dim=1).clamp(min=1e-12)
        down, up = rounded(self.down, bits), rounded(self.up * scale, bits) / scale
        return replace(self, down=down, up=up)

    def num_bytes(self, bits: int) -> int:
        """What one evaluation reads, biases in fp32."""
        weights = self.down.numel() + self.up.numel()
        biases = self.bias.numel() + (0 if self.middle is None else self.middle.numel())
        return weights * bits // 8 + biases * 4


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


def standardisation(site: SiteExamples, quiet: float) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the source's channels, infinite where they are quiet."""
    sample = site.source[SAMPLE]
    scale = sample.std(0)
    return sample.mean(0), torch.where(scale > quiet * scale.median(), scale, torch.inf)


def start(
    site: SiteExamples, variant: Variant, rank: int, seed: int, into: Tensor
) -> dict[str, Tensor]:
    """The parameters that a fit begins with, of the standardised source."""
    mean, scale = standardisation(site, variant.quiet)
    source, target = (site.source[SAMPLE] - mean) / scale, labels(site, SAMPLE, variant.label)
    down = torch.randn(rank, site.source_width, generator=torch.Generator().manual_seed(seed))
    down, up = down / math.sqrt(site.source_width), torch.zeros(site.units, rank)
    if variant.start == "svd":
        u, s, v = torch.linalg.svd(into * scale.nan_to_num(posinf=0.0), full_matrices=False)
        down, up = v[:rank], u[:, :rank] * s[:rank]
        up = up / (source @ down.T @ up.T).std()
    elif variant.start == "regression":
        down, up = reduced_rank(source, target.log1p(), rank)
    bias = target.mean(0)
    if variant.label == "active":
        bias = bias.clamp(1e-3, 1 - 1e-3).logit()
    elif variant.label != "log":
        bias = bias.clamp(min=1e-4).log()
    middle = {} if variant.between == "nothing" else {"middle": torch.zeros(rank)}
    return {"down": down, "up": up, "bias": bias, **middle}


def reduced_rank(x: Tensor, y: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(down, up) of the best linear prediction of y from x that has this rank; inner values have variance one."""
    covariance = x.T @ x / len(x) + 1e-3 * torch.eye(x.shape[1])
    root = torch.linalg.cholesky(covariance)
    whitened = torch.linalg.solve_triangular(root, x.T @ (y - y.mean(0)) / len(x), upper=False)
    u, s, v = torch.linalg.svd(whitened, full_matrices=False)
    down = torch.linalg.solve_triangular(root.T, u[:, :rank], upper=True).T
    return down, v[:rank].T * s[:rank]


def descend(
    variant: Variant, sites: Sequence[SiteExamples], rank: int, seed: int, into: Sequence[Tensor]
) -> list[Scorer]:
    """Adam on all sites at once, each standardised."""
    starts = [start(site, variant, rank, seed, w) for site, w in zip(sites, into, strict=True)]
    params = {name: torch.stack([s[name] for s in starts]) for name in starts[0]}
    means, scales = zip(*(standardisation(site, variant.quiet) for site in sites), strict=True)
    mean, scale = torch.stack(means)[:, None], torch.stack(scales)[:, None]
    rates = {"down": 8 / sites[0].source_width, "up": 0.5 / rank, "bias": 0.03, "middle": 0.03}
    optimizer = torch.optim.Adam([{"params": [params[k]], "lr": rates[k]} for k in params])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, variant.steps)
    generator = torch.Generator().manual_seed(seed)

    def score(p: dict[str, Tensor], source: Tensor, scale: Tensor) -> Tensor:
        scorer = Scorer(**p)
        if variant.aware:
            scorer = replace(scorer, down=scorer.down / scale).rounded(variant.bits)
            scorer = replace(scorer, down=scorer.down * scale.nan_to_num(posinf=0.0))
        return scorer(source)

    for _ in range(variant.steps):
        rows = torch.randint(sites[0].tokens, (BATCH_TOKENS,), generator=generator)
        source = (torch.stack([site.source[rows] for site in sites]) - mean) / scale
        target = torch.stack([labels(site, rows, variant.label) for site in sites])
        scores, pull_back = vjp(lambda p, x=source: vmap(score)(p, x, scale), params)
        (gradients,) = pull_back(slope(scores, target, variant.label))
        for name, gradient in gradients.items():
            params[name].grad = gradient / BATCH_TOKENS
        optimizer.step()
        schedule.step()
    return [
        folded(Scorer(**{k: v[i] for k, v in params.items()}), mean[i, 0], scale[i, 0], variant)
        for i in range(len(sites))
    ]


def folded(scorer: Scorer, mean: Tensor, scale: Tensor, variant: Variant) -> Scorer:
    """The standardisation moved into the weights."""
    scorer = replace(scorer, down=scorer.down / scale)
    if variant.aware:  # the bias was fitted to the rounded ones
        scorer = scorer.rounded(variant.bits)
    shift = scorer.down @ mean
    if scorer.middle is not None:
        return replace(scorer, middle=scorer.middle - shift)
    return replace(scorer, bias=scorer.bias - scorer.up @ shift)


def fit(
    variant: Variant, sites: list[SiteExamples], ranks: list[int], seed: int, into: list[Tensor]
) -> list[Scorer]:
    """A scorer for each site, not rounded yet. `into`: the weights that lead into the sites' units."""
    unlike = (variant.start, variant.between, variant.quiet) != ("random", "nothing", QUIET)
    if unlike or variant.aware or variant.label in ("active", "log"):
        return descend(variant, sites, ranks[0], seed, into)
    fitted = fit_predictors(sites, ranks, seed=seed, steps=variant.steps)
    return [Scorer(p.down, p.up, p.bias) for p in fitted]


def uneven_ranks(
    wide: list[Scorer], sites: list[SiteExamples], unseen: list[SiteExamples], rank: int
) -> list[int]:
    """The same sum of ranks, given where truncating predictors of twice the rank says that unseen loss falls most."""
    step, losses = 16, []
    for scorer, site, other in zip(wide, sites, unseen, strict=True):
        target = labels(other, slice(None), "contribution")
        spread = site.source[SAMPLE].std(0).clamp(min=1e-6)
        u, s, v = torch.linalg.svd(scorer.up @ (scorer.down * spread), full_matrices=False)
        losses.append({})
        for r in range(step, 2 * rank + 1, step):
            cut = Scorer(v[:r] / spread, u[:, :r] * s[:r], scorer.bias)
            shift = (scorer.up @ scorer.down - cut.up @ cut.down) @ other.source.mean(0)
            score = replace(cut, bias=scorer.bias + shift)(other.source)
            losses[-1][r] = ((1 + target) * F.softplus(score) - target * score).sum().item()
    ranks = [step] * len(wide)
    for _ in range((rank - step) * len(wide) // step):
        gains = [of[r] - of.get(r + step, math.inf) for of, r in zip(losses, ranks, strict=True)]
        ranks[max(range(len(ranks)), key=gains.__getitem__)] += step
    return ranks
