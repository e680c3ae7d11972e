"""Labels pushed back through a graph against the Jacobian: which units' outputs does an element move?"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from dejavu_compile.passes.demand import MANY, NOBODY, demand

UNITS, WIDTH = 3, 4
SIZE = UNITS * WIDTH


def heads(x):
    return x.unflatten(-1, (UNITS, WIDTH)).transpose(0, 1)


def merge(x):
    return x.transpose(0, 1).flatten(-2)


def rotated(x):
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def shared_mask(x):
    """The first head's elements are a mask for all heads, too."""
    mask = x[:, :WIDTH] * 1.5
    y = F.scaled_dot_product_attention(heads(x), heads(x), heads(x), mask)
    return merge(y) + torch.cat([mask, x[:, WIDTH:]], dim=-1)


FUNCTIONS = {
    "views": lambda x: merge(heads(x) * 2 + 1),
    "rotary": lambda x: merge(heads(x) * 0.5 + rotated(heads(x)) * 0.25),
    "norm of a head": lambda x: merge(F.layer_norm(heads(x), (WIDTH,))),
    "norm of all heads": lambda x: F.layer_norm(x, (SIZE,)),
    "slices": lambda x: torch.cat([x[:, :WIDTH], x[:, WIDTH:]], dim=-1),
    "one head left out": lambda x: torch.cat([x[:, WIDTH:], x[:, WIDTH : 2 * WIDTH]], dim=-1),
    "mean of a head": lambda x: merge(heads(x) - heads(x).mean(-1, keepdim=True)),
    "softmax over heads": lambda x: merge(heads(x).softmax(0)),
    "attention": lambda x: merge(F.scaled_dot_product_attention(heads(x), heads(x), heads(x))),
    "spelled out": lambda x: merge((heads(x) @ heads(x).mT).softmax(-1) @ heads(x)),
    "split": lambda x: torch.cat(x.split([WIDTH, 2 * WIDTH], dim=-1)[::-1], dim=-1).square(),
    "mask of all heads": shared_mask,
    "an op not looked through": lambda x: x.cumsum(-1),
}


def labelled(function, tokens):
    """(labels of the input's elements, units that each of them moves [tokens, SIZE, UNITS])."""
    x = torch.randn(tokens, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gm = make_fx(function, tracing_mode="fake", pre_dispatch=True)(x)
    source = next(n for n in gm.graph.nodes if n.op == "placeholder")
    output = next(n for n in gm.graph.nodes if n.op == "output")
    label = torch.arange(UNITS, dtype=torch.int32).repeat_interleave(WIDTH).expand(tokens, SIZE)
    start = output.all_input_nodes[0]
    found = demand(start, label, lambda node: node.op == "placeholder", output)
    jacobian = torch.autograd.functional.jacobian(function, x)
    moved = (jacobian != 0).unflatten(1, (UNITS, WIDTH)).any(0).any(1)
    return found.labels.get(source, torch.full((tokens, SIZE), MANY)), moved.permute(1, 2, 0)


def assert_safe(label, moves):
    """Nothing that a unit needs is promised to another, or to nobody."""
    for unit in range(UNITS):
        others = moves.clone()
        others[..., unit] = False
        assert not others.any(-1)[label == unit].any()
    assert not moves.any(-1)[label == NOBODY].any()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_label_promises_what_the_jacobian_denies(name):
    label, moves = labelled(FUNCTIONS[name], tokens=WIDTH)
    assert_safe(label, moves)


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if "not looked" not in n])
def test_label_names_the_one_unit_where_there_is_one(name):
    label, moves = labelled(FUNCTIONS[name], tokens=WIDTH)
    alone = moves.sum(-1) == 1
    assert torch.equal(label[alone].long(), moves.int().argmax(-1)[alone])


STEPS = {
    "scale": lambda x: x * 1.5,
    "rotate": lambda x: merge(rotated(heads(x))),
    "norm": lambda x: merge(F.layer_norm(heads(x), (WIDTH,))),
    "swap": lambda x: torch.cat([x[:, 2 * WIDTH :], x[:, : 2 * WIDTH]], dim=-1),
    "shift": lambda x: torch.cat([x[:, 1:], x[:, :1]], dim=-1),
    "attend": lambda x: merge(F.scaled_dot_product_attention(heads(x), heads(x), heads(x))),
    "add": lambda x: x + merge(heads(x).softmax(-1)),
    "stack": lambda x: torch.stack([x, x.square()], dim=0).sum(0),
}


@given(st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=4))
def test_any_chain_of_steps_is_labelled_safely(names):
    def chain(x):
        for name in names:
            x = STEPS[name](x)
        return x

    label, moves = labelled(chain, tokens=WIDTH)
    assert_safe(label, moves)
