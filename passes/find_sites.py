"""Find the sites of a graph: regions that are separable along the axis an output projection contracts.

    h = act(x @ Wg.T) * (x @ Wu.T);  y = h @ Wo.T     ->     Site(units=len(h), leaves=[Wg, Wu], output=Wo)

From each projection, walk back from its input along the contracted axis through separable ops. The
walk ends at leaves: projections whose output features are the axis, parameters along it, and values
that something outside the region reads too, or that aren't separable: those are computed in full. Where
no projection is among the leaves, what the walk met first is the reason for having no site.
Nothing here knows an architecture, and the graph is not changed. (design: "the separable axis")
"""

import operator
import re
from dataclasses import dataclass, replace

import torch
from torch import fx

from dejavu_compile._compat import qualified_name

from .find_heads import find_heads
from .in_place import written
from .lone_attention import find_lone_attention
from .others import find_others, op_name
from .separable import (
    ATTENTION,
    NONLINEAR_EXEMPT,
    aten,
    is_pointwise,
    keeps_zero,
    produces_zeros,
    same_size,
    separable_inputs,
    shape_of,
)
from .site import Carrier, Found, Leaf, LeafKind, NoSite, Projection, Site, SiteKind, Unmatched

TRANSPOSES = {aten.t.default, aten.numpy_T.default, aten.mT.default}
SAME_VALUE = {aten.detach.default, aten.alias.default}


# --- projections -----------------------------------------------------------------------------------


def _transposes(node: fx.Node, rank: int) -> bool:
    """Swaps the two dims of a matrix, however it is spelled."""
    if node.target is aten.transpose.int:
        return {d % rank for d in node.args[1:3]} == {0, 1}
    if node.target is aten.permute.default:
        return [d % rank for d in node.args[1]] == [1, 0]
    return node.target in TRANSPOSES


def _parameter(node: object) -> tuple[fx.Node, bool] | None:
    """The 2-D parameter behind a weight argument, and whether it is transposed on the way."""
    transposed = False
    while isinstance(node, fx.Node) and node.op == "call_function":
        rank = len(shape_of(node) or ())
        if _transposes(node, rank):
            transposed = not transposed
        elif node.target not in SAME_VALUE:
            return None
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.op not in ("placeholder", "get_attr"):
        return None
    if len(shape_of(node) or ()) != 2 or not all(isinstance(s, int) for s in shape_of(node)):
        return None
    return node, transposed


def as_projection(node: fx.Node) -> Projection | None:
    """Read a node as `input @ weight (+ bias)` with a parameter for weight, or None."""
    if node.op != "call_function":
        return None
    bias = None
    if node.target is aten.linear.default:
        source, weight, contracted = node.args[0], node.args[1], 1
        bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    elif node.target is aten.addmm.default:
        if any(node.kwargs.get(k, 1) != 1 for k in ("alpha", "beta")):
            return None
        bias, source, weight = node.args[:3]
        contracted = 0
        if len(shape_of(bias) or ()) != 1:
            return None
    elif node.target in (aten.mm.default, aten.matmul.default):
        source, weight = node.args[:2]
        contracted = 0
    else:
        return None
    found = _parameter(weight)
    if found is None or not shape_of(source):
        return None
    parameter, transposed = found
    contracted = 1 - contracted if transposed else contracted
    shape = shape_of(parameter)
    if shape_of(source)[-1] != shape[contracted]:
        return None
    dtypes = {n.meta["val"].dtype for n in (node, source, parameter)}
    if len(dtypes) > 1:
        return None  # autocast casts when an op runs, and our ops in its place would not
    return Projection(
        node=node,
        input=source,
        weight=parameter,
        bias=bias,
        contracted=contracted,
        in_features=shape[contracted],
        out_features=shape[1 - contracted],
        name=qualified_name(parameter) or str(parameter.target),
    )


# --- rows that a value takes from a projection -------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Rows:
    """`node[..., u]` is row `offset + step * u` of `projection`; `chain` lies between the two."""

    projection: Projection
    offset: int
    step: int
    chain: tuple[fx.Node, ...]


def _rows(node: fx.Node, dim: int) -> _Rows | None:
    """Read a value as a strided slice of a projection's output features along `dim`."""
    offset, step, chain = 0, 1, []
    while True:
        rank = len(shape_of(node) or ())
        projection = as_projection(node)
        if projection is not None:
            return _Rows(projection, offset, step, tuple(chain)) if dim == rank - 1 else None
        chain.append(node)
        if node.target is operator.getitem:
            split, index = node.args
            chain.append(split)
            start = _split_start(split, index, dim)
            if start is None:
                return None
            offset, node = start + offset, split.args[0]
        elif node.target is aten.slice.Tensor:
            start, stride = _slice_start(node, dim)
            if start is None:
                return None
            offset, step, node = start + stride * offset, step * stride, node.args[0]
        elif node.target is aten.select.int:
            piece = _select_start(node, dim)
            if piece is None:
                return None
            start, stride, node = piece
            chain.append(node)
            offset, step, node = start + stride * offset, step * stride, node.args[0]
            dim = len(shape_of(node)) - 1
        else:
            inputs = None if is_pointwise(node) else separable_inputs(node, dim)
            if not inputs:
                return None
            node, dim = inputs[0].node, inputs[0].dim


def _split_start(split: fx.Node, index: int, dim: int) -> int | None:
    """Where piece `index` of a chunk or split along `dim` begins."""
    source = shape_of(split.args[0]) if split.args and isinstance(split.args[0], fx.Node) else None
    if split.target not in (
        aten.chunk.default,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.split.sizes,
    ):
        return None
    along = split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0)
    if source is None or along % len(source) != dim:
        return None
    sizes = [piece.shape[dim] for piece in split.meta["val"][:index]]
    return sum(sizes) if all(isinstance(s, int) for s in sizes) else None


def _select_start(node: fx.Node, dim: int) -> tuple[int, int, fx.Node] | None:
    """Start and step of x.view(..., 2, units)[..., i, :] or x.view(..., units, 2)[..., i], and the view."""
    view, along, index = node.args
    pieces, rank = shape_of(view), len(shape_of(view))
    along %= rank
    if view.target not in VIEWS_THAT_SPLIT | {aten.unflatten.int} or not isinstance(index, int):
        return None
    whole = shape_of(view.args[0])
    if dim != rank - 2 or along < rank - 2 or not all(isinstance(s, int) for s in pieces[-2:]):
        return None
    if whole[-1] != pieces[-1] * pieces[-2] or not same_size(whole[:-1], pieces[:-2]):
        return None
    index %= pieces[along]
    return (index * pieces[-1], 1, view) if along == rank - 2 else (index, pieces[-1], view)


def _slice_start(node: fx.Node, dim: int) -> tuple[int | None, int]:
    """Start and step of a slice along `dim` (0 and 1 for a slice along another dim)."""
    source, along, start, _, step = (*node.args, *(0, None, None, 1)[len(node.args) - 1 :])
    shape = shape_of(source)
    if along % len(shape) != dim:
        return 0, 1
    start = 0 if start is None else start
    if not isinstance(start, int) or not isinstance(shape[dim], int):
        return None, 1
    return (start + shape[dim] if start < 0 else start), step


# --- the walk ----------------------------------------------------------------------------------------


class _NoSiteError(Exception):
    """Ends a walk with the reason why there is no site. Never leaves this module."""

    def __init__(self, code: NoSite, reason: str) -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


@dataclass(frozen=True, slots=True)
class _Region:
    """`blocked`: why the walk went no further, where it first met something that isn't separable."""

    interior: dict[fx.Node, int]
    leaves: dict[fx.Node, int]
    blocked: _NoSiteError | None = None


def _walk(output: Projection, escaping: set[fx.Node], in_place: frozenset[fx.Node]) -> _Region:
    """Everything separable behind `output.input`, ending at rows, parameters and `escaping` values."""
    interior: dict[fx.Node, int] = {}
    leaves: dict[fx.Node, int] = {}
    blocked = None
    root = (output.input, len(shape_of(output.input)) - 1)
    pending = [root]
    while pending:
        node, dim = pending.pop()
        known = interior.get(node, leaves.get(node))
        if known is not None:
            if known != dim:
                raise _NoSiteError(NoSite.NOT_SEPARABLE, f"{node} is read along two of its axes")
            continue
        if node in in_place:
            raise _NoSiteError(NoSite.NOT_SEPARABLE, f"{node} is written in place")
        if (
            node in escaping
            or _rows(node, dim) is not None
            or node.op in ("placeholder", "get_attr")
        ):
            leaves[node] = dim
            continue
        inputs = separable_inputs(node, dim)
        if inputs is None:
            why = _no_site(node, node is output.input)
            if node is output.input or node.target in VIEWS_THAT_SPLIT:  # heads, likely
                raise why
            leaves[node], blocked = dim, blocked or why
            continue
        interior[node] = dim
        pending.extend((found.node, found.dim) for found in inputs)
    return _Region(interior, leaves, blocked)


def _no_site(node: fx.Node, immediate: bool) -> _NoSiteError:
    """The reason that a value in the way of the walk gives."""
    op = op_name(node)
    if node.target in VIEWS_THAT_SPLIT:
        return _NoSiteError(
            NoSite.ATTENTION,
            f"its input merges two axes ({op})",
        )
    if node.target in ATTENTION:
        return _NoSiteError(
            NoSite.ATTENTION,
            f"its input comes from attention ({op})",
        )
    if immediate or "norm" in op or op.startswith(("add", "mean", "embedding")):
        return _NoSiteError(
            NoSite.RESIDUAL,
            f"its input is the residual stream ({op}), of which every element counts",
        )
    return _NoSiteError(NoSite.NOT_SEPARABLE, f"{op} mixes the units of its input")


VIEWS_THAT_SPLIT = {aten.view.default, aten.reshape.default, aten._unsafe_view.default,
                    aten.flatten.using_ints}  # fmt: skip


def _region(output: Projection, in_place: frozenset[fx.Node]) -> _Region:
    """The largest region in which no interior value is read from outside."""
    escaping: set[fx.Node] = set()
    blocked = None
    while True:
        region = _walk(output, escaping, in_place)
        blocked = blocked or region.blocked
        inside = {*region.interior, output.node}
        found = {node for node in region.interior if not inside.issuperset(node.users)}
        if not found:
            return replace(region, blocked=blocked)
        nearest = max(found)
        reader = next(user for user in nearest.users if user not in inside)
        blocked = blocked or _NoSiteError(
            NoSite.SHARED, f"every unit counts: {op_name(reader)} reads them too"
        )
        escaping |= found


def _leaf(
    node: fx.Node, dim: int, region: _Region, output: Projection, outputs: frozenset[fx.Node],
    in_place: frozenset[fx.Node],
) -> Leaf:  # fmt: skip
    """Classify where the region begins."""

    def inside(user: fx.Node) -> bool:
        return user in region.interior or user is output.node

    if node.op in ("placeholder", "get_attr") and len(shape_of(node)) == 1:
        return Leaf(LeafKind.VECTOR, node, dim)
    rows = _rows(node, dim)
    if rows is None or dim != len(shape_of(node)) - 1:
        return Leaf(LeafKind.DENSE, node, dim)
    if rows.projection.node in outputs or rows.projection.operands & in_place:
        return Leaf(LeafKind.DENSE, node, dim)
    if not all(map(inside, node.users)):
        return Leaf(LeafKind.DENSE, node, dim)
    # The pieces of a fused projection count as its own readers while each lies in the region.
    chain, pieces = set(rows.chain), [rows.projection.node]
    while pieces:
        piece = pieces.pop()
        for user in piece.users:
            if inside(user):
                continue
            reads_rows = user in chain or any(
                other is user or user in (r.chain if (r := _rows(other, d)) else ())
                for other, d in region.leaves.items()
            )
            if not reads_rows:
                return Leaf(LeafKind.DENSE, node, dim, rows.projection, rows.offset, rows.step)
            pieces.append(user)
    return Leaf(LeafKind.ROWS, node, dim, rows.projection, rows.offset, rows.step)


# --- carriers ----------------------------------------------------------------------------------------


def _carriers(
    interior: tuple[fx.Node, ...], region: _Region, leaves: tuple[Leaf, ...], hidden: fx.Node
) -> tuple[Carrier | None, Carrier | None]:
    """The carriers for `exact` and for `gate`: which zeros silence a unit, and what they spare."""
    row_leaves = {leaf.node for leaf in leaves if leaf.kind is LeafKind.ROWS}
    needs: dict[fx.Node, frozenset[fx.Node]] = {}
    bent: dict[fx.Node, bool] = {}
    for node in interior:
        inputs = node.all_input_nodes
        needs[node] = frozenset(
            leaf for i in inputs for leaf in (needs.get(i, frozenset()) | ({i} & row_leaves))
        )
        bent[node] = node.target not in NONLINEAR_EXEMPT or any(bent.get(i, False) for i in inputs)

    def silences(start: int) -> bool:
        zero = {interior[start]}
        for node in interior[start + 1 :]:
            if keeps_zero(node, zero):
                zero.add(node)
        return hidden in zero

    candidates = [
        Carrier(node, region.interior[node], needs[node])
        for i, node in enumerate(interior)
        if bent[node] and needs[node] and silences(i)
    ]
    if not candidates:
        return None, None
    # What spares most comes first; among equals the latest, which has the whole activation behind it.
    order = {node: i for i, node in enumerate(interior)}
    ranked = sorted(candidates, key=lambda c: (len(c.needs), -order[c.node]))
    exact = next((c for c in ranked if _has_zeros(c.node, interior)), None)
    return exact, ranked[0]


def _has_zeros(node: fx.Node, interior: tuple[fx.Node, ...]) -> bool:
    """Some op at or before `node` produces exact zeros that reach `node`."""
    zero: set[fx.Node] = set()
    for candidate in interior:
        if produces_zeros(candidate) or keeps_zero(candidate, zero):
            zero.add(candidate)
        if candidate is node:
            return node in zero
    return False


# --- the pass ----------------------------------------------------------------------------------------


def layer_of(name: str, ordinal: int) -> int:
    """The layer number in a qualified name (`model.layers.7.mlp.down_proj.weight`), else the ordinal."""
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", name)
    return int(numbers[0]) if numbers else ordinal


def _site(
    output: Projection, ordinal: int, outputs: frozenset[fx.Node], in_place: frozenset[fx.Node]
) -> Site:
    """The site of an output projection, or `_NoSiteError`.

    `outputs` are the output projections of earlier sites: their rows can't be skipped a second time.
    """
    value = output.input.meta["val"]
    changing = (output.operands - {output.input}) & in_place
    if changing:
        raise _NoSiteError(NoSite.NOT_SEPARABLE, f"{min(changing)} is written in place")
    region = _region(output, in_place)
    interior = tuple(sorted(region.interior))
    leaves = tuple(
        _leaf(node, dim, region, output, outputs, in_place) for node, dim in region.leaves.items()
    )
    if not interior or all(node.target in NONLINEAR_EXEMPT for node in interior):
        if len(region.leaves) == 1 and not interior and not _rows(output.input, value.dim() - 1):
            raise _no_site(output.input, True)
        if region.blocked is not None:
            raise region.blocked
        raise _NoSiteError(NoSite.LINEAR, "no activation between it and the projection before it")
    if not any(leaf.kind is LeafKind.ROWS for leaf in leaves):
        raise region.blocked or _NoSiteError(
            NoSite.SHARED, "everything it could skip is read elsewhere too"
        )
    exact, gate = _carriers(interior, region, leaves, output.input)
    return Site(
        kind=SiteKind.MLP,
        layer=layer_of(output.name, ordinal),
        units=output.in_features,
        output=output,
        leaves=leaves,
        interior=interior,
        dims=dict(region.interior),
        exact=exact,
        gate=gate,
    )


def _attention(output: Projection, ordinal: int, in_place: frozenset[fx.Node]) -> Site | str:
    """The site of an output projection whose input is attention, or the reason that there is none."""
    found = find_heads(output, as_projection, in_place)
    if isinstance(found, str):
        return found
    units, owned, attended, cores = found
    return Site(
        kind=SiteKind.ATTENTION, layer=layer_of(output.name, ordinal), units=units, output=output,
        leaves=(), interior=(), dims={}, exact=None, gate=None, owned=owned, attended=attended,
        cores=cores,
    )  # fmt: skip


def find_sites(gm: fx.GraphModule) -> Found:
    """Every projection of a normalised graph, as the output of a site or as unmatched with its reason."""
    sites: list[Site] = []
    unmatched: list[Unmatched] = []
    in_place = written(gm.graph)
    for node in gm.graph.nodes:
        projection = as_projection(node)
        if projection is None:
            continue
        try:
            outputs = frozenset(site.output.node for site in sites)
            sites.append(_site(projection, len(sites), outputs, in_place))
        except _NoSiteError as no:
            code, reason = no.code, no.reason
            if code is NoSite.ATTENTION:
                heads = _attention(projection, len(sites), in_place)
                if isinstance(heads, Site):
                    sites.append(heads)
                    continue
                reason = f"{reason}: {heads}"
            unmatched.append(Unmatched(projection, code, reason))
    lone = find_lone_attention(gm, sites, unmatched, as_projection)
    inputs = {projection.node for site in sites for projection in site.projections}
    unmatched = [u for u in unmatched if u.projection.node not in inputs]
    return Found(tuple(sites), tuple(unmatched), find_others(gm, as_projection), lone)


def resolve(gm: fx.GraphModule, node: fx.Node, inputs: dict[fx.Node, object]) -> torch.Tensor:
    """The real tensor behind a parameter's node: an example input, or an attribute of `gm`."""
    if node.op == "placeholder":
        return inputs[node]
    value: object = gm
    for key in str(node.target).split("."):
        value = getattr(value, key)
    return value
