"""Attention of a decode step against float64, in every layout that a cache has."""

import models
import pytest
import torch
import torch.nn.functional as F

from dejavu_compile.kernels import attention_reference, cpu, decode_attention_cpu

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
FORMS = pytest.mark.parametrize("form", [decode_attention_cpu, attention_reference])
SHAPES = pytest.mark.parametrize(
    ("heads", "kv_heads", "slots", "d"), [(4, 4, 100, 64), (8, 2, 33, 40), (3, 1, 7, 5)]
)
MASKS = {
    "none": lambda b, h, s: None,
    "per_sequence": lambda b, h, s: torch.rand(b, 1, 1, s) > 0.4,
    "per_head": lambda b, h, s: torch.randn(1, h, 1, s),
    "minus_infinity": lambda b, h, s: torch.where(torch.rand(b, 1, 1, s) > 0.4, 0.0, -torch.inf),
}


def inputs(heads, kv_heads, slots, d, dtype, batch=2):
    q = torch.randn(batch, heads, 1, d)
    k, v = torch.randn(2, batch, kv_heads, slots, d)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def exact(q, k, v, mask, softcap=0.0):
    if softcap:
        groups = q.shape[1] // k.shape[1]
        q, k, v = (x.double() for x in (q, k, v))
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        logits = softcap * torch.tanh(0.3 * q @ k.mT)
        if mask is not None:
            boolean = mask.dtype is torch.bool
            logits = logits.masked_fill(~mask, -torch.inf) if boolean else logits + mask
        return logits.softmax(-1) @ v
    mask = mask if mask is None or mask.dtype is torch.bool else mask.double()
    return F.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), mask, scale=0.3, enable_gqa=True
    )


@FORMS
@DTYPES
@SHAPES
@pytest.mark.parametrize("mask", MASKS)
def test_equals_float64(form, dtype, heads, kv_heads, slots, d, mask):
    q, k, v = inputs(heads, kv_heads, slots, d, dtype)
    mask = MASKS[mask](2, heads, slots)
    if mask is not None:
        mask = mask if mask.dtype is torch.bool else mask.to(dtype)
        mask[..., 0] = True if mask.dtype is torch.bool else 0.0
    want = exact(q, k, v, mask)
    got = form(q, k, v, mask, 0.3, 0.0, None)
    assert got.dtype is dtype
    low = F.scaled_dot_product_attention(q, k, v, mask, scale=0.3, enable_gqa=True)
    models.assert_as_exact_as(low, got, want, v)  # rounding is that of the values averaged


@FORMS
@DTYPES
@pytest.mark.parametrize("mask", MASKS)
def test_soft_cap_equals_float64(form, dtype, mask):
    q, k, v = inputs(8, 2, 33, 40, dtype)
    mask = MASKS[mask](2, 8, 33)
    if mask is not None:
        mask[..., 0] = True if mask.dtype is torch.bool else 0.0
    want = exact(q, k, v, mask, softcap=3.0)
    assert (want - exact(q, k, v, mask)).abs().max() > 0.1, "the cap must tell"
    got = form(q, k, v, mask, 0.3, 3.0, None)
    low = torch.finfo(dtype).eps * want.abs().max()
    assert (got.double() - want).abs().max() <= (
        2 * low if dtype is not torch.float32 else 8 * low
    )


@FORMS
@pytest.mark.parametrize("kind", ["bool", "added"])
def test_sequence_that_may_attend_to_nothing_gives_zero(form, kind):
    q, k, v = inputs(4, 2, 33, 16, torch.float32)
    mask = torch.zeros(2, 1, 1, 33, dtype=torch.bool)
    mask[1, ..., 3:] = True
    if kind == "added":
        mask = torch.zeros(2, 1, 1, 33).masked_fill(~mask, -torch.inf)
    got = form(q, k, v, mask, 0.3, 0.0, None)
    assert not got[0].any()
    models.assert_near(got[1:], exact(q, k, v, mask)[1:], 1e-5)


def test_masked_slots_are_never_read():
    q, k, v = inputs(4, 2, 33, 16, torch.float32)
    mask = torch.arange(33).expand(2, 1, 1, 33) < 20
    want = exact(q, k, v, mask)
    k[:, :, 20:], v[:, :, 20:] = float("nan"), float("nan")
    models.assert_near(decode_attention_cpu(q, k, v, mask, 0.3, 0.0, None), want, 1e-5)


@FORMS
def test_nan_stays_visible(form):
    q, k, v = inputs(2, 2, 9, 16, torch.float32)
    k[0, 1, 4, 2] = float("nan")
    got = form(q, k, v, None, 0.3, 0.0, None)
    assert got[0, 1].isnan().all()
    assert not got[0, 0].isnan().any()
    assert not got[1].isnan().any()


def test_cache_in_another_order_of_dims():
    q, k, v = inputs(4, 4, 50, 16, torch.float32)
    want = exact(q, k, v, None)
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    models.assert_near(decode_attention_cpu(q, k, v, None, 0.3, 0.0, None), want, 1e-5)
    # Without a contiguous last dim there is no C++ form.
    k = k.transpose(2, 3).contiguous().transpose(2, 3)
    models.assert_near(decode_attention_cpu(q, k, v, None, 0.3, 0.0, None), want, 1e-5)


def test_opcheck():
    q, k, v = inputs(4, 2, 33, 16, torch.float32)
    op = torch.ops.dejavu.decode_attention_cpu.default
    for mask in (None, torch.arange(33).expand(2, 1, 1, 33) < 20):
        torch.library.opcheck(op, (q, k, v, mask, 0.3, 0.0, None))


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr(cpu, "function", lambda op, dtype: None)
    q, k, v = inputs(4, 2, 33, 16, torch.float32)
    models.assert_near(
        decode_attention_cpu(q, k, v, None, 0.3, 0.0, None), exact(q, k, v, None), 1e-5
    )


@FORMS
@DTYPES
@pytest.mark.parametrize("share", ["none", "some", "all"])
def test_heads_that_do_not_run_give_zero_and_are_not_read(form, dtype, share):
    q, k, v = inputs(6, 3, 33, 16, dtype)
    keep = torch.rand(2, 6) < {"none": 0.0, "some": 0.5, "all": 1.1}[share]
    score = torch.where(keep, 0.2, -0.1)
    want = exact(q, k, v, None).masked_fill(~keep[:, :, None, None], 0.0)
    low = F.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True)
    low = low.masked_fill(~keep[:, :, None, None], 0.0)
    q = q.masked_fill(~keep[:, :, None, None], float("nan"))
    models.assert_as_exact_as(low, form(q, k, v, None, 0.3, 0.0, score), want, v)
