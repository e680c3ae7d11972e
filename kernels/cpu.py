"""The C++ forms of the ops, for CPUs: built once on the first call, by Inductor's own toolchain.

Where there is no compiler, or for a layout that they don't read, the callers' PyTorch forms run instead.
Threads are torch's, in torch's OpenMP pool: two pools would wait for each other's cores.
"""

import ctypes
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dejavu_compile._compat import load_cpp

from .activations import REFERENCE
from .nibbles import columns

log = logging.getLogger(__name__)

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_ACTIVATIONS = {name: i for i, name in enumerate(REFERENCE)}
_P, _L, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SIGNATURES = {
    "rows": [_P] * 7 + [_L] * 6 + [_I] * 3,
    "sum": [_P] * 4 + [_L] * 5 + [_I] * 2,
    "select": [_P] * 6 + [_L] * 4 + [_I] * 2,
    "attention": [_P] * 7 + [_L] * 6 + [_P, ctypes.c_float, ctypes.c_float, _I],
    "sketch": [_P] * 5 + [_L] * 3 + [_I] * 2,
    "compact": [_P, ctypes.c_float, _P, _P, _P, _L, _L],
}


def cpu_op(
    name: str, fake: Callable[..., Any]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as an op that tracing doesn't look into; `fake` gives its outputs' shapes.

    `torch.library.custom_op` does the same and more, at 40 us a call, as much as a small gather takes.
    """

    def register(body: Callable[..., Any]) -> Callable[..., Any]:
        torch.library.define(name, torch.library.infer_schema(body, mutates_args=()))
        torch.library.impl(name, "CPU", body)
        torch.library.register_fake(name, fake)
        namespace, op = name.split("::")
        return getattr(getattr(torch.ops, namespace), op).default

    return register


@cache
def _library() -> ctypes.CDLL | None:
    source = Path(__file__).with_suffix(".cpp").read_text(encoding="utf-8")
    try:
        return load_cpp(source)
    except Exception as error:
        # Whatever keeps a compiler from working here (none, no space, no rights), PyTorch's ops still run.
        log.warning("CPU ops run without C++ (%s): slower, same results", error)
        return None


@cache
def function(op: str, dtype: torch.dtype) -> ctypes._CFuncPtr | None:
    """The C++ form of `op` (a key of `_SIGNATURES`) for a dtype, or None where there is none."""
    library = _library()
    # A compiler without _Float16 leaves that one out.
    form = getattr(library, f"{op}_{_NAMES.get(dtype)}", None) if library is not None else None
    if form is not None:
        form.argtypes, form.restype = _SIGNATURES[op], None
    return form


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def rows(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor | None, slots: int,
    activation: str, up: Tensor | None = None, up_bias: Tensor | None = None, *, in_place: bool = False,
) -> bool:  # fmt: skip
    """out[:, :slots] = act(weight[index[:slots]] @ x + bias) (* up); of all rows where `index` is None.

    `in_place`: into out[:, index[:slots]] instead. `out` [m, >= slots] has contiguous rows. Returns False, and writes nothing, where there is no C++ form.
    """
    form = function("rows", x.dtype)
    weights = [w for w in (weight, up) if w is not None]
    if form is None or any(w.stride(1) != 1 or w.dtype is not x.dtype for w in weights):
        return False
    x = x.contiguous()
    bias = None if bias is None else bias.contiguous()
    up_bias = None if up_bias is None else up_bias.contiguous()
    form(
        x.data_ptr(), weight.data_ptr(), _pointer(bias), _pointer(up), _pointer(up_bias), _pointer(index),
        out.data_ptr(), slots, x.shape[0], x.shape[1], out.stride(0), weight.stride(0),
        0 if up is None else up.stride(0), _ACTIVATIONS[activation], in_place, torch.get_num_threads(),
    )  # fmt: skip
    return True


def summed(
    hidden: Tensor, weight: Tensor, index: Tensor, count: int, compacted: bool
) -> Tensor | None:
    """`gathered_sum_reference`, or None where there is no C++ form."""
    form = function("sum", hidden.dtype)
    if form is None or weight.stride(1) != 1 or weight.dtype is not hidden.dtype:
        return None
    hidden = hidden.contiguous()
    (tokens, n), d = hidden.shape, weight.shape[1]
    out = torch.empty(tokens, d)
    form(
        hidden.data_ptr(), weight.data_ptr(), index.data_ptr(), out.data_ptr(), count, tokens, n, d,
        weight.stride(0), compacted, torch.get_num_threads(),
    )  # fmt: skip
    return out


def selected(
    source: Tensor, down: Tensor, up: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor] | None:
    """`select_reference`, or None where there is no C++ form."""
    form = function("select", source.dtype)
    bits = {torch.uint8: 4, torch.int8: 8, source.dtype: 8 * source.dtype.itemsize}.get(down.dtype)
    if form is None or bits is None or down.dtype is not up.dtype:
        return None
    (tokens, width), n, rank = source.shape, up.shape[0], down.shape[0]
    shapes = [tuple(t.shape) for t in (down, up, bias)]
    if shapes != [(rank, down.shape[-1]), (n, up.shape[-1]), (n,)] or (
        columns(down),
        columns(up),
    ) != (width, rank):
        # What runs reads through bare pointers.
        raise ValueError(
            f"a predictor of shapes {shapes}, {bits} bits an element, can't read sources of width {width}"
        )
    if bias.dtype is not torch.float32:
        return None
    source, down, up, bias = (t.contiguous() for t in (source, down, up, bias))
    index, count = torch.empty(n, dtype=torch.int32), torch.empty((), dtype=torch.int32)
    form(
        source.data_ptr(), down.data_ptr(), up.data_ptr(), bias.data_ptr(), index.data_ptr(),
        count.data_ptr(), tokens, width, rank, n, bits, torch.get_num_threads(),
    )  # fmt: skip
    return index, count


def compacted(
    values: Tensor, threshold: float, scale: Tensor | None = None
) -> tuple[Tensor, Tensor] | None:
    """`compact_reference`, or None where there is no C++ form."""
    form = function("compact", values.dtype)
    if form is None:
        return None
    values = values.contiguous()
    scale = None if scale is None else scale.contiguous()
    tokens, n = values.shape
    index, count = torch.empty(n, dtype=torch.int32), torch.empty((), dtype=torch.int32)
    form(
        values.data_ptr(),
        threshold,
        _pointer(scale),
        index.data_ptr(),
        count.data_ptr(),
        tokens,
        n,
    )
    return index, count


def sketch_score(
    x: Tensor, gate: Tensor, up: Tensor, numbers: Tensor, activation: str
) -> Tensor | None:
    """`sketch_score_reference`, or None where there is no C++ form."""
    form, (tokens, width), n = function("sketch", x.dtype), x.shape, up.shape[0]
    if form is None or n < 4:
        return None
    inputs = [t.contiguous() for t in (x, gate, up, numbers)]
    score = torch.empty(tokens, n)
    form(
        *(t.data_ptr() for t in inputs), score.data_ptr(), tokens, width, n,
        _ACTIVATIONS[activation], torch.get_num_threads(),
    )  # fmt: skip
    return score


def attended(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float,
    keep: Tensor | None,
) -> Tensor | None:  # fmt: skip
    """`attention_reference`, or None where there is no C++ form."""
    form = function("attention", q.dtype)
    last = [x.stride(-1) for x in (q, k, v)]
    if form is None or last != [1, 1, 1] or not q.dtype == k.dtype == v.dtype:
        return None
    (batch, heads, _, d), (_, kv_heads, slots, d_out) = q.shape, v.shape
    out = q.new_empty(batch, heads, 1, d_out)
    added = kept = None
    mask_strides = (0, 0, 0)
    if mask is not None:
        mask = mask if mask.dtype is torch.bool else mask.float()
        mask = mask.expand(batch, heads, 1, slots)
        mask_strides = mask.stride()[0], mask.stride()[1], mask.stride()[3]
        added, kept = (None, mask) if mask.dtype is torch.bool else (mask, None)
    keep = None if keep is None else keep.contiguous()
    strides = (ctypes.c_int64 * 11)(
        *q.stride()[:2], *k.stride()[:3], *v.stride()[:3], *mask_strides
    )
    form(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), _pointer(added), _pointer(kept),
        _pointer(keep), out.data_ptr(),
        batch, heads, kv_heads, slots, d, d_out, strides, scale, softcap, torch.get_num_threads(),
    )  # fmt: skip
    return out
