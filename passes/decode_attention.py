"""Attention of a decode step by an op that reads the cache in place, and only what the mask allows.

    scaled_dot_product_attention(q, expand(k), expand(v), mask)   ->   decode_attention(q, k, v, mask, ...)

for one query per sequence, and for attention that is spelled out. All heads run: nothing is lost.
"""

from dataclasses import dataclass

import torch
from torch import fx

from dejavu_compile.kernels import cpu

from .emit import Emitter
from .read_attention import Attention, as_decode_attention, emit_attention
from .separable import shape_of

FROM = 1 << 16  # elements of the keys: below, the call costs more than it saves


@dataclass(frozen=True, slots=True)
class Attended:
    """How many attentions were replaced."""

    count: int


def _fits(found: Attention) -> bool:
    value = found.q.meta["val"]
    if value.is_cuda:
        # A grid of a number that only the GPU knows would be compiled again for each length.
        return all(isinstance(size, int) for size in (*shape_of(found.q), *shape_of(found.k)))
    if cpu.function("attention", value.dtype) is None:
        return False
    # A dynamic cache has a length without a number: it is taken to be long.
    keys = shape_of(found.k)
    fixed = [size for size in keys if isinstance(size, int)]
    return len(fixed) < len(keys) or torch.Size(fixed).numel() >= FROM


def use_decode_attention(gm: fx.GraphModule) -> Attended:
    """Replace what fits, in place."""
    emit, count = Emitter(gm), 0
    for node in tuple(gm.graph.nodes):
        found = as_decode_attention(node)
        if found is not None and _fits(found):
            emit_attention(emit, found, None)
            count += 1
    if count:
        gm.graph.eliminate_dead_code()
        gm.graph.lint()
        gm.recompile()
    return Attended(count)
