"""Attention of one query per sequence becomes an op that reads only what the mask allows."""

import models
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dejavu_compile.passes import decode_attention
from dejavu_compile.passes.decode_attention import use_decode_attention


@pytest.fixture(autouse=True)
def every_size(monkeypatch):
    monkeypatch.setattr(decode_attention, "FROM", 0)


class Attention(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.kwargs = kwargs

    def forward(self, q, k, v, mask=None):
        return F.scaled_dot_product_attention(q, k, v, mask, **self.kwargs) + 1


def inputs(queries=1, heads=4, kv_heads=4):
    make = torch.Generator().manual_seed(0)
    q = torch.randn(2, heads, queries, 16, generator=make)
    k, v = torch.randn(2, 2, kv_heads, 20, 16, generator=make)
    return q, k, v


def run(model, *args):
    got, recorder = models.record(model, *args, passes=(use_decode_attention,))
    return got, recorder, recorder.results[0].count


@pytest.mark.parametrize(
    "mask", [None, torch.arange(20).expand(2, 1, 1, 20) < 11, torch.ones(1, 4, 1, 20)]
)
@pytest.mark.parametrize("kwargs", [{}, {"scale": 0.7}])
def test_one_query_is_replaced(mask, kwargs):
    model = Attention(**kwargs)
    got, recorder, count = run(model, *inputs(), mask)
    assert count == 1
    assert "dejavu.decode_attention_cpu" in recorder.targets
    torch.testing.assert_close(got, model(*inputs(), mask), rtol=1e-5, atol=1e-5)


def test_shared_keys_and_values_are_read_in_place():
    model = Attention(enable_gqa=True)
    got, _, count = run(model, *inputs(kv_heads=2))
    assert count == 1
    torch.testing.assert_close(got, model(*inputs(kv_heads=2)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "args"),
    [
        (Attention(), inputs(queries=3)),
        (Attention(is_causal=True), inputs()),
        (Attention(), tuple(x.double() for x in inputs())),
    ],
    ids=["prefill", "causal", "fp64"],
)
def test_others_are_left_alone(model, args):
    _, recorder, count = run(model, *args)
    assert count == 0
    assert models.listing(recorder.gm) == recorder.before
