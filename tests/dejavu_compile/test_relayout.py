"""Weights are laid out for gathering once for each model, and only where nobody else has their memory."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny import HIDDEN, text, texts, tiny
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

import dejavu_compile as dv
from dejavu_compile import attachments, backend
from dejavu_compile._compat import compile_counters
from dejavu_compile.attachments import fixed_layout, make_unit_major

TOKEN = torch.tensor([[5]])
COLUMNS = (1, HIDDEN)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def nothing_attached(monkeypatch):
    """What other files keep attached would give each model graphs of its own."""
    monkeypatch.setattr(attachments, "_attached", WeakIdKeyDictionary())


def strides(model):
    return [layer.fc2.weight.stride() for layer in model.model.decoder.layers]


def pair(units=128, width=64):
    return nn.Sequential(nn.Linear(width, units), nn.ReLU(), nn.Linear(units, width))


# --- one graph for many modules ----------------------------------------------------------------------


def test_the_second_model_of_a_class_becomes_sparse(prepared):
    first, second = tiny("opt"), tiny("opt")
    for model in (first, second):
        expected = model.forward(TOKEN, use_cache=False).logits
        model.compile(backend="dejavu_eager")
        for _ in range(3):
            found = model(TOKEN, use_cache=False).logits
            torch.testing.assert_close(found, expected)
        assert set(strides(model)) == {COLUMNS}
    assert [p.plan.num_sparse for p in prepared] == [0, 2]


def test_layers_that_are_compiled_one_by_one_all_become_sparse(prepared):
    model = tiny("opt", layers=3)
    expected = model.forward(TOKEN, use_cache=False).logits
    for layer in model.model.decoder.layers:
        layer.compile(backend="dejavu_eager")
    for _ in range(3):
        torch.testing.assert_close(model(TOKEN, use_cache=False).logits, expected)
    assert set(strides(model)) == {COLUMNS}
    assert [p.plan.num_sparse for p in prepared] == [0, 1]


def test_nothing_is_left_around_the_sparse_graph(prepared, monkeypatch):
    model = torch.compile(pair(), backend="dejavu_eager")
    for _ in range(2):
        model(torch.randn(1, 64))
    assert [len(p.relayout) for p in prepared] == [1, 0]
    laid_out = []
    monkeypatch.setattr(backend, "lay_out", lambda *a, **k: laid_out.append(a))
    model(torch.randn(1, 64))
    assert not laid_out


# --- memory that others have too ---------------------------------------------------------------------


def test_a_view_that_is_passed_in_stays_a_view():
    def run(x, into, out):
        return F.linear(F.relu(F.linear(x, into)), out)

    whole, into, x = torch.randn(64, 256), torch.randn(128, 64), torch.randn(1, 64)
    out = whole[:, :128]
    compiled = torch.compile(run, backend="dejavu_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x, into, out), run(x, into, out))
    assert out.data_ptr() == whole.data_ptr()
    whole.zero_()
    assert compiled(x, into, out).abs().max() == 0


def test_parameters_of_a_flat_buffer_stay_in_it(prepared):
    model = pair()
    flat, start = nn.utils.parameters_to_vector(model.parameters()), 0
    for parameter in model.parameters():
        parameter.data = flat[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()
    x, compiled = torch.randn(1, 64), torch.compile(model, backend="dejavu_eager")
    for _ in range(3):
        torch.testing.assert_close(compiled(x), model(x))
    flat.zero_()
    assert compiled(x).abs().max() == 0
    assert len(prepared) == 1
    # Its graph takes any model of the class
    alone = pair()
    compiled = torch.compile(alone, backend="dejavu_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x), alone(x))
    assert [p.plan.num_sparse for p in prepared] == [0, 1]


class Tied(nn.Module):
    """Two projections over one memory, as two parameters."""

    def __init__(self):
        super().__init__()
        self.into, self.out, self.more = nn.Linear(64, 128), nn.Linear(128, 64), nn.Linear(128, 64)
        self.more.weight.data = self.out.weight.data

    def forward(self, x):
        return self.out(F.relu(self.into(x))) + self.more(F.relu(self.into(2 * x)))


def test_two_parameters_over_one_memory_keep_it():
    model, x = Tied(), torch.randn(1, 64)
    compiled = torch.compile(model, backend="dejavu_eager")
    for _ in range(3):
        torch.testing.assert_close(compiled(x), model(x))
    model.more.weight.zero_()
    assert model.out.weight.abs().max() == 0
    torch.testing.assert_close(compiled(x), model(x))


def test_attaching_leaves_a_parameter_where_another_one_lies():
    first, model = tiny("opt", layers=3), tiny("opt", layers=3)
    with torch.enable_grad():
        calibration = dv.calibrate(first, texts(), policy="predict", density=0.3, progress=False)
    weight = model.model.decoder.layers[1].fc2.weight
    model.other = nn.Parameter(weight.data)
    calibration.attach(model)
    assert weight.data_ptr() == model.other.data_ptr()
    assert strides(model)[1:] == [(256, 1), COLUMNS]


class Scaled(torch.Tensor):
    """A weight kept as int8 with a scale a row."""

    @staticmethod
    def __new__(cls, values, scale):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype)

    def __init__(self, values, scale):
        self.values, self.scale = values, scale

    def __tensor_flatten__(self):
        return ["values", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return Scaled(inner["values"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        if op is torch.ops.aten.detach.default:
            return Scaled(args[0].values, args[0].scale)
        plain = [a.values.float() * a.scale if isinstance(a, Scaled) else a for a in args]
        return op(*plain, **(kwargs or {}))


def test_the_weight_of_a_subclass_is_left_alone():
    model = pair()
    scale = model[2].weight.abs().amax(1, keepdim=True) / 127
    quantised = Scaled((model[2].weight / scale).round().to(torch.int8), scale)
    model[2].weight = nn.Parameter(quantised, requires_grad=False)
    x, compiled = torch.randn(1, 64), torch.compile(model, backend="dejavu_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x), model(x))
    assert type(model[2].weight.data) is Scaled
    assert model[2].weight.stride() == (128, 1)


FIXED = {
    "no plain nn.Parameter": lambda: torch.randn(64, 128),
    "of type Scaled": lambda: nn.Parameter(Scaled(torch.ones(4, 4), torch.ones(4, 1))),
    "a view of a part": lambda: nn.Parameter(torch.randn(128, 128)[:64]),
    "other processes": lambda: nn.Parameter(torch.randn(64, 128).share_memory_()),
}


@pytest.mark.parametrize("why", FIXED)
def test_why_a_weight_stays_as_it_lies(why):
    weight = FIXED[why]()
    assert why in fixed_layout(weight)
    stride = weight.stride()
    make_unit_major(weight, 1, produces_units=False)
    assert weight.stride() == stride


def test_explain_says_why_a_site_stays_dense():
    model = pair()
    whole = torch.randn(128, 128)
    model[2].weight.data = whole[:64]
    assert "a view of a part of its memory" in str(dv.explain(model, torch.randn(1, 64)))


# --- weights that are written after calibration ------------------------------------------------------


@pytest.fixture
def calibrated():
    model = tiny("opt", layers=3)
    with torch.enable_grad():
        dv.calibrate(model, texts(), policy="predict", density=0.3, progress=False)
    return model


def test_loading_another_checkpoint_is_noticed_by_the_next_step(calibrated):
    calibrated.compile(backend="dejavu_eager")
    for _ in range(2):
        sparse = calibrated(TOKEN, use_cache=False).logits
    before = copy.deepcopy(calibrated.state_dict())
    calibrated.load_state_dict(before)  # the same values
    assert torch.equal(calibrated(TOKEN, use_cache=False).logits, sparse)
    calibrated.load_state_dict({name: value.flip(0) for name, value in before.items()})
    for _ in range(2):
        with pytest.raises(dv.ArtifactMismatchError, match="changed after calibration"):
            calibrated(TOKEN, use_cache=False)
    calibrated.load_state_dict(before)
    assert torch.equal(calibrated(TOKEN, use_cache=False).logits, sparse)
    calibrated.load_state_dict({name: value.flip(0) for name, value in before.items()})
    dv.detach(calibrated)
    dense = calibrated.forward(TOKEN, use_cache=False).logits
    torch.testing.assert_close(calibrated(TOKEN, use_cache=False).logits, dense)


def test_a_fingerprint_is_taken_once_a_write(calibrated, monkeypatch, prepared):
    calibrated.compile(backend="dejavu_eager")
    calibrated(TOKEN, use_cache=False)
    watched = prepared[-1].watched
    names = {one.name for one in watched}
    assert {f"model.decoder.layers.{i}.fc2.weight" for i in range(3)} <= names
    assert {f"model.decoder.layers.{i}.fc1.weight" for i in (1, 2)} <= names
    checked = []
    monkeypatch.setattr(backend, "check_fingerprint", lambda *a: checked.append(a))
    calibrated(TOKEN, use_cache=False)
    assert not checked
    calibrated.model.decoder.layers[2].fc2.weight.mul_(1.0)
    for _ in range(2):
        calibrated(TOKEN, use_cache=False)
    assert len(checked) == len(watched)


def test_a_model_of_the_class_with_nothing_attached_may_be_written(calibrated, prepared):
    other = tiny("opt", layers=3)
    for model in (calibrated, other):
        model.compile(backend="dejavu_eager")
        for _ in range(3):
            model(TOKEN, use_cache=False)
    assert prepared[-1].watched == ()
    other.model.decoder.layers[2].fc2.weight.mul_(2.0)
    expected = other.forward(TOKEN, use_cache=False).logits
    graphs = compile_counters()["graphs"]
    torch.testing.assert_close(other(TOKEN, use_cache=False).logits, expected)
    calibrated(TOKEN, use_cache=False)
    assert compile_counters()["graphs"] == graphs


def test_inference_tensors_have_no_version_to_look_at(calibrated):
    # Their values can't be written outside of inference mode
    with torch.inference_mode():
        model = copy.deepcopy(calibrated)
        for parameter in model.parameters():
            assert parameter.is_inference()
        dv.calibrate(model, texts(), policy="exact", progress=False)
        model.compile(backend="dejavu_eager")
        for _ in range(3):
            model(text(0, 1, 1), use_cache=False)
