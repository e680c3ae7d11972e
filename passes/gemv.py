"""Run the projections of a decode step that stay dense as GEMVs.

    linear(x, W, b)   ->   reshape(gemv(reshape(x), W, b))            for one token on CUDA

At one token a projection only reads its weight. Library GEMMs reach half of the bandwidth there when
there is a bias or the weight is small (facts: H200 numbers).
"""

from dataclasses import dataclass

import torch
from torch import fx

from .emit import Emitter
from .find_sites import as_projection
from .separable import aten, shape_of
from .site import Projection

ops = torch.ops.dejavu

# Above this many bytes a library GEMM is as near to the bandwidth as anything (facts: H200 numbers).
LIBRARY_ABOVE = 256 << 20


@dataclass(frozen=True, slots=True)
class Replaced:
    """How many projections became GEMVs."""

    count: int


def _fits(projection: Projection, max_tokens: int) -> bool:
    weight = projection.weight.meta["val"]
    tokens = 1
    for size in shape_of(projection.input)[:-1]:
        if not isinstance(size, int):
            return False
        tokens *= size
    rows_contiguous = projection.contracted == 1 and weight.stride(1) == 1
    small = weight.numel() * weight.element_size() <= LIBRARY_ABOVE
    floating = weight.is_cuda and weight.is_floating_point()
    return floating and small and tokens <= max_tokens and rows_contiguous


def use_gemv(gm: fx.GraphModule, max_tokens: int = 1) -> Replaced:
    """Replace what fits, in place."""
    emit, count = Emitter(gm), 0
    for node in list(gm.graph.nodes):
        projection = as_projection(node)
        if projection is None or not _fits(projection, max_tokens):
            continue
        with emit.before(node):
            x = emit.call(aten.reshape.default, projection.input, [-1, projection.in_features])
            y = emit.call(ops.gemv.default, x, projection.weight, projection.bias, "identity")
            y = emit.call(aten.reshape.default, y, list(shape_of(node)))
        node.replace_all_uses_with(y)
        count += 1
    if count:
        gm.graph.eliminate_dead_code()
        gm.graph.lint()
        gm.recompile()
    return Replaced(count)
