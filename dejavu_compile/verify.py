"""Does contextual sparsity exist in this model? Two passes, as in the paper. (Deja Vu, section 3)

Pass 1 runs dense and ranks the units of every site by the norm of their contribution, token by token; pass 2
runs only the top share of them. Beside it, what "contextual" adds: the same units for every token, and random ones.

    unit     |h_u| ||W_u||      a neuron, h its activation, W_u its column of the output projection
             ||W_h y_h||        a head
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dejavu_compile.passes.find_sites import find_sites, layer_of, resolve
from dejavu_compile.passes.normalize import normalize
from dejavu_compile.passes.residual import residual_after
from dejavu_compile.passes.site import Site, SiteKind

from ._compat import guard_identity, names_in, recompile_limit, unset_fake_temporarily
from .batches import Batch, call_kwargs, check_batches, check_model, counted
from .collect import RECORDED_GRAPHS, Contributions
from .errors import CalibrationError, OptionError
from .evaluate import Evaluation, Tally, log_probabilities, predicted
from .progress import Bars

DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7)
BATCHES = (1, 2, 4, 8, 16, 32)
KINDS = ("mlp", "attention", "both")
LAYER_DENSITY = 0.1


class Selector(StrEnum):
    """Who chooses the units that pass 2 runs."""

    CONTEXTUAL = "contextual"  # each token its own, by their contributions in pass 1
    STATIC = "static"  # the same for every token, by their mean squared contribution to all tokens
    RANDOM = "random"  # each token its own, by chance


@dataclass(frozen=True, slots=True)
class Existence:
    """Quality with a share of the units running. `layer` is -1 where all layers are sparse.

    kind: "mlp", "attention" or "both".
    """

    kind: str
    layer: int
    selector: str
    density: float
    quality: Evaluation

    def to_dict(self) -> dict[str, Any]:
        """For JSON and tables."""
        row = {key: getattr(self, key) for key in ("kind", "layer", "selector", "density")}
        return {**row, **self.quality.to_dict()}


@dataclass(frozen=True, slots=True)
class Similarity:
    """One layer against the one before it, means over tokens.

    residual: cosine of the residual stream after the two layers' sites of this kind (NaN if there is none to
    be seen). lookahead_recall: the share of this layer's top units that it would choose by itself from what the
    site one layer earlier reads, before any predictor is trained (NaN for attention). lookahead_chance: that
    share for units chosen by chance, the density.
    """

    kind: str
    layer: int
    name: str
    residual: float
    lookahead_recall: float
    lookahead_chance: float


@dataclass(frozen=True, slots=True)
class Union:
    """Share of the units that a batch of tokens of different contexts selects together, mean over layers."""

    kind: str
    density: float
    batch: int
    union: float
    independent: float  # 1 - (1 - density)^batch, if tokens chose independently


@dataclass(frozen=True, slots=True)
class Verification:
    """What `verify` measured. `str()` is a table, `rows()` one dict a row, `plot()` a picture."""

    existence: list[Existence] = field(default_factory=list)
    similarity: list[Similarity] = field(default_factory=list)
    unions: list[Union] = field(default_factory=list)

    def rows(self) -> list[dict[str, Any]]:
        """The existence check, one dict a row: for `pandas.DataFrame`, say."""
        return [row.to_dict() for row in self.existence]

    def to_dict(self) -> dict[str, Any]:
        """For JSON (NaN as None)."""
        return {
            "existence": self.rows(),
            "similarity": [_without_nan(asdict(s)) for s in self.similarity],
            "unions": [asdict(u) for u in self.unions],
        }

    def __str__(self) -> str:
        lines = [
            f"{'kind':<10} {'selector':<11} {'density':>7} {'perplexity':>11} {'KL':>9} {'top-1':>8}"
        ]
        lines += [
            f"{e.kind:<10} {e.selector:<11} {e.density:7.2f} {e.quality.perplexity_increase:+11.2%} "
            f"{e.quality.kl:9.4f} {e.quality.top1_agreement:8.2%}"
            for e in self.existence
            if e.layer < 0
        ]
        lines += [
            "",
            f"{'kind':<10} {'layer':>5} {'residual cosine':>16} {'lookahead recall':>17}",
        ]
        lines += [
            f"{s.kind:<10} {s.layer:5d} {_known(s.residual, '.4f'):>16} {_known(s.lookahead_recall, '.2%'):>17}"
            for s in self.similarity
        ]
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """Draw a PNG (or whatever the suffix says): density against perplexity, layers, batches.

        Needs matplotlib.
        """
        from .plots import plot_verification

        plot_verification(self, path)


def _known(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def _without_nan(row: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}


class _Tap(nn.Module):
    """Stands between a site's hidden units and its output projection, which reads them through it."""

    def __init__(self) -> None:
        super().__init__()
        self.watch: Callable[[Tensor], None] | None = None
        self.mask: Tensor | None = None  # [tokens, units] or [units], bool

    def forward(self, value: Tensor) -> Tensor:
        """The value, with what the mask leaves out zeroed."""
        if self.watch is not None:
            self.watch(value)
        if self.mask is None:
            return value
        mask = self.mask.repeat_interleave(value.shape[-1] // self.mask.shape[-1], dim=-1)
        rows = value.reshape(-1, value.shape[-1])
        return rows.masked_fill(~mask, 0.0).reshape(value.shape)


@dataclass(slots=True, eq=False)
class _Watched:
    """A site of the running model: its tap, and what pass 1 saw of the last batch."""

    kind: SiteKind
    name: str
    layer: int
    units: int
    tap: _Tap
    # By the shape of the site's input: what its units would contribute if they read another value.
    again: dict[torch.Size, Callable[[Tensor], Tensor] | None]
    contributions: Tensor | None = None  # [tokens, units]
    source: Tensor | None = None
    residual: Tensor | None = None  # [tokens, width]


class _Twin:
    """A `torch.compile` backend: the model's own graph, run eagerly, with a tap at every site."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.sites: dict[int, _Watched] = {}
        self.watching = False

    def __call__(
        self, gm: fx.GraphModule, example_inputs: Sequence[Any], **_: Any
    ) -> Callable[..., Any]:
        """Put the taps in."""
        normalize(gm, example_inputs)
        placeholders = gm.graph.find_nodes(op="placeholder")
        inputs = dict(zip(placeholders, example_inputs, strict=True))
        names = names_in(self.model, gm, example_inputs)
        for site in find_sites(gm).sites:
            with unset_fake_temporarily():
                weight = resolve(gm, site.output.weight, inputs)
                known = {n: resolve(gm, n, inputs) for n in _parameters(site)}
                norms = Contributions(site, weight)
            guard_identity(site.output.weight)  # layers that are alike may be one graph
            watched = self._watched(site, weight, names)
            watched.again[site.input.meta["val"].shape] = _by_another_input(site, norms, known)
            self._watch(gm, site.hidden, watched, "contributions", norms)
            self._watch(gm, site.input, watched, "source", lambda value: value)
            after = residual_after(site.output.node)
            if after is not None:
                self._watch(gm, after, watched, "residual", lambda value: value.flatten(0, -2))
            masked = _insert(gm, site.hidden, watched.tap, site.output.node)
            site.output.node.replace_input_with(site.hidden, masked)
        gm.recompile()
        return gm.forward

    def _watched(self, site: Site, weight: Tensor, names: Mapping[str, str]) -> _Watched:
        name = names.get(site.name, site.name)
        layer = layer_of(name, site.layer)
        new = _Watched(site.kind, name, layer, site.units, _Tap(), {})
        return self.sites.setdefault(id(weight), new)

    def _watch(
        self, gm: fx.GraphModule, value: fx.Node, watched: _Watched, what: str,
        of: Callable[[Tensor], Tensor],
    ) -> None:  # fmt: skip
        """Keep something of `value` as `watched.what`, in pass 1."""

        def watch(seen: Tensor) -> None:
            if self.watching:
                setattr(watched, what, of(seen.detach()))

        tap = _Tap()
        tap.watch = watch
        _insert(gm, value, tap, value.next)


def _insert(gm: fx.GraphModule, value: fx.Node, tap: _Tap, before: fx.Node) -> fx.Node:
    """A call of the tap on `value`."""
    name = f"dejavu_tap_{sum(isinstance(m, _Tap) for m in gm.children())}"
    gm.add_submodule(name, tap)
    with gm.graph.inserting_before(before):
        return gm.graph.call_module(name, (value,))


def _parameters(site: Site) -> list[fx.Node]:
    """What is there before the graph runs, of what the site's own ops read."""
    inside = [*(leaf.projection.node for leaf in site.row_leaves), *site.interior]
    read = {n for node in inside for n in node.all_input_nodes if n is not site.input}
    return [n for n in read if n.op in {"placeholder", "get_attr"}]


def _by_another_input(
    site: Site, norms: Contributions, known: dict[fx.Node, Tensor]
) -> Callable[[Tensor], Tensor] | None:
    """What the units would contribute if the site's projections read another value.

    None for attention, whose heads also read other tokens, and where anything else goes in that is computed.
    """
    inside = {*(leaf.projection.node for leaf in site.row_leaves), *site.interior}
    given = {site.input, *known, *inside}
    if site.kind is SiteKind.ATTENTION or any(
        n not in given for node in inside for n in node.all_input_nodes
    ):
        return None
    order = sorted(inside)

    def run(value: Tensor) -> Tensor:
        values: dict[fx.Node, Any] = {**known, site.input: value}
        for node in order:
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
        return norms(values[site.hidden])

    return run


def top(values: Tensor, density: float) -> Tensor:
    """Mask of the largest values of the last dim, at least one: round(density * units) of them."""
    count = max(1, round(density * values.shape[-1]))
    return torch.zeros_like(values, dtype=torch.bool).scatter_(
        -1, values.topk(count, dim=-1).indices, True
    )


@dataclass(frozen=True, slots=True)
class _Case:
    """What one run of pass 2 leaves out."""

    kind: str
    layer: int
    selector: Selector
    density: float

    def concerns(self, site: _Watched) -> bool:
        """Whether units of this site are left out."""
        return self.kind in ("both", site.kind) and self.layer in (-1, site.layer)


class _Statistics:
    """What pass 1 shows by itself, added up over batches."""

    def __init__(self, sites: list[_Watched], densities: Sequence[float], seed: int) -> None:
        self.sites, self.densities = sites, densities
        self.importance = [0.0] * len(sites)
        self.earlier = [_earlier(sites, site) for site in sites]
        self._sums = [[0.0, 0.0, 0] for _ in sites]  # cosine, recall, tokens
        self._unions: dict[tuple[str, float, int], list[float]] = {}
        self._order = torch.Generator().manual_seed(seed)

    def add(self, keep: Tensor) -> None:
        """Take in the batch that the sites have just seen; `keep` [tokens] are those that count."""
        shuffled = torch.randperm(int(keep.sum()), generator=self._order)
        for number, (site, before) in enumerate(zip(self.sites, self.earlier, strict=True)):
            mine = site.contributions.reshape(-1, site.units)[keep]
            self.importance[number] += mine.square().sum(0)
            if before is not None:
                self._compare(number, site, before, mine, keep)
            for density in self.densities:
                self._unite(str(site.kind), density, top(mine, density)[shuffled.to(mine.device)])

    def _compare(
        self, number: int, site: _Watched, before: _Watched, mine: Tensor, keep: Tensor
    ) -> None:
        cosine = recall = math.nan
        if site.residual is not None and before.residual is not None:
            pair = (x.float()[keep] for x in (site.residual, before.residual))
            cosine = F.cosine_similarity(*pair, dim=-1).sum().item()
        again = site.again.get(site.source.shape)
        if again is not None and before.source.shape == site.source.shape:
            guess = top(again(before.source).reshape(-1, site.units)[keep], LAYER_DENSITY)
            chosen = top(mine, LAYER_DENSITY)
            recall = ((guess & chosen).sum(-1) / chosen.sum(-1)).sum().item()
        sums = self._sums[number]
        sums[:] = [sums[0] + cosine, sums[1] + recall, sums[2] + len(mine)]

    def _unite(self, kind: str, density: float, masks: Tensor) -> None:
        for batch in BATCHES:
            groups = masks[: len(masks) // batch * batch].unflatten(0, (-1, batch))
            if len(groups):
                share = groups.any(1).float().mean().item()
                self._unions.setdefault((kind, density, batch), []).append(share)

    def similarity(self) -> list[Similarity]:
        """One entry for each site that has one of its kind before it."""
        return [
            Similarity(str(site.kind), site.layer, site.name, cosine / tokens, recall / tokens, LAYER_DENSITY)
            for site, (cosine, recall, tokens) in zip(self.sites, self._sums, strict=True)
            if tokens
        ]  # fmt: skip

    def unions(self) -> list[Union]:
        """Means over layers and batches of text."""
        return [
            Union(kind, density, batch, sum(s) / len(s), 1 - (1 - density) ** batch)
            for (kind, density, batch), s in self._unions.items()
        ]


def _earlier(sites: list[_Watched], site: _Watched) -> _Watched | None:
    """The site of the same kind before this one."""
    same = [s for s in sites if s.kind is site.kind]
    at = same.index(site)
    return same[at - 1] if at else None


def _masks(
    case: _Case, sites: list[_Watched], statistics: _Statistics, chance: torch.Generator
) -> dict[_Tap, Tensor]:
    """The units that pass 2 runs of each site that the case concerns."""
    masks = {}
    for site, importance in zip(sites, statistics.importance, strict=True):
        if not case.concerns(site):
            continue
        value = site.contributions.reshape(-1, site.units)
        if case.selector is Selector.STATIC:
            value = importance
        elif case.selector is Selector.RANDOM:
            value = torch.rand(value.shape, generator=chance).to(value.device)
        masks[site.tap] = top(value, case.density)
    return masks


def _cases(
    sites: list[_Watched],
    densities: Sequence[float],
    kinds: Sequence[str],
    layer_density: float | None,
) -> list[_Case]:
    present = {str(site.kind) for site in sites}
    wanted = [k for k in kinds if k in present or (k == "both" and len(present) == 2)]
    cases = [
        _Case(kind, -1, selector, density)
        for kind in wanted
        for selector in Selector
        for density in densities
    ]
    if layer_density is not None:
        cases += [
            _Case(str(site.kind), site.layer, Selector.CONTEXTUAL, layer_density)
            for site in sites
            if str(site.kind) in wanted
        ]
    return cases


def _check(densities: Sequence[float], kinds: Sequence[str]) -> None:
    for density in densities:
        if not 0 < density <= 1:
            raise OptionError(
                "a density is out of range", found=str(density), expected="0 < density <= 1"
            )
    for kind in kinds:
        if kind not in KINDS:
            raise OptionError(f"unknown kind {kind!r}", expected=f"one of {', '.join(KINDS)}")


def verify(
    model: nn.Module,
    batches: Iterable[Tensor | Mapping[str, Tensor]],
    densities: Sequence[float] = DENSITIES,
    *,
    kinds: Sequence[str] = KINDS,
    layer_density: float | None = LAYER_DENSITY,
    seed: int = 0,
    progress: bool = True,
) -> Verification:
    """The two-pass existence check, and how alike neighbouring layers are. (Deja Vu, section 3)

    batches: `input_ids` [B, T], or dicts of model inputs. densities: the shares of units that pass 2 runs.
    kinds: of "mlp", "attention" and "both". layer_density: the share for layers that are sparse alone, or None
    to leave that out. Units of the static selector are ranked on these same batches, which flatters it. What is
    attached to the model plays no part. Raises CalibrationError, ModelStateError and OptionError.
    """
    _check(densities, kinds)
    check_model(model, "verify")
    checked = check_batches(model, batches)
    twin, bars = _Twin(model), Bars(progress)
    # A graph for each shape of batch: a site is run again on values of the shape that it was found with.
    run = torch.compile(model.forward, backend=twin, dynamic=False)
    chance = torch.Generator().manual_seed(seed)
    try:
        with torch.no_grad(), recompile_limit(RECORDED_GRAPHS):
            statistics = _first_pass(run, twin, model, checked, densities, seed, bars)
            sites = statistics.sites
            cases = _cases(sites, densities, kinds, layer_density)
            tallies = [Tally() for _ in cases]
            for number, batch in enumerate(checked):
                keep, target = predicted(batch)
                kwargs = call_kwargs(model, batch)
                dense = log_probabilities(_watched_run(run, twin, kwargs), keep)
                for at, (case, tally) in enumerate(zip(cases, tallies, strict=True)):
                    masks = _masks(case, sites, statistics, chance)
                    tally.add(
                        dense, log_probabilities(_masked_run(run, masks, kwargs), keep), target
                    )
                    bars("second pass", number * len(cases) + at + 1, len(checked) * len(cases))
    finally:
        bars.close()
    existence = [
        Existence(case.kind, case.layer, str(case.selector), case.density, tally.result())
        for case, tally in zip(cases, tallies, strict=True)
    ]
    return Verification(existence, statistics.similarity(), statistics.unions())


def _first_pass(
    run: Callable[..., Any], twin: _Twin, model: nn.Module, batches: list[Batch],
    densities: Sequence[float], seed: int, bars: Bars,
) -> _Statistics:  # fmt: skip
    statistics = None
    for number, batch in enumerate(batches):
        _watched_run(run, twin, call_kwargs(model, batch))
        if not twin.sites:
            raise CalibrationError(
                f"no site was found in {type(model).__name__}",
                fix="dv.explain(model, input_ids) says why each projection stays dense",
            )
        for site in twin.sites.values():
            if not site.contributions.isfinite().all():
                raise CalibrationError(
                    f"{site.name} sees NaN or inf on this text",
                    fix="check that the dense model is sound on it, e.g. in a wider dtype",
                )
        statistics = statistics or _Statistics(list(twin.sites.values()), densities, seed)
        statistics.add(counted(batch).flatten())
        bars("first pass", number + 1, len(batches))
    return statistics


def _watched_run(run: Callable[..., Any], twin: _Twin, kwargs: dict[str, Any]) -> Any:
    """Pass 1: dense, and every site is watched."""
    twin.watching = True
    try:
        return run(**kwargs)
    finally:
        twin.watching = False


def _masked_run(run: Callable[..., Any], masks: dict[_Tap, Tensor], kwargs: dict[str, Any]) -> Any:
    """Pass 2."""
    for tap, mask in masks.items():
        tap.mask = mask
    try:
        return run(**kwargs)
    finally:
        for tap in masks:
            tap.mask = None
