"""Attention in no site: each is told, with the weight that what it computes meets first, and why."""

import models
import pytest
import torch
import torch.nn.functional as F
from decoder_graph import Graph, holds_for
from strategies import decoder_specs
from torch import nn

HEADS, DIM, WIDTH, TOKENS = 4, 4, 16, 3


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def spelled_out(q, k, v):
    """With a mask, a cast, and a sink that is cut off again."""
    logits = (q @ k.mT).masked_fill(torch.ones(TOKENS, TOKENS).triu(1) > 0, -1e9)
    logits = torch.cat([logits, torch.zeros(1, HEADS, TOKENS, 1)], dim=-1)
    return logits.softmax(-1, dtype=torch.float64)[..., :-1].to(v.dtype) @ v


def by_einsum(q, k, v):
    weights = torch.einsum("bhqd,bhkd->bhqk", q, k).div(2.0).softmax(-1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, v)


SPELLINGS = {"sdpa": sdpa, "spelled out": spelled_out, "einsum": by_einsum}


class Attention(nn.Module):
    """`then(self, y [batch, heads, tokens, dim], x)` is what becomes of it."""

    def __init__(self, then, attend=sdpa):
        super().__init__()
        self.then, self.attend = then, attend
        make = torch.Generator().manual_seed(0)
        self.qkv = nn.Parameter(torch.randn(3 * WIDTH, WIDTH, generator=make))
        self.out = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=make))
        self.stack = nn.Parameter(torch.randn(HEADS, DIM, WIDTH, generator=make))
        self.norm = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (HEADS, DIM)).transpose(1, 2)
                   for y in F.linear(x, self.qkv).chunk(3, dim=-1))  # fmt: skip
        return self.then(self, self.attend(q, k, v), x)


def merged(y):
    return y.transpose(1, 2).reshape(1, TOKENS, WIDTH)


def projected(module, y, x):
    return F.linear(merged(y), module.out)


def contracted_by_a_stack(module, y, x):
    return torch.einsum("bhqd,hdo->bqo", y, module.stack)


def contracted_by_one_of_several(module, y, x):
    return F.linear(y[:, 1], module.stack[1].T)


def normed_over_heads(module, y, x):
    y = merged(y).double()
    y = (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).float()
    return F.linear(y * module.norm, module.out)


def normed_at_last(module, y, x):
    return F.linear(F.layer_norm(merged(y), (WIDTH,)), module.out)


def returned_too(module, y, x):
    y = y.double()
    return F.linear(merged(y.float()), module.out), y


def returned(module, y, x):
    return merged(y) + x


# name -> the weight that reads it, and a part of the reason
LONE = {
    contracted_by_a_stack: ("stack", "isn't a projection: a stack of matrices (3 dims"),
    contracted_by_one_of_several: ("stack", "isn't a projection: one of 4 matrices"),
    normed_over_heads: ("out", "isn't attention that keeps heads apart"),
    normed_at_last: ("out", "aren't kept apart up to the projection that reads it (layer_norm)"),
    returned_too: ("out", "what its attention computes is read elsewhere too"),
    returned: (None, "leaves its graph before a projection reads it"),
}


def found_in(model, *inputs):
    found, _ = models.sites_of(model.requires_grad_(False), *inputs)
    return found


X = torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("attend", SPELLINGS)
@pytest.mark.parametrize("then", LONE, ids=lambda f: f.__name__)
def test_attention_in_no_site_has_its_reason(then, attend):
    weight, reason = LONE[then]
    (lone,) = found_in(Attention(then, SPELLINGS[attend]), X).lone
    assert (lone.name is None) == (weight is None)
    assert weight is None or lone.name.endswith(weight)
    assert reason in lone.reason


@pytest.mark.parametrize("attend", SPELLINGS)
def test_attention_of_a_site_is_not_alone(attend):
    found = found_in(Attention(projected, SPELLINGS[attend]), X)
    assert [len(site.attended) for site in found.sites] == [1]
    assert found.lone == ()


class Half(nn.Module):
    """What is left of attention behind a graph break."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)


class BehindLogits(Half):
    def forward(self, logits, v):
        return F.linear(merged(logits.softmax(-1) @ v), self.weight), logits.exp()


class BeforeValues(Half):
    def forward(self, x):
        q = F.linear(x, self.weight).unflatten(-1, (HEADS, DIM)).transpose(1, 2)
        return (q @ q.mT).softmax(-1)


def test_attention_whose_halves_are_in_two_graphs_is_one():
    weight = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(2))
    v = torch.randn(1, HEADS, TOKENS, DIM)
    found = found_in(BehindLogits(weight), torch.randn(1, HEADS, TOKENS, TOKENS), v)
    assert not found.sites
    (lone,) = found.lone
    assert lone.name.endswith("weight")
    (lone,) = found_in(BeforeValues(weight), X).lone
    assert "leaves its graph" in lone.reason


class Router(nn.Module):
    """Its softmax weighs what experts compute."""

    def __init__(self):
        super().__init__()
        self.router, self.bias = nn.Linear(WIDTH, HEADS), nn.Parameter(torch.zeros(HEADS))
        self.experts = nn.Parameter(torch.randn(HEADS, WIDTH, WIDTH))

    def forward(self, x):
        gates = (self.router(x) * self.bias).softmax(-1)
        each = torch.einsum("btd,edf->btef", x, self.experts)
        return (gates.unsqueeze(-2) @ each).squeeze(-2), self.router(x).softmax(-1)


def test_the_softmax_of_a_router_is_no_attention():
    found = found_in(Router(), X)
    assert found.lone == ()
    assert found.others


@holds_for(decoder_specs())
def test_every_attention_is_in_one_site_or_alone_with_a_reason(spec):
    found = Graph(spec).found
    held = [node for site in found.sites for node in site.attended]
    assert len(held) == len(set(held))
    assert len(held) + len(found.lone) == spec.layers
    assert not set(held) & {lone.node for lone in found.lone}
    assert all(lone.reason and lone.name for lone in found.lone)
