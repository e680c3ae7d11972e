"""Let a value that several of our kernels read be one buffer.

    y = norm(h); gemv(reshape(y), ...); gathered_rows(reshape(y), ...)
        ->
    y = norm(h); z = as_strided(y, [m, d], [d, 1], 0); gemv(z, ...); gathered_rows(z, ...)

Inductor asks for exact strides of what a kernel of others reads. A value that is yet to be computed has none, so each
argument gets a copy: a norm wrote one for each kernel behind it. `as_strided` needs memory, and so makes it one. It matters
for more than time: a join keeps its predictor's source until the side stream has read it (`kernels/lookahead.py`), which it
can only do for the buffer that the predictor was given.
"""

from collections import defaultdict

import torch
from torch import fx

from .emit import Emitter
from .in_place import computes, written
from .separable import IDENTITY, VIEWS, aten


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
                    by_shape[read.shape] = emit.call(
                        aten.as_strided.default, base, list(read.shape), list(read.stride()), 0
                    )
            node.replace_input_with(value, by_shape[read.shape])
    if shared:
        gm.graph.eliminate_dead_code()
        gm.graph.lint()
        gm.recompile()
    return len(shared)


def _is_ours(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "dejavu"


def _viewed(value: fx.Node) -> fx.Node:
    """What `value` is another shape of."""
    while value.target in VIEWS:
        value = value.args[0]
    return value


def _is_fresh(node: fx.Node) -> bool:
    """Computed by Inductor's own code, into memory of its own."""
    if node.target in IDENTITY:  # a cast makes a new value only where it changes something
        source = node.args[0].meta["val"]
        return source.untyped_storage()._cdata != node.meta["val"].untyped_storage()._cdata
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
