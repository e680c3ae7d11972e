"""What kernels read before they wait for the one before, and whether they may.

Launched early (programmatic dependent launch), the programs of a kernel take what room the one before leaves, ask for
their weights, and wait. Most let the next kernel start before they wait themselves, so that several are under way at
once. Some wait first, and what starts after one of these may take for granted all that had been computed until then.
So before it waits a kernel may read

    weights that nothing in the graph writes
    a selection, or scores, once a kernel that waits first depends on them:  select -> rows -> sum

Gathered rows wait first, and sums by unit. GEMVs that skip rows of heads, and attention that skips heads, do so where nothing
else comes between scores and their last reader, as where an MLP is dense.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from dejavu_compile.kernels import HEADS_START, HEADS_WAIT

from .in_place import written
from .separable import VIEWS, aten, computed_from

ops = torch.ops.dejavu

MAYBE_VIEWS = VIEWS | {aten.slice.Tensor}
SCORES = {ops.gemv.default: 5, ops.decode_attention.default: 6}  # position among the arguments


@dataclass(frozen=True, slots=True)
class EarlyLaunch:
    """How a graph's kernels may be launched early, their EARLY: 0 for not at all, and why not."""

    mode: int
    reason: str | None = None


def early_launch(graph: fx.Graph) -> EarlyLaunch:
    """The mode in which most kernels overlap."""
    in_place = written(graph)
    given = {_storage(n) for n in graph.nodes if n.op in {"placeholder", "get_attr"}}
    for node in graph.nodes:
        for weight in _weights_read_early(node):
            if weight in in_place or _storage(weight) not in given:
                return EarlyLaunch(
                    0,
                    f"{node.name} reads {weight.name}, a weight that the graph computes or writes",
                )
    reason = None
    for mode, waits_first in ((HEADS_START, _waits_first), (HEADS_WAIT, _or_skips_heads)):
        reason = _unsettled(graph, waits_first)
        if reason is None:
            return EarlyLaunch(mode)
    return EarlyLaunch(0, reason)


def _waits_first(node: fx.Node) -> bool:
    """Whether a kernel waits before it lets the next one start, in either mode."""
    sums_by_unit = node.target is ops.gathered_sum.default and not node.args[4]
    return sums_by_unit or node.target in {ops.gathered_rows.default, ops.gathered_glu.default}


def _or_skips_heads(node: fx.Node) -> bool:
    """Likewise where those that skip heads wait first too."""
    at = SCORES.get(node.target)
    return _waits_first(node) or (
        at is not None and len(node.args) > at and node.args[at] is not None
    )


def _weights_read_early(node: fx.Node) -> list[fx.Node]:
    if node.target is ops.gemv.default:
        return node.args[1]
    if node.target in {ops.gathered_sum.default, ops.head_sum.default}:
        return [node.args[1]]
    if node.target is ops.sketch_score.default:
        return node.args[1:4]
    if node.target is ops.compact.default:
        return [scale for scale in node.args[2:] if scale is not None]
    return []


def _selection_read_early(node: fx.Node) -> fx.Node | None:
    """The selection or the scores that a kernel reads before it waits."""
    if node.target is ops.gathered_sum.default and node.args[4]:
        return node.args[2]
    return node.args[2] if node.target is ops.head_sum.default else None


def _unsettled(graph: fx.Graph, waits_first: Callable[[fx.Node], bool]) -> str | None:
    """What is read early that may not have been computed by then."""
    for node in graph.nodes:
        chosen = _selection_read_early(node)
        if chosen is not None and not _settled(chosen, node.args[0], waits_first):
            return f"{node.name} reads {chosen.name} early, and no kernel in between waits first"
    return None


def _settled(chosen: fx.Node, value: fx.Node, waits_first: Callable[[fx.Node], bool]) -> bool:
    """Whether a kernel that waits first depends on `chosen`, and `value` on that kernel."""
    origin, as_read = _origin(chosen)
    if not as_read.is_contiguous():
        return False  # its reader makes a copy, just before it
    return any(
        waits_first(node) and origin in computed_from(node, origin)
        for node in computed_from(value, origin)
    )


def _origin(node: fx.Node) -> tuple[fx.Node, torch.Tensor]:
    """The op that wrote the memory of which `node` is a view, and that view: `meta` may be of before its input was replaced."""
    if node.target not in MAYBE_VIEWS:
        return node, node.meta["val"]
    origin, base = _origin(node.args[0])
    arguments = fx.map_arg(node.args[1:], lambda n: n.meta["val"])
    with base.fake_mode:
        view = node.target(base, *arguments, **node.kwargs)
    shared = view.untyped_storage()._cdata == base.untyped_storage()._cdata
    return (origin, view) if shared else (node, view)


def _storage(node: fx.Node) -> int | None:
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None
