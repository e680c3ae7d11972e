"""Let a value that several of our kernels read be one buffer.

    y = norm(h); gemv(reshape(y), ...); gathered_rows(reshape(y), ...)
        ->
    y = norm(h); z = as_strided(y, [m, d], [d, 1], 0); gemv(z, ...); gathered_rows(z, ...)

Inductor asks for exact strides of what a kernel of others reads. A value that is yet to be computed has none, so each
argument gets a copy: a norm wrote one for each kernel behind it. `as_strided` needs memory, and so makes it one. It matters
for more than time: a join keeps its predictor's source until the side stream has read it (`kernels/lookahead.py`), which it
can only do for the buffer that the predictor was given. So a source that isn't such a value is copied into one.
"""

from collections import defaultdict

import torch
from torch import fx

from dejavu_compile._compat import storage_id

from .emit import Emitter
from .in_place import computes, written
from .separable import IDENTITY, VIEWS, aten

ops = torch.ops.dejavu


def one_buffer(gm: fx.GraphModule) -> int:
    """Replace what kernels read, in place; how many values became one buffer."""
    readers: dict[fx.Node, list[tuple[fx.Node, fx.Node]]] = defaultdict(list)
    in_place = written(gm.graph)
    for node in gm.graph.nodes:
        if not _is_ours(node):
            continue
        for value in node.all_input_nodes:
            base = _viewed(value)
            if base not in in_place and _is_fresh(base) and _is_plain(base) and _is_plain(value):
                readers[base].append((node, value))
    shared = {base: found for base, found in readers.items() if len(found) > 1}
    emit = Emitter(gm)
    for base, found in shared.items():
        by_shape: dict[tuple[int, ...], fx.Node] = {}
        for node, value in found:
            read = value.meta["val"]
            if read.shape not in by_shape:
                with emit.before(base.next):
                    by_shape[read.shape] = _in_memory(emit, base, read)
            node.replace_input_with(value, by_shape[read.shape])
    copied = _copy_sources(emit)
    if shared or copied:
        gm.graph.eliminate_dead_code()
        gm.graph.lint()
        gm.recompile()
    return len(shared) + copied


def _in_memory(emit: Emitter, base: fx.Node, read: torch.Tensor) -> fx.Node:
    """`base` in the shape of `read`, as a buffer."""
    return emit.call(aten.as_strided.default, base, list(read.shape), list(read.stride()), 0)


def _copy_sources(emit: Emitter) -> int:
    """Where a predictor on the side stream reads something else (a slice, what one of our kernels leaves), copy that; how many."""
    begins = [n for n in emit.graph.nodes if n.target is ops.select_begin.default]
    joins = {n.args[4]: n for n in emit.graph.nodes if n.target is ops.select_join.default}
    found = [
        n
        for n in begins
        if n.args[0].op != "placeholder" and n.args[0].target is not aten.as_strided.default
    ]
    for begin in found:
        source, join = begin.args[0], joins[begin.args[4]]
        with emit.before(begin):
            copy = emit.call(aten.clone.default, source, memory_format=torch.contiguous_format)
            copy = _in_memory(emit, copy, copy.meta["val"])
        begin.replace_input_with(source, copy)
        join.replace_input_with(source, copy)
    return len(found)


def _is_ours(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "dejavu"


def _viewed(value: fx.Node) -> fx.Node:
    """What `value` is another shape of, or a cast that changes nothing."""
    while value.target in VIEWS or (value.target in IDENTITY and not _is_cast(value)):
        value = value.args[0]
    return value


def _is_cast(node: fx.Node) -> bool:
    """An op that keeps its values makes new ones: it does only where it changes something."""
    return storage_id(node.args[0].meta["val"]) != storage_id(node.meta["val"])


def _is_fresh(node: fx.Node) -> bool:
    """Computed by Inductor's own code, into memory of its own."""
    if node.target in IDENTITY:
        return _is_cast(node)
    return computes(node) and not _is_ours(node)


def _is_plain(node: fx.Node) -> bool:
    """A contiguous tensor of known shape."""
    value = node.meta.get("val")
    return (
        isinstance(value, torch.Tensor)
        and all(isinstance(size, int) for size in value.shape)
        and value.is_contiguous()
        and value.storage_offset() == 0
    )
