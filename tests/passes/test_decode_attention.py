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


class Scaled(nn.Module):
    """OPT's: queries are scaled before heads are split. `twice`: something else reads them too."""

    def __init__(self, *, twice=False):
        super().__init__()
        self.twice = twice

    def forward(self, q, k, v):
        q = q.transpose(1, 2).flatten(2) * 0.3
        split = q.view(2, 1, 4, 16).transpose(1, 2)
        y = F.scaled_dot_product_attention(split, k, v, scale=0.5)
        return y + q.sum() if self.twice else y + 1


@pytest.mark.parametrize("twice", [False, True])
def test_scale_of_the_queries_is_the_ops(twice):
    model = Scaled(twice=twice)
    got, recorder, count = run(model, *inputs())
    assert count == 1
    assert ("aten.mul.Tensor" in recorder.targets) is twice
    exact = model(*(x.double() for x in inputs()))
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


def test_shared_keys_and_values_are_read_in_place():
    model = Attention(enable_gqa=True)
    got, _, count = run(model, *inputs(kv_heads=2))
    assert count == 1
    torch.testing.assert_close(got, model(*inputs(kv_heads=2)), rtol=1e-5, atol=1e-5)


def eager(q, k, v, mask=None):
    """Llama's, Gemma 2's: keys repeated for the heads of each group, a soft cap, an added mask."""
    groups = q.shape[1] // k.shape[1]
    k, v = (
        x[:, :, None].expand(-1, -1, groups, -1, -1).reshape(x.shape[0], -1, *x.shape[2:])
        for x in (k, v)
    )
    logits = torch.matmul(q, k.transpose(2, 3)) * 0.25
    logits = torch.tanh(logits / 30.0) * 30.0
    logits = logits if mask is None else logits + mask
    weight = F.dropout(logits.softmax(-1, dtype=torch.float32).to(q.dtype), 0.1, training=False)
    return weight @ v


def alibi(q, k, v, bias):
    """Bloom's: one matrix product of all heads of all sequences."""
    (b, h, _, d), s = q.shape, k.shape[2]
    logits = bias.baddbmm(
        q.reshape(b * h, 1, d), k.reshape(b * h, s, d).transpose(1, 2), alpha=d**-0.5
    )
    weight = F.softmax(logits.view(b, h, 1, s), dim=-1).view(b * h, 1, s)
    return torch.bmm(weight, v.reshape(b * h, s, d)).view(b, h, 1, d)


def filled(q, k, v, mask):
    """MPT's and GPT-J's: in fp32, divided by a tensor, a bias per head, then masked."""
    logits = q.float() @ k.float().transpose(-1, -2) / torch.tensor(4.0)
    logits = logits + torch.arange(q.shape[1]).view(-1, 1, 1) * 0.1
    logits = logits.masked_fill(mask, torch.finfo(torch.float32).min)
    return logits.softmax(-1).to(v.dtype) @ v


def chosen(q, k, v, mask):
    """GPT-Neo's: where."""
    lowest = torch.full([], torch.finfo(q.dtype).min, dtype=q.dtype)
    logits = torch.where(mask, q @ k.mT, lowest)
    return torch.softmax(logits, -1) @ v


def merged(q, k, v):
    """nn.MultiheadAttention's: heads of all sequences in one axis."""
    q, k, v = (x.flatten(0, 1) for x in (q * 0.25, k, v))
    return torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)), dim=-1), v)


MASKED = torch.arange(20) > 12
SPELLINGS = {
    "gqa": (eager, 2, None),
    "gqa, masked": (eager, 2, torch.where(MASKED, -1e30, 0.0).expand(2, 1, 1, 20)),
    "mha, per head": (eager, 4, torch.linspace(-2, 2, 80).view(1, 4, 1, 20)),
    "alibi": (alibi, 4, torch.linspace(-2, 2, 160).view(8, 1, 20)),
    "filled": (filled, 4, MASKED.expand(2, 1, 1, 20)),
    "chosen": (chosen, 4, ~MASKED.expand(2, 1, 1, 20)),
    "merged": (merged, 4, None),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_attention_that_is_spelled_out_is_replaced(name):
    spelling, kv_heads, mask = SPELLINGS[name]

    class SpelledOut(torch.nn.Module):
        def forward(self, q, k, v, *mask):
            return spelling(q, k, v, *mask) + 1

    arguments = (*inputs(kv_heads=kv_heads), *([] if mask is None else [mask]))
    got, recorder, count = run(SpelledOut(), *arguments)
    assert count == 1
    left = {t.split(".")[1] for t in recorder.targets}
    assert left.isdisjoint({"softmax", "_softmax", "bmm", "matmul", "baddbmm"}), left
    assert "expand" not in left, "shared keys are read where they are"
    doubles = [x.double() if x.is_floating_point() else x for x in arguments]
    want = spelling(*doubles) + 1
    models.assert_near(got, want, 1e-5)


def written_to(q, k, v):
    logits = q @ k.mT
    logits.view(-1).mul_(0.25)
    return logits.softmax(-1) @ v


def weights_returned(q, k, v):
    weight = (q @ k.mT).softmax(-1)
    return torch.cat((weight @ v, weight[..., :16]), 2)


def sink(q, k, v):
    logits = torch.cat((q @ k.mT, q.mean(-1, keepdim=True)), -1)
    return logits.softmax(-1)[..., :-1] @ v


def scaled_bias(q, k, v):
    return ((q @ k.mT + k[..., :1].mT) * 0.25).softmax(-1) @ v


def filled_with_zero(q, k, v):
    return (q @ k.mT).masked_fill(torch.arange(20) > 12, 0.0).softmax(-1) @ v


def filled_with_a_value(q, k, v):
    return torch.where(torch.arange(20) > 12, q @ k.mT, v[..., 0, 0].min()).softmax(-1) @ v


def over_heads(q, k, v):
    return (q @ k.mT).softmax(1) @ v


def other_side(q, k, v):
    return (v.mT @ (q @ k.mT).softmax(-1).mT).mT


@pytest.mark.parametrize(
    "spelling",
    [
        written_to,
        weights_returned,
        sink,
        scaled_bias,
        filled_with_zero,
        filled_with_a_value,
        over_heads,
        other_side,
    ],
    ids=lambda spelling: spelling.__name__,
)
def test_what_only_looks_like_attention_is_left_alone(spelling):
    class LooksLikeIt(torch.nn.Module):
        def forward(self, q, k, v):
            return spelling(q, k, v) + 1

    got, recorder, count = run(LooksLikeIt(), *inputs())
    assert count == 0
    assert models.listing(recorder.gm) == recorder.before
    models.assert_near(got, spelling(*(x.double() for x in inputs())) + 1, 1e-5)


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


class Product(nn.Module):
    """Spelled out: the products broadcast as matrices do."""

    def forward(self, q, k, v):
        weights = torch.softmax(q @ k.transpose(-1, -2) * 0.25, dim=-1)
        return weights @ v + 1


@pytest.mark.parametrize("model", [Attention(), Product()], ids=["called", "spelled out"])
@pytest.mark.parametrize(
    ("queries", "keys", "values"),
    [
        ((3, 4), (1, 4), (1, 4)),  # one prompt's cache for three queries
        ((1, 4), (3, 4), (3, 4)),
        ((1, 1), (1, 4), (1, 4)),
        ((2, 4), (2, 1), (2, 4)),
        ((2, 4), (2, 4), (1, 4)),
        ((2, 4), (1, 4), (2, 4)),
    ],
)
def test_keys_that_are_broadcast_over_sequences_or_heads_are_left_alone(
    model, queries, keys, values
):
    make = torch.Generator().manual_seed(1)
    q = torch.randn(*queries, 1, 16, generator=make)
    k, v = (torch.randn(*size, 20, 16, generator=make) for size in (keys, values))
    got, _, count = run(model, q, k, v)
    assert count == 0
    torch.testing.assert_close(got, model(q, k, v))


@pytest.mark.parametrize("model", [Attention(), Product()], ids=["called", "spelled out"])
def test_one_head_of_keys_for_all_queries_is_replaced(model):
    make = torch.Generator().manual_seed(1)
    q = torch.randn(2, 4, 1, 16, generator=make)
    k, v = torch.randn(2, 2, 1, 20, 16, generator=make)
    got, _, count = run(model, q, k, v)
    assert count == 1
    exact = model(*(x.double() for x in (q, k, v)))
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


def test_a_cache_of_fewer_sequences_is_refused_by_the_op():
    q, k, v = inputs()
    with pytest.raises(ValueError, match="keys and values for each"):
        torch.ops.dejavu.decode_attention_cpu(q, k[:1], v[:1], None, 1.0, 0.0, None)


def test_a_scaled_value_that_is_written_later_keeps_its_scale():
    class Written(nn.Module):
        def forward(self, q, k, v):
            q = q + 0
            scaled = q * 0.3
            q.view(-1).mul_(2)
            return F.scaled_dot_product_attention(scaled, k, v) + 1

    got, _, count = run(Written(), *inputs())
    assert count == 1
    torch.testing.assert_close(got, Written()(*inputs()), rtol=1e-5, atol=1e-5)
