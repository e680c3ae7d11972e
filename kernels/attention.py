"""Attention of one query per sequence over a cache that is read in place.

    y[b, h] = softmax(scale * q[b, h] @ k[b, g].T + mask) @ v[b, g],    g = h * kv_heads // heads

Slots that the mask rules out are not read: a static cache costs what it holds, not what it could hold.
PyTorch's CPU kernel reads them all, and is made for many queries.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """q [b, h, 1, d]; k [b, g, s, d], v [b, g, s, e], where g divides h, last dim contiguous.

    mask broadcasts to [b, h, 1, s]: bool (True: attend) or added to the scores. Returns [b, h, 1, e] of
    q's dtype, accumulated in fp32; zero where nothing may be attended.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1).float() for x in (k, v))
    score = scale * q.float() @ k.mT
    if mask is not None:
        boolean = mask.dtype is torch.bool
        score = score.masked_fill(~mask, float("-inf")) if boolean else score + mask.float()
    weight = score.softmax(dim=-1).masked_fill((score == float("-inf")).all(-1, keepdim=True), 0.0)
    return (weight @ v).to(q.dtype)


def _fake_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[3])


@cpu.cpu_op("dejavu::decode_attention_cpu", _fake_attention)
def decode_attention_cpu(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """See `attention_reference`; PyTorch's where there is no C++ form."""
    y = cpu.attended(q, k, v, mask, scale)
    if y is not None:
        return y
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True).clone()
