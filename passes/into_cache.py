"""Let the launch of keys and values write them into their caches.

    y = gemv(x, [Wq, Wk, Wv], ...); keys.index_copy_(2, position, heads(y[:, k])); values.index_copy_(2, position, heads(y[:, v]))
        ->
    y = gemv_into(x, [Wq, Wk, Wv], ..., keys, values, position, 1, 2)

for one token a sequence whose keys are cached as they are projected (OPT, Bloom, MPT; a rotary embedding comes between). Each
write is a launch between the projection and its attention.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from dejavu_compile._compat import unset_fake_temporarily

from .emit import Emitter
from .in_place import has_one_name, targets_of
from .separable import VIEWS, aten

ops = torch.ops.dejavu

MOVES = VIEWS | {aten.transpose.int, aten.permute.default}


@dataclass(frozen=True, slots=True)
class _Write:
    """What weight number `part` of a GEMV gives goes to `cache`, at slot `position`, and nowhere else."""

    part: int
    node: fx.Node
    cache: fx.Node
    position: fx.Node


def write_into_caches(gm: fx.GraphModule) -> int:
    """Replace in place; how many pairs of writes went."""
    emit, count = Emitter(gm), 0
    for gemv in gm.graph.find_nodes(op="call_function", target=ops.gemv.default):
        writes = list(_writes(gemv))
        if len(writes) != 2 or not _alike(gemv, *writes):
            continue
        keys, values = writes
        arguments = (*gemv.args, None, None)[:6]
        with emit.before(gemv):
            y = emit.call(
                ops.gemv_into.default, *arguments, keys.cache, values.cache, keys.position, keys.part, values.part
            )  # fmt: skip
        for write in writes:
            write.node.replace_all_uses_with(write.cache)
            gm.graph.erase_node(write.node)
        emit.replace(gemv, y)
        count += 1
    if count:
        gm.graph.eliminate_dead_code()
        gm.graph.lint()
        gm.recompile()
    return count


def _writes(gemv: fx.Node) -> Iterator[_Write]:
    """In the order of the GEMV's users."""
    if not _pays(gemv) or gemv.args[3] != "identity":
        return
    start, ranges = 0, {}
    for part, weight in enumerate(gemv.args[1]):
        stop = start + weight.meta["val"].shape[0]
        ranges[start, stop] = part
        start = stop
    for user in gemv.users:
        if user.target is not aten.slice.Tensor or user.args[1] != 1 or len(user.args) != 4:
            continue
        part = ranges.get(user.args[2:])
        write = _only_write(user)
        if part is None or write is None or not _is_by_head(gemv, user, write):
            continue
        cache, dim, position, _ = write.args
        counter = _counter(position, gemv)
        if dim == 2 and counter is not None and _is_only_written_here(cache):
            yield _Write(part, write, cache, counter)


def _pays(gemv: fx.Node) -> bool:
    """Launches are what it saves."""
    return gemv.meta["val"].is_cuda


def _only_write(part: fx.Node) -> fx.Node | None:
    """The write into a cache that a value's elements end in, if that is all that is done with them."""
    while len(part.users) == 1:
        (user,) = part.users
        if user.target is aten.index_copy_.default:
            return user if user.args[3] is part and user.args[0] is not part else None
        if user.target not in MOVES:
            return None
        part = user
    return None


def _is_by_head(gemv: fx.Node, part: fx.Node, write: fx.Node) -> bool:
    """Whether what is written is `part` as [sequences, heads, 1, head_dim], in the order in which it is computed."""
    path, node = [], write.args[3]
    while node is not part:
        path.append(node)
        node = node.args[0]
    tokens, total = gemv.meta["val"].shape
    start, stop = part.args[2:]
    if any(isinstance(a, fx.Node) for node in path for a in node.all_input_nodes[1:]):
        return False  # a shape that isn't known
    with unset_fake_temporarily():
        numbers = torch.arange(tokens * total).view(tokens, total)[:, start:stop]
        value = numbers
        for node in reversed(path):
            value = node.target(value, *node.args[1:], **node.kwargs)
        if value.dim() != 4 or value.shape[0] != tokens or value.shape[2] != 1:
            return False
        return torch.equal(value.flatten(1), numbers)


def _counter(position: fx.Node, gemv: fx.Node) -> fx.Node | None:
    """The input that counts a cache's tokens, where `position` is that number: `arange(1) + counter`."""
    read_at = max(gemv, position)
    if position.target is aten.add.Tensor and not position.kwargs:
        pair = position.args
        offsets = [a for a in pair if isinstance(a, fx.Node) and _is_zero(a)]
        others = [a for a in pair if a not in offsets]
        if len(others) != 1 or not isinstance(others[0], fx.Node):
            return None
        position = others[0]
    value = position.meta.get("val")
    if position.op != "placeholder" or not isinstance(value, torch.Tensor):
        return None
    # A kernel that is launched early reads it at once, and then it must be what `position` was made of.
    written_before = any(user < read_at for user in position.users if position in targets_of(user))
    fits = value.numel() == 1 and value.dtype is torch.int64 and not written_before
    return position if fits and has_one_name(position) else None


def _is_zero(node: fx.Node) -> bool:
    """`arange(1)`, `arange(0, 1)`."""
    starts = {aten.arange.default: (1,), aten.arange.start: (0, 1), aten.arange.start_step: (0, 1)}
    return node.target in starts and tuple(node.args[:2]) == starts[node.target]


def _is_only_written_here(cache: fx.Node) -> bool:
    """An input that nothing else in the graph reads or writes, under any name, but through what the write returns."""
    value = cache.meta.get("val")
    if cache.op != "placeholder" or len(cache.users) != 1 or value.dim() != 4:
        return False
    return has_one_name(cache)


def _alike(gemv: fx.Node, keys: _Write, values: _Write) -> bool:
    """Whether both go to one slot of caches of one layout, as the kernel writes them."""
    x, k, v = (n.meta["val"] for n in (gemv.args[0], keys.cache, values.cache))
    layouts = {(t.shape, t.stride(), t.dtype) for t in (k, v)}
    static = all(isinstance(size, int) for size in (*k.shape, *k.stride(), *x.shape))
    return (
        keys.position is values.position
        and len(layouts) == 1
        and static
        and k.stride(3) == 1
        and (k.shape[0], k.dtype) == (x.shape[0], x.dtype)
    )
