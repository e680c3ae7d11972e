"""What was done to a model, and why not more."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import fx, nn

from dejavu_compile.passes.find_sites import layer_of
from dejavu_compile.passes.site import Found, Policy

from ._compat import guard_identity, names_in, recompile_limit
from .autotune import Choice, block_sizes
from .backend import prepare
from .options import Options
from .plan import Plan, SitePlan

EXPLAINED_GRAPHS = 512  # of one function: more than any decoder has layers


@dataclass(frozen=True, slots=True)
class SiteReport:
    """One site. Bytes are weights read a decode step; `density` is NaN where nothing was measured."""

    name: str
    kind: str
    layer: int
    units: int
    policy: str
    density: float
    reason: str
    bytes_dense: int
    bytes_sparse: int
    break_even: float

    @property
    def speedup(self) -> float:
        """Expected of this site alone: a decode step takes as long as its reading does."""
        return self.bytes_dense / max(self.bytes_sparse, 1)


@dataclass(frozen=True, slots=True)
class UnmatchedReport:
    """A projection, or another product with a weight, that is in no site, and why."""

    name: str
    reason: str
    bytes_dense: int


@dataclass(frozen=True, slots=True)
class LoneAttentionReport:
    """An attention that is in no site, and why; `name`: the weight that reads what it computes, or the op itself."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class BlockSizesReport:
    """What one kind of launch runs with on this GPU, and whether a search or its kernel's rule chose it."""

    launch: str
    launches: int
    config: dict[str, int]
    origin: str


@dataclass(frozen=True, slots=True)
class Report:
    """Every projection and attention of the graphs that one call of the model compiles to.

    `block_sizes`: of our Triton kernels; there are none on a CPU.
    """

    sites: list[SiteReport] = field(default_factory=list)
    unmatched: list[UnmatchedReport] = field(default_factory=list)
    lone_attention: list[LoneAttentionReport] = field(default_factory=list)
    block_sizes: list[BlockSizesReport] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For JSON (NaN as None)."""
        sites = [
            {
                k: None if isinstance(v, float) and math.isnan(v) else v
                for k, v in {**asdict(s), "speedup": s.speedup}.items()
            }
            for s in self.sites
        ]
        return {
            "sites": sites,
            "unmatched": [asdict(u) for u in self.unmatched],
            "lone_attention": [asdict(a) for a in self.lone_attention],
            "block_sizes": [asdict(b) for b in self.block_sizes],
        }

    def __str__(self) -> str:
        rows = [
            (
                "site",
                "kind",
                "units",
                "policy",
                "density",
                "break-even",
                "MB dense",
                "MB sparse",
                "speed-up",
                "why",
            )
        ]
        for s in self.sites:
            density = "" if math.isnan(s.density) else f"{s.density:.2f}"
            rows.append(
                (s.name, s.kind, str(s.units), s.policy, density, f"{s.break_even:.2f}",
                 f"{s.bytes_dense / 1e6:.2f}", f"{s.bytes_sparse / 1e6:.2f}", f"{s.speedup:.2f}", s.reason)
            )  # fmt: skip
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
        lines = [
            "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]])
            for row in rows
        ]
        for title, entries in (
            ("dense weights", self.unmatched),
            ("attention in no site, by the weight that reads it", self.lone_attention),
        ):
            width = max((len(entry.name) for entry in entries), default=0)
            lines += ["", title] if entries else []
            lines += [f"  {entry.name.ljust(width)}  {entry.reason}" for entry in entries]
        lines += ["", "block sizes"] if self.block_sizes else []
        for entry in self.block_sizes:
            sizes = " ".join(f"{name}={value}" for name, value in entry.config.items())
            lines.append(f"  {entry.launches} x {entry.launch}: {sizes} (by {entry.origin})")
        return "\n".join(lines)


def _site_report(plan: SitePlan, names: dict[str, str]) -> SiteReport:
    site, policy = plan.site, plan.decision.policy
    # Without a measurement the sparse bytes are those at full density: nothing is promised.
    density = 1.0 if math.isnan(plan.density) else plan.density
    name = names.get(site.name, site.name)
    shown = plan.wanted if plan.wanted is not None else policy
    return SiteReport(
        name=name, kind=str(site.kind), layer=layer_of(name, site.layer), units=site.units, policy=str(policy),
        density=plan.density, reason=plan.reason, bytes_dense=round(plan.cost.bytes(Policy.DENSE, 1.0)),
        bytes_sparse=round(plan.cost.bytes(policy, density)),
        break_even=plan.cost.break_even(shown),
    )  # fmt: skip


class _Explainer:
    """A `torch.compile` backend that keeps plans and runs the graph as it was."""

    def __init__(self, model: nn.Module, options: Options) -> None:
        self.model, self.options = model, options
        self.seen: list[tuple[Found, Plan, dict[str, str]]] = []
        self.choices: list[Choice] = []

    def __call__(
        self, gm: fx.GraphModule, example_inputs: Sequence[Any], **_: Any
    ) -> Callable[..., Any]:
        prepared = prepare(gm, example_inputs, self.options)
        names = names_in(self.model, gm, example_inputs)
        self.seen.append((prepared.found, prepared.plan, names))
        self.choices += block_sizes(prepared.launches, search=False)
        # Where graphs break between layers, Dynamo runs one graph for all that are alike: ask for each.
        for site in prepared.found.sites:
            guard_identity(site.output.weight)
        return gm.forward


def explain(model: nn.Module, *args: Any, **kwargs: Any) -> Report:
    """Compile one call `model(*args, **kwargs)` and report every projection of it.

    Policies are those of a decode step: give inputs of one token, or any input to see the structure.
    """
    explainer = _Explainer(model, Options())
    with torch.no_grad(), recompile_limit(EXPLAINED_GRAPHS):
        torch.compile(model.forward, backend=explainer)(*args, **kwargs)
    report = Report()
    for found, plan, names in explainer.seen:
        report.sites.extend(_site_report(site, names) for site in plan.sites)
        rest = [(u.projection.name, u.reason, u.projection.num_bytes) for u in found.unmatched]
        rest += [(other.name, other.reason, other.num_bytes) for other in found.others]
        report.unmatched.extend(
            UnmatchedReport(names.get(name, name), reason, size) for name, reason, size in rest
        )
        for lone in found.lone:
            name = lone.node.name if lone.name is None else names.get(lone.name, lone.name)
            report.lone_attention.append(LoneAttentionReport(name, lone.reason))
    for choice in explainer.choices:
        launch = choice.launch
        report.block_sizes.append(
            BlockSizesReport(launch.name, launch.count, choice.config, str(choice.origin))
        )
    return report
