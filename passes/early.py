"""What kernels read before they wait for the one before, and whether they may.

Launched early (programmatic dependent launch), a GEMV asks for its weights while the norm before it still runs,
and a sum for the columns of its units. When a kernel starts, all but the one before it have ended, because every
kernel waits before it lets the next start (`kernels._triton.wait_for_previous`). So it may read

    weights that nothing in the graph writes
    a selection, or scores, that a kernel has read which it depends on:  select -> rows -> sum
"""

import torch
from torch import fx

from .in_place import written

ops = torch.ops.dejavu

# These read a selection or scores, and only after they have waited.
READERS = {
    ops.gemv.default, ops.decode_attention.default, ops.gathered_rows.default, ops.gathered_glu.default,
}  # fmt: skip


def why_not_early(graph: fx.Graph) -> str | None:
    """Why its kernels must not be launched early, or None where they may."""
    in_place = written(graph)
    given = {_storage(n) for n in graph.nodes if n.op in {"placeholder", "get_attr"}}
    for node in graph.nodes:
        weights, chosen = _read_early(node)
        for weight in weights:
            if weight in in_place or _storage(weight) not in given:
                return (
                    f"{node.name} reads {weight.name}, a weight that the graph computes or writes"
                )
        if chosen is not None and not _read_before(chosen, node.args[0]):
            return f"nothing that {node.name} depends on reads {chosen.name} first"
    return None


def _read_early(node: fx.Node) -> tuple[list[fx.Node], fx.Node | None]:
    """The weights, and the selection or the scores, that a kernel reads before it waits."""
    if node.target is ops.gemv.default:
        return node.args[1], None
    if node.target is ops.gathered_sum.default:
        _, weight, index, _, compacted, *_ = node.args
        return [weight], index if compacted else None
    if node.target is ops.sketch_score.default:
        return node.args[1:4], None
    if node.target is ops.head_sum.default:
        return [node.args[1]], node.args[2]
    return [], None


def _read_before(chosen: fx.Node, value: fx.Node) -> bool:
    """Whether `value` is computed by a kernel that reads `chosen`, itself and not a copy of it."""
    if not chosen.meta["val"].is_contiguous():
        return False
    readers = {user for user in chosen.users if user.target in READERS}
    pending, seen = [value], set()
    while pending:
        node = pending.pop()
        if node in readers:
            return True
        if node not in seen and node > chosen:
            seen.add(node)
            pending.extend(node.all_input_nodes)
    return False


def _storage(node: fx.Node) -> int | None:
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None
