"""Decide a policy for every site of a graph: the artifact, the graph's own proof, and the cost."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from dejavu_compile.passes.glu import as_glu
from dejavu_compile.passes.site import Decision, Execution, Found, LeafKind, Policy, Site

from ._compat import guard_identity, qualified_name
from .attachments import Attachment, attached, fingerprint, fixed_layout, is_unit_major
from .cost import SiteCost, cost_of
from .errors import ArtifactMismatchError
from .options import ExecutionMode, Options

Resolve = Callable[[fx.Node], torch.Tensor]
SitesByWeight = list[tuple[torch.Tensor, Site]]

# The widest selection that the kernels take: beyond it the graph is a prefill.
KERNEL_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Relayout:
    """How a weight has to lie, so that each unit's row or column is contiguous."""

    name: str
    weight: fx.Node
    contracted: int
    produces_units: bool


@dataclass(frozen=True, slots=True)
class SitePlan:
    """A decision with what led to it. `density` is NaN where nothing was measured."""

    decision: Decision
    reason: str
    density: float
    cost: SiteCost
    wanted: Policy | None = None  # the policy that was considered, where it stayed dense

    @property
    def site(self) -> Site:
        """The site decided about."""
        return self.decision.site


@dataclass(frozen=True, slots=True)
class Plan:
    """One decision a site, in graph order; `relayout` would make more sites sparse on a next compile."""

    sites: tuple[SitePlan, ...]
    relayout: tuple[Relayout, ...]

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """What the rewrite carries out."""
        return tuple(s.decision for s in self.sites)

    @property
    def num_sparse(self) -> int:
        """Sites that are not dense."""
        return sum(d.policy is not Policy.DENSE for d in self.decisions)


class _StayDenseError(Exception):
    """Ends the decision about one site with a reason. Never leaves this module."""


def _layouts(site: Site) -> list[Relayout]:
    """How each weight of a site has to lie for the kernels."""
    rows = [Relayout(p.name, p.weight, p.contracted, True) for p in site.projections]
    return [*rows, Relayout(site.name, site.output.weight, site.output.contracted, False)]


def gathered_layouts(site: Site, policy: Policy) -> list[Relayout]:
    """The layouts that `policy` (not dense) needs: a carrier's own projections are read whole, as they lie."""
    if policy in {Policy.PREDICT, Policy.SKETCH}:
        return _layouts(site)
    carrier = site.exact if policy is Policy.EXACT else site.gate
    whole = {leaf.projection.weight for leaf in site.row_leaves if leaf.node in carrier.needs}
    return [layout for layout in _layouts(site) if layout.weight not in whole]


def input_weights(site: Site) -> tuple[fx.Node, ...]:
    """The parameters and buffers between a site's input and its units: weights of projections, biases, vectors."""
    projections = [*site.projections, *(leaf.projection for leaf in site.leaves)]
    read = [n for p in projections if p is not None for n in (p.weight, p.bias)]
    read += [leaf.node for leaf in site.leaves if leaf.kind is LeafKind.VECTOR]
    return tuple(dict.fromkeys(n for n in read if n is not None and qualified_name(n) is not None))


def check_fingerprint(name: str, weight: torch.Tensor, expected: str) -> None:
    """Raise ArtifactMismatchError unless a weight is as it was when it was calibrated."""
    found = fingerprint(weight)
    if found != expected:
        raise ArtifactMismatchError(
            f"the weights of {name} changed after calibration",
            found=f"fingerprint {found}",
            expected=f"fingerprint {expected} (when it was calibrated)",
            fix="calibrate again with dv.calibrate(model, batches), or dv.detach(model) to run lossless",
        )


def _check_inputs(site: Site, attachment: Attachment, resolve: Resolve) -> None:
    """The site's other weights are those that were calibrated; another model may share its output weight."""
    if not attachment.inputs:
        return
    known = {id(w): one for one in attachment.inputs if (w := one.weight()) is not None}
    nodes = input_weights(site)
    for node in nodes:
        # Else Dynamo would run this graph for a model that shares the output weight.
        guard_identity(node)
    for node in nodes:
        if id(resolve(node)) not in known:
            raise _StayDenseError(
                f"its output weight was calibrated with another {qualified_name(node)}: that of a model which shares "
                f"it, or one that was replaced; dv.calibrate(model, batches) for this one"
            )
    for node in nodes:
        weight = resolve(node)
        check_fingerprint(known[id(weight)].name, weight, known[id(weight)].fingerprint)


def _check_selector(site: Site, attachment: Attachment) -> None:
    """What selects units is of the site as it is in this graph."""
    selectors = [
        None if attachment.predictor is None else attachment.predictor.up,
        None if attachment.sketch is None else attachment.sketch.up,
        attachment.sensitivity,
    ]
    for rows in selectors:
        if rows is not None and rows.shape[0] != site.units:
            raise _StayDenseError(
                f"it has {site.units} units here, what would select them is for {rows.shape[0]}"
            )
    carriers = {Policy.EXACT: site.exact, Policy.GATE: site.gate}
    if carriers.get(attachment.policy, site) is None:
        raise _StayDenseError(f"nothing in it is what policy {attachment.policy} goes by here")
    if attachment.policy is Policy.PREDICT and attachment.predictor is None:
        raise _StayDenseError("no predictor is attached")
    if attachment.policy is Policy.SKETCH:
        if as_glu(site) is None or attachment.sketch is None:
            raise _StayDenseError("it isn't a gated pair here, of which its sketch is")
        width, expected = site.input.meta["val"].shape[-1], 2 * attachment.sketch.gate.shape[1]
        if width != expected:
            raise _StayDenseError(f"its input is {width} wide here, its sketch {expected}")


def _source(attachment: Attachment, site: Site, sites: SitesByWeight) -> fx.Node:
    """The node of the declared source edge, in this graph."""
    weight = attachment.source() if attachment.source is not None else None
    named = [s for w, s in sites if w is weight]
    if not named:
        raise _StayDenseError("the site that its predictor reads is not in the same graph")
    # A layer that runs several times is read where it ran last.
    before = [s for s in named if s.input < site.projections[0].node]
    origin = (before or named)[-1]
    width = origin.input.meta["val"].shape[-1]
    expected = attachment.predictor.source_width
    if width != expected:
        raise _StayDenseError(f"its source is {width} wide here, its predictor {expected}")
    if not origin.input < site.projections[0].node:
        raise _StayDenseError("its source comes after it in this graph")
    return origin.input


def _policy(site: Site, attachment: Attachment | None, options: Options) -> tuple[Policy, str]:
    if attachment is not None:
        return attachment.policy, "calibrated"
    if options.execution is ExecutionMode.MASKED:
        raise _StayDenseError("nothing is attached")
    if site.exact is not None and options.exact:
        return Policy.EXACT, f"{site.exact.node.target.__name__.split('.')[0]} leaves exact zeros"
    if site.exact is not None:
        raise _StayDenseError("option dejavu.exact is off")
    raise _StayDenseError(
        "no exact zeros in it and nothing attached: dv.calibrate(model, batches) would make it sparse"
    )


def _executions(site: Site, cost: SiteCost, options: Options) -> list[Execution]:
    """The ways to run part of a site for the tokens that this graph has."""
    if options.execution is ExecutionMode.MASKED:
        return [Execution.MASKED]
    tokens = site.num_tokens
    if tokens is None:
        raise _StayDenseError("the number of tokens is symbolic: prefill runs dense")
    ways = [Execution.CACHE] if cost.cache_bytes_per_unit else []
    # A head is chosen for one sequence; MLP units run for the union of the tokens' selections.
    limit = KERNEL_TOKENS if ways else min(options.max_tokens, KERNEL_TOKENS)
    if tokens <= limit:
        ways.append(Execution.GATHERED)
    if not ways:
        raise _StayDenseError(f"{tokens} tokens a step are more than {limit}: prefill runs dense")
    return ways


def _cheapest(
    ways: list[Execution], policy: Policy, density: float, cost: SiteCost, tokens: int
) -> Execution:
    """The way to carry out `policy` that reads least."""
    read = {way: cost.bytes(policy, density, tokens, way) for way in ways}
    best = min(ways, key=read.__getitem__)
    if read[best] >= cost.bytes(Policy.DENSE, 1.0, tokens):
        many = f" for {tokens} tokens" if tokens > 1 else ""
        raise _StayDenseError(f"at density {density:.2f} it would read more than dense does{many}")
    return best


def _decide(
    site: Site, options: Options, resolve: Resolve, sites: SitesByWeight
) -> tuple[SitePlan, list[Relayout]]:
    weight = resolve(site.output.weight)
    attachment = attached(weight)
    predictor = attachment.predictor if attachment is not None else None
    wanted: list[Relayout] = []
    policy, density = Policy.DENSE, float("nan")
    cost = cost_of(site, site.gate, attachment.selector_bytes if attachment is not None else 0)
    try:
        if options.execution is ExecutionMode.DENSE:
            raise _StayDenseError("option dejavu.execution is 'dense'")
        ways = _executions(site, cost, options)
        execution = ways[-1]
        policy, reason = _policy(site, attachment, options)
        if policy is Policy.DENSE:
            raise _StayDenseError("calibration chose dense")
        source = None
        if attachment is not None:
            density = attachment.density
            check_fingerprint(site.name, weight, attachment.fingerprint)
            _check_inputs(site, attachment, resolve)
            _check_selector(site, attachment)
            if policy is Policy.PREDICT:
                source = _source(attachment, site, sites)
            if execution is not Execution.MASKED:
                execution = _cheapest(ways, policy, density, cost, site.num_tokens)
        elif cost.several_cost_more and site.num_tokens > 1:
            raise _StayDenseError(
                f"how many of its units are zero isn't known: dv.calibrate(model, batches) would say whether "
                f"skipping them pays for {site.num_tokens} tokens"
            )
        if execution is Execution.GATHERED:
            wanted = [
                layout
                for layout in gathered_layouts(site, policy)
                if not is_unit_major(
                    resolve(layout.weight), layout.contracted, produces_units=layout.produces_units
                )
            ]
            if wanted:
                fixed = (fixed_layout(resolve(layout.weight)) for layout in wanted)
                why = next((how for how in fixed if how is not None), None)
                raise _StayDenseError(
                    "its columns become contiguous after this first step"
                    if why is None
                    else f"its columns can't become contiguous: a weight of it {why}"
                )
        decision = Decision(
            site, policy, execution, source, predictor,
            attachment.threshold if attachment is not None else 0.0,
            attachment.sensitivity if attachment is not None else None,
            attachment.sketch if attachment is not None else None,
        )  # fmt: skip
    except _StayDenseError as why:
        decision, reason = Decision(site, Policy.DENSE, Execution.GATHERED), str(why)
    return SitePlan(decision, reason, density, cost, policy), wanted


def make_plan(found: Found, resolve: Resolve, options: Options) -> Plan:
    """Decide about each site of `found`. `resolve` gives the real tensor behind a parameter's node.

    Raises ArtifactMismatchError if a weight with something attached changed since calibration.
    """
    sites = [(resolve(site.output.weight), site) for site in found.sites]
    plans, wanted = [], []
    for site in found.sites:
        plan, layouts = _decide(site, options, resolve, sites)
        plans.append(plan)
        wanted += layouts
    return Plan(tuple(plans), tuple(dict.fromkeys(wanted)))
