"""Attention of a decode step on a CPU by an op that reads only what the mask allows.

    scaled_dot_product_attention(q, k, v, mask)   ->   decode_attention_cpu(q, k, v, mask, scale)

for one query per sequence. All heads run: nothing is lost.
"""

from dataclasses import dataclass

import torch
from torch import fx

from dejavu_compile.kernels import cpu

from .emit import Emitter
from .separable import aten, shape_of

ops = torch.ops.dejavu
SDPA = aten.scaled_dot_product_attention.default
NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
FROM = 1 << 16  # elements of the keys: below, the call costs more than it saves


@dataclass(frozen=True, slots=True)
class Attended:
    """How many attentions were replaced."""

    count: int


def _arguments(node: fx.Node) -> dict[str, object]:
    return {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None,
            **dict(zip(NAMES, node.args, strict=False)), **node.kwargs}  # fmt: skip


def _fits(found: dict[str, object]) -> bool:
    q, k, mask = found["query"], found["key"], found["attn_mask"]
    value, keys = q.meta["val"], shape_of(k)
    if value.device.type != "cpu" or len(shape_of(q)) != 4 or shape_of(q)[2] != 1:
        return False
    if found["dropout_p"] or found["is_causal"] or cpu.function("attention", value.dtype) is None:
        return False
    if mask is not None and mask.meta["val"].dtype not in {torch.bool, value.dtype}:
        return False
    if mask is not None and len(shape_of(mask)) != 4:
        return False
    # A dynamic cache has a length without a number: it is taken to be long.
    fixed = [size for size in keys if isinstance(size, int)]
    return len(fixed) < len(keys) or torch.Size(fixed).numel() >= FROM


def use_decode_attention(gm: fx.GraphModule) -> Attended:
    """Replace what fits, in place."""
    emit, count = Emitter(gm), 0
    for node in gm.graph.find_nodes(op="call_function", target=SDPA):
        found = _arguments(node)
        if not _fits(found):
            continue
        q, k, v = found["query"], found["key"], found["value"]
        scale = found["scale"] if found["scale"] is not None else shape_of(q)[3] ** -0.5
        with emit.before(node):
            y = emit.call(ops.decode_attention_cpu.default, q, k, v, found["attn_mask"], scale)
        node.replace_all_uses_with(y)
        gm.graph.erase_node(node)
        count += 1
    if count:
        gm.graph.lint()
        gm.recompile()
    return Attended(count)
