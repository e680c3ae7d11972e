"""Activations and gated pairs go into the gathered projections, and no value changes."""

import models
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from strategies import specs
from torch import nn

from dejavu_compile.passes import gemv
from dejavu_compile.passes.find_sites import find_sites
from dejavu_compile.passes.fuse import Fused, fuse
from dejavu_compile.passes.rewrite import rewrite


def gather(keep):
    def run(gm):
        return rewrite(gm, tuple(models.forced(site, keep) for site in find_sites(gm).sites))

    return run


def fused(model, keep=None):
    """What `fuse` did, the recorder, the result and what it should be."""
    keep = torch.arange(models.UNITS) % 3 == 0 if keep is None else keep
    x = models.tokens()
    got, recorder = models.record(model, x, passes=(gather(keep), fuse))
    models.assert_near(models.first(got), models.first(models.oracle(model, x, keep)))
    recorder.gm.graph.lint()
    return recorder.results[1], recorder


def activations(recorder):
    return [
        next(a for a in node.args if isinstance(a, str))
        for node in recorder.gm.graph.nodes
        if models.op(node) in ("dejavu.gathered_rows", "dejavu.gathered_glu")
    ]


@pytest.mark.parametrize(
    ("act", "name", "count"),
    [
        (F.relu, "relu", 1),
        (F.silu, "silu", 1),
        (F.gelu, "gelu", 1),
        (lambda x: F.gelu(x, approximate="tanh"), "gelu_tanh", 1),
        (models.relu_squared, "relu2", 2),
        (lambda x: F.relu(x).pow(2), "relu2", 2),
    ],
    ids=["relu", "silu", "gelu", "gelu_tanh", "square", "pow"],
)
def test_activation_is_fused(act, name, count):
    done, recorder = fused(models.Plain(act))
    assert done == Fused(count, 0)
    assert activations(recorder) == [name]


@pytest.mark.parametrize("make", [models.Gated, models.Chunked, models.Interleaved])
@pytest.mark.parametrize(("act", "name"), [(F.silu, "silu"), (F.relu, "relu")])
@pytest.mark.parametrize("bias", [True, False])
def test_gated_pair_is_fused(make, act, name, bias):
    done, recorder = fused(make(act, bias=bias))
    assert done == Fused(1, 1)
    assert activations(recorder) == [name]
    assert "dejavu.gathered_rows" not in recorder.targets


def test_up_may_come_first():
    class UpFirst(models.Gated):
        def hidden(self, x):
            return self.up(x) * self.act(self.gate(x))

    done, _ = fused(UpFirst())
    assert done == Fused(1, 1)


class _ReadTwice(models.Plain):
    def hidden(self, x):
        y = self.up(x)
        return F.relu(y) + torch.tanh(y)


class _Squared(models.Plain):
    def hidden(self, x):
        y = self.up(x)
        return torch.tanh(y * y)


class _BothActivated(models.Gated):
    def hidden(self, x):
        return torch.sigmoid(F.relu(self.gate(x))) * F.relu(self.up(x))


class _TwoInputs(models.Gated):
    def hidden(self, x):
        return F.silu(self.gate(x)) * self.up(x.flip(1))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (_ReadTwice, Fused(0, 0)),
        (_Squared, Fused(0, 0)),
        (lambda: models.Plain(torch.tanh), Fused(0, 0)),
        (lambda: models.Plain(lambda x: F.relu(x + 1.0)), Fused(0, 0)),
        (lambda: models.Plain(lambda x: F.relu(x).pow(3)), Fused(1, 0)),
        (_BothActivated, Fused(2, 0)),
        (_TwoInputs, Fused(1, 0)),
    ],
    ids=["read_twice", "squared", "tanh", "shifted", "cubed", "both_activated", "two_inputs"],
)
def test_left_alone(make, expected):
    done, recorder = fused(make())
    assert done == expected
    assert "dejavu.gathered_glu" not in recorder.targets


class _Known(nn.Module):
    """What `gate` leaves: a gate that is known for every unit, times a gathered projection."""

    def __init__(self, *, then=lambda x: x, gate_first=True, half=False):
        super().__init__()
        self.then, self.gate_first, self.half = then, gate_first, half

    def forward(self, x, gate, weight, index, count):
        gate = gate.exp()
        known = gate.index_select(1, index)
        rows = torch.ops.dejavu.gathered_rows(x, weight, None, index, count, "identity")
        known = known.double() if self.half else known
        return self.then(known * rows if self.gate_first else rows * known)


def _known_inputs():
    make = torch.Generator().manual_seed(0)
    index = torch.randperm(40, generator=make).int()
    x, gate, weight = (torch.randn(*s, generator=make) for s in ((2, 16), (2, 40), (40, 16)))
    return x, gate, weight, index, torch.tensor(40, dtype=torch.int32)


@pytest.mark.parametrize("gate_first", [True, False])
def test_known_gate_is_multiplied_where_rows_are_gathered(gate_first):
    model, (x, gate, weight, index, count) = _Known(gate_first=gate_first), _known_inputs()
    got, recorder = models.record(model, x, gate, weight, index, count, passes=(fuse,))
    assert recorder.results[0] == Fused(0, 0, 1)
    assert {"aten.mul.Tensor", "aten.index_select"}.isdisjoint(recorder.targets)
    exact = gate.double().exp() * (x.double() @ weight.double().T)
    models.assert_near(got, exact[:, index.long()], 1e-5)


def test_activation_of_a_product_stays_behind_it():
    model, inputs = _Known(then=F.relu), _known_inputs()
    got, recorder = models.record(model, *inputs, passes=(fuse, fuse))
    assert [r.activations for r in recorder.results] == [0, 0]
    assert "aten.relu" in recorder.targets
    models.assert_near(got, model(*inputs), 1e-5)


def test_known_gate_of_another_dtype_is_left_alone():
    model, inputs = _Known(half=True), _known_inputs()
    got, recorder = models.record(model, *inputs, passes=(fuse,))
    assert recorder.results[0] == Fused(0, 0, 0)
    models.assert_near(got, model(*inputs), 1e-5)


@pytest.mark.parametrize(("act", "name"), [(F.silu, "silu"), (F.relu, "relu"), (F.gelu, "gelu")])
def test_activation_goes_into_a_gemv(act, name, monkeypatch):
    monkeypatch.setattr(gemv, "CPU_FROM", 0)
    model, x = models.Plain(act), models.tokens(count=1)
    got, recorder = models.record(model, x, passes=(gemv.use_gemv, fuse))
    assert recorder.results[1] == Fused(1, 0)
    (first, _) = [n for n in recorder.gm.graph.nodes if models.op(n) == "dejavu.gemv"]
    assert first.args[3] == name
    models.assert_near(got, model.double()(x.double()), 1e-5)


def test_graph_without_gathered_projections_is_unchanged():
    _, recorder = models.record(models.Gated(), models.tokens(), passes=(fuse,))
    assert not recorder.results[0].modified
    assert models.listing(recorder.gm) == recorder.before


@given(specs())
def test_equals_dense_with_the_other_units_zeroed(spec):
    model, x, keep = spec.model(), spec.input(), spec.keep()

    def last(gm):
        rewrite(gm, (models.forced(find_sites(gm).sites[-1], keep),))

    got, _ = models.record(model, x, passes=(last, fuse))
    models.assert_near(models.first(got), models.first(models.oracle(model, x, keep)))
