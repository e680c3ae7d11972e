"""Run the projections of a decode step that stay dense as GEMVs, those of one input together.

    q = linear(x, Wq, bq); k = linear(x, Wk, bk); v = linear(x, Wv, bv)
        ->
    y = gemv(reshape(x), [Wq, Wk, Wv], [bq, bk, bv], "identity"); q, k, v = slices of y

At one token a projection only reads its weight. Library GEMMs reach half of the H200's bandwidth there
when there is a bias or the weight is small (facts: H200 numbers), and each launch fills the chip anew.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import fx

from dejavu_compile.kernels import cpu
from dejavu_compile.kernels.gemv import MOST

from .emit import Emitter
from .find_sites import as_projection
from .separable import aten, shape_of
from .site import Projection

ops = torch.ops.dejavu

# Above this many bytes a library GEMM is as near to the bandwidth as anything (facts: H200 numbers).
LIBRARY_ABOVE = 256 << 20
# On a CPU the call into C++ takes some 20 us, in which it reads a few hundred KB.
CPU_FROM = 1 << 20


@dataclass(frozen=True, slots=True)
class Replaced:
    """How many projections became GEMVs, in how many launches."""

    count: int
    launches: int


def _fits(projection: Projection, max_tokens: int) -> bool:
    weight = projection.weight.meta["val"]
    tokens = 1
    for size in shape_of(projection.input)[:-1]:
        if not isinstance(size, int):
            return False
        tokens *= size
    if tokens > max_tokens or projection.contracted != 1 or weight.stride(1) != 1:
        return False
    num_bytes = weight.numel() * weight.element_size()
    if weight.is_cuda:
        return weight.is_floating_point() and num_bytes <= LIBRARY_ABOVE
    return num_bytes >= CPU_FROM and cpu.function("rows", weight.dtype) is not None


def _shared(projection: Projection) -> tuple[object, ...]:
    """Projections go together if this is equal: one input, one dtype, and biases that are there already."""
    bias, weight = projection.bias, projection.weight
    kind = bias is not None
    if bias is not None and bias.op not in {"placeholder", "get_attr"}:
        kind = projection.node
    return projection.input, kind, weight.meta["val"].dtype


def _as_one(emit: Emitter, group: list[Projection]) -> None:
    """Replace the projections of `group`, which share their input, by slices of one GEMV."""
    first = group[0]
    for node in [p.weight for p in group] + [p.bias for p in group if p.bias is not None]:
        if node.op == "get_attr":
            first.node.prepend(node)
    with emit.before(first.node):
        x = emit.call(aten.reshape.default, first.input, [-1, first.in_features])
        biases = [] if first.bias is None else [projection.bias for projection in group]
        weights = [projection.weight for projection in group]
        y = emit.call(ops.gemv.default, x, weights, biases, "identity")
        start = 0
        for projection in group:
            part = y
            if len(group) > 1:
                stop = start + projection.out_features
                part, start = emit.call(aten.slice.Tensor, y, 1, start, stop), stop
            part = emit.call(aten.reshape.default, part, list(shape_of(projection.node)))
            projection.node.replace_all_uses_with(part)


def use_gemv(gm: fx.GraphModule, max_tokens: int = 1) -> Replaced:
    """Replace what fits, in place."""
    groups = defaultdict(list)
    for node in gm.graph.nodes:
        projection = as_projection(node)
        if projection is not None and _fits(projection, max_tokens):
            groups[_shared(projection)].append(projection)
    emit, launches = Emitter(gm), 0
    for group in groups.values():
        for start in range(0, len(group), MOST):
            _as_one(emit, group[start : start + MOST])
            launches += 1
    if launches:
        gm.graph.eliminate_dead_code()
        gm.graph.lint()
        gm.recompile()
    return Replaced(sum(map(len, groups.values())), launches)
