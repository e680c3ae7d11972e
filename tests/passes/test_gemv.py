"""Dense projections of a decode step become GEMVs, those of one input together."""

import models
import pytest
import torch
from torch import nn

from dejavu_compile.passes import gemv
from dejavu_compile.passes.gemv import use_gemv


@pytest.fixture(autouse=True)
def every_size(monkeypatch):
    monkeypatch.setattr(gemv, "CPU_FROM", 0)


class Projections(nn.Module):
    """Q, K, V and a fourth of one input; an output projection of their sum."""

    def __init__(self, biases=(True, True, True, True)):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(32, 24, bias=bias) for bias in biases)
        self.out = nn.Linear(24, 32, bias=False)

    def forward(self, x):
        return self.out(sum(part(x) for part in self.parts))


def run(model, x, **kwargs):
    got, recorder = models.record(model, x, passes=(lambda gm: use_gemv(gm, **kwargs),))
    return got, recorder, recorder.results[0]


@pytest.mark.parametrize(
    ("biases", "launches"),
    [((True,) * 3, 2), ((True,) * 5, 3), ((True, False, True), 2), ((False,) * 2, 2)],
)
def test_projections_of_one_input_share_a_launch(biases, launches):
    model, x = Projections(biases), models.tokens(count=1, width=32)
    got, recorder, result = run(model, x)
    assert (result.count, result.launches) == (len(biases) + 1, launches)
    assert recorder.targets.count("dejavu.gemv") == launches
    assert "aten.linear" not in recorder.targets
    torch.testing.assert_close(got, model(x), rtol=1e-5, atol=1e-6)


def test_more_tokens_than_allowed_are_left_alone():
    model, x = Projections(), models.tokens(count=2, width=32)
    _, recorder, result = run(model, x)
    assert result.count == 0
    assert models.listing(recorder.gm) == recorder.before
    got, _, result = run(model, x, max_tokens=2)
    assert result.count == 5
    torch.testing.assert_close(got, model(x), rtol=1e-5, atol=1e-6)


def test_small_weights_on_a_cpu_are_left_alone(monkeypatch):
    monkeypatch.setattr(gemv, "CPU_FROM", 1 << 20)
    _, recorder, result = run(Projections(), models.tokens(count=1, width=32))
    assert result.count == 0
    assert models.listing(recorder.gm) == recorder.before


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_columns_that_lie_together_are_summed(bias, dtype):
    """An output projection whose strides were changed is no row-wise weight any more."""
    model, x = Projections((bias,)).to(dtype), models.tokens(count=1, width=32).to(dtype)
    model.out = nn.Linear(24, 32, bias=bias, dtype=dtype)
    model.out.weight.data = model.out.weight.data.T.contiguous().T
    got, recorder, result = run(model, x)
    assert (result.count, result.launches) == (2, 2)
    assert "aten.linear" not in recorder.targets
    assert "dejavu.gathered_sum_cpu" in recorder.targets
    exact = model.double()(x.double())
    assert got.dtype is dtype
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=torch.finfo(dtype).eps * 4)


def test_small_columns_are_left_alone(monkeypatch):
    monkeypatch.setattr(gemv, "CPU_FROM", 1 << 20)
    model, x = Projections((True,)), models.tokens(count=1, width=32)
    model.out.weight.data = model.out.weight.data.T.contiguous().T
    _, recorder, result = run(model, x)
    assert result.count == 0
    assert models.listing(recorder.gm) == recorder.before


@pytest.mark.parametrize("what", ["weight", "bias"])
def test_what_is_written_between_two_projections_is_read_when_it_was(what):
    class Fast(nn.Module):
        """Weights that change within a step."""

        def forward(self, x, weight, bias):
            y = torch.nn.functional.linear(x, weight, bias)
            (weight if what == "weight" else bias)[0].add_(1.0)
            return y + 2 * torch.nn.functional.linear(x, weight, bias)

    make = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(size, generator=make) for size in ((1, 32), (24, 32), (24,)))
    want = Fast()(x, weight.clone(), bias.clone())
    got, _ = models.record(Fast(), x, weight, bias, passes=(use_gemv,))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
