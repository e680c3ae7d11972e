"""What kernels read before they wait for the one before, and whether they may.

Launched early (programmatic dependent launch), the programs of a kernel take what room the one before leaves, ask for
their weights, and wait. Most let the next kernel start before they wait themselves, so that several are under way at
once. Some wait first, and what starts after one of these may take for granted all that had been computed until then.
So before it waits a kernel may read

    weights that nothing in the graph writes
    a selection, or scores, once a kernel that waits first depends on them:  select -> rows -> sum
    a selection of the side stream, once the join has waited for it:  begin, ..., join -> rows -> sum
    (in a CUDA graph that is an edge to the rows, so the launch that makes the list lets nothing start before its end)

Sums by unit always wait first. Gathered rows do unless their selections are of the side stream; GEMVs that skip rows of heads, and
attention that skips heads, where nothing else comes between scores and their last reader.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from dejavu_compile._compat import storage_id
from dejavu_compile.kernels import EARLY, HEADS_START, ROWS_START

from .in_place import written
from .separable import VIEWS, aten, computed_from

ops = torch.ops.dejavu

MAYBE_VIEWS = VIEWS | {aten.slice.Tensor}
GEMVS = {ops.gemv.default, ops.gemv_into.default}
# Positions among the arguments: of scores,
SCORES = {**dict.fromkeys(GEMVS, 5), ops.decode_attention.default: 6}
ROWS = {ops.gathered_rows.default: 3, ops.gathered_glu.default: 5}  # of the selection,
# and of weights and biases that rows read as early as a selection
OF_ROWS = {ops.gathered_rows.default: (1, 2), ops.gathered_glu.default: (1, 2, 4)}


@dataclass(frozen=True, slots=True)
class EarlyLaunch:
    """How a graph's kernels may be launched early, their EARLY: 0 for not at all, and why not."""

    mode: int
    reason: str | None = None


def early_launch(graph: fx.Graph) -> EarlyLaunch:
    """The mode in which most kernels overlap."""
    given, reason = _given(graph), None
    for mode in _modes(graph):
        reason = _computed(graph, mode, given) or _unsettled(graph, mode, given)
        if reason is None:
            return EarlyLaunch(mode)
    return EarlyLaunch(0, reason)


def _modes(graph: fx.Graph) -> Iterator[int]:
    """The one first in which most kernels overlap."""
    if any(node.target in ROWS for node in graph.nodes):
        yield EARLY | HEADS_START | ROWS_START
        yield EARLY | ROWS_START
    yield EARLY | HEADS_START
    yield EARLY


def _waits_first(node: fx.Node, mode: int) -> bool:
    """Whether a kernel waits before it lets the next one start."""
    if node.target in ROWS:
        return not mode & ROWS_START
    if node.target is ops.gathered_sum.default:
        return not node.args[4]
    at = SCORES.get(node.target)
    skips_heads = at is not None and len(node.args) > at and node.args[at] is not None
    return skips_heads and not mode & HEADS_START


def _weights_read_early(node: fx.Node, mode: int) -> list[fx.Node]:
    """Weights and biases."""
    if node.target in GEMVS:
        return [*node.args[1], *(bias for bias in node.args[2] if bias is not None)]
    if node.target in ROWS:
        found = [node.args[at] for at in OF_ROWS[node.target]] if mode & ROWS_START else []
        return [weight for weight in found if weight is not None]
    if node.target in {ops.gathered_sum.default, ops.head_sum.default}:
        return [node.args[1]]
    if node.target in {ops.sketch_score.default, ops.select.default}:
        return node.args[1:4]
    if node.target is ops.compact.default:
        return [scale for scale in node.args[2:] if scale is not None]
    return []


def _given(graph: fx.Graph) -> set[int | None]:
    """The memory that is filled before the graph, and that nothing in it writes."""
    inputs = {_storage(n) for n in graph.nodes if n.op in {"placeholder", "get_attr"}}
    return inputs - {_storage(n) for n in written(graph)}


def _computed(graph: fx.Graph, mode: int, given: set[int | None]) -> str | None:
    """A weight that is read early and may not be there by then."""
    for node in graph.nodes:
        for weight in _weights_read_early(node, mode):
            if _storage(weight) not in given:
                return (
                    f"{node.name} reads {weight.name}, a weight that the graph computes or writes"
                )
            value = weight.meta["val"]
            if value.dim() == 1 and not value.is_contiguous():
                return f"{node.name} reads {weight.name}, of which its launch makes a copy"
    return None


def _selection_read_early(node: fx.Node, mode: int) -> fx.Node | None:
    """The selection or the scores that a kernel reads before it waits."""
    if node.target in ROWS:
        return node.args[ROWS[node.target]] if mode & ROWS_START else None
    if node.target is ops.gathered_sum.default and node.args[4]:
        return node.args[2]
    return node.args[2] if node.target is ops.head_sum.default else None


def _unsettled(graph: fx.Graph, mode: int, given: set[int | None]) -> str | None:
    """What is read early that may not have been computed by then."""
    for node in graph.nodes:
        chosen = _selection_read_early(node, mode)
        if chosen is not None and not _settled(chosen, node.args[0], mode, given):
            return f"{node.name} reads {chosen.name} early, and no kernel in between waits first"
    return None


def _settled(chosen: fx.Node, value: fx.Node, mode: int, given: set[int | None]) -> bool:
    """Whether `chosen` is there: given, joined, or read by a kernel that waits first and that `value` depends on."""
    origin, as_read = _origin(chosen)
    if not as_read.is_contiguous():
        return False  # its reader makes a copy, just before it
    if _storage(origin) in given or any(_joins(user, origin) for user in origin.users):
        return True
    return any(
        _waits_first(node, mode) and origin in computed_from(node, origin)
        for node in computed_from(value, origin)
    )


def _joins(node: fx.Node, index: fx.Node) -> bool:
    """Whether `node`, which comes before every reader, waits until the side stream has made this selection.

    Of a source in pieces the predictor runs in line (`kernels/lookahead.py`).
    """
    if node.target is not ops.select_join.default or node.args[0] is not index:
        return False
    return node.args[3].meta["val"].is_contiguous()


def _origin(node: fx.Node) -> tuple[fx.Node, torch.Tensor]:
    """The op that wrote the memory of which `node` is a view, and that view: `meta` may be of before its input was replaced."""
    if node.target not in MAYBE_VIEWS:
        return node, node.meta["val"]
    origin, base = _origin(node.args[0])
    arguments = fx.map_arg(node.args[1:], lambda n: n.meta["val"])
    with base.fake_mode:
        view = node.target(base, *arguments, **node.kwargs)
    return (origin, view) if storage_id(view) == storage_id(base) else (node, view)


def _storage(node: fx.Node) -> int | None:
    value = node.meta.get("val")
    return storage_id(value) if isinstance(value, torch.Tensor) else None
