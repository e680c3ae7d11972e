"""The C++ forms and the PyTorch forms that stand in for them say the same."""

import logging

import models
import pytest
import torch

from dejavu_compile import kernels
from dejavu_compile.kernels import cpu
from dejavu_compile.kernels.nibbles import pack

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
ARRIVED = torch.zeros(256, dtype=torch.int32)


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr(cpu, "function", lambda op, dtype: None)


def both(monkeypatch, call):
    """What `call` returns with the C++ forms, and without."""
    with_cpp = call()
    monkeypatch.setattr(cpu, "function", lambda op, dtype: None)
    return with_cpp, call()


def selection(n, every):
    index = torch.zeros(n, dtype=torch.int32)
    chosen = torch.arange(0, n, every)
    index[: len(chosen)] = chosen
    return index, torch.tensor(len(chosen), dtype=torch.int32)


def test_this_machine_has_them():
    """Where this fails, the tests beside it compare PyTorch with itself."""
    for op in ("rows", "sum", "select", "compact", "attention"):
        assert cpu.function(op, torch.bfloat16) is not None
    assert cpu.function("rows", torch.float64) is None


@DTYPES
@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("every", [2, 9])
def test_rows_glu_and_sum(monkeypatch, dtype, m, every):
    n, d = 101, 83  # no multiple of any block
    x, gate, up, out = (torch.randn(*s).to(dtype) for s in ((m, d), (n, d), (2 * n, d), (n, d)))
    bias, chosen = torch.randn(2 * n).to(dtype), selection(n, every)

    def call():
        hidden = kernels.gathered_glu(x, gate, bias[:n], up[::2], bias[::2], *chosen, "gelu")
        rows = kernels.gathered_rows(x, gate, None, *chosen, "silu")
        return torch.cat(
            [hidden, rows, kernels.gathered_sum(hidden, out, *chosen, True, ARRIVED).to(dtype)], 1
        )

    cpp, plain = both(monkeypatch, call)
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    assert (cpp - plain).abs().max() <= tolerance * plain.abs().max()


@DTYPES
@pytest.mark.parametrize("kind", ["int4", "int8", "same"])
def test_select_and_compact(monkeypatch, dtype, kind):
    # Small integers: scores are exact in any order
    width, rank = (248, 24) if kind == "int4" else (83, 19)
    source = torch.randint(-3, 4, (2, width)).to(dtype)
    down, up = torch.randint(-1, 2, (rank, width)), torch.randint(-1, 2, (101, rank))
    stored = {"int4": pack, "int8": torch.Tensor.char, "same": lambda matrix: matrix.to(dtype)}
    down, up = stored[kind](down), stored[kind](up)
    bias = torch.randint(-9, 9, (101,)).float()
    cpp, plain = both(monkeypatch, lambda: kernels.select(source, down, up, bias))
    assert torch.equal(cpp[0], plain[0])
    assert int(cpp[1]) == int(plain[1])
    monkeypatch.undo()
    values = torch.randn(2, 101).to(dtype)
    values[1, 50] = float("nan")
    cpp, plain = both(monkeypatch, lambda: kernels.compact(values, 1.5))
    assert torch.equal(cpp[0], plain[0])
    assert 50 in cpp[0].tolist()
    monkeypatch.undo()
    scale = torch.rand(101)
    cpp, plain = both(monkeypatch, lambda: kernels.compact(values, 0.5, scale))
    assert torch.equal(cpp[0], plain[0])
    assert int(cpp[1]) == int(plain[1])


@DTYPES
@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("with_bias", [True, False])
def test_gemv_equals_float64(dtype, m, count, with_bias):
    x = torch.randn(m, 83).to(dtype)
    weights = [torch.randn(n, 83).to(dtype) for n in (101, 7, 64)][:count]
    biases = [torch.randn(w.shape[0]).to(dtype) for w in weights] if with_bias else []
    exact = x.double() @ torch.cat(weights).double().T
    low = x @ torch.cat(weights).T
    if with_bias:
        exact, low = exact + torch.cat(biases).double(), low + torch.cat(biases)
    for form in (kernels.gemv, kernels.gemv_reference):
        given = biases or [None] * count
        models.assert_as_exact_as(low, form(x, weights, given, "identity"), exact)
        relu = form(x, weights, given, "relu")
        models.assert_as_exact_as(low.relu(), relu, exact.relu(), among=exact)


def test_gemv_opcheck():
    x, weight = torch.randn(2, 63), torch.randn(50, 63)
    for arguments in (
        ([weight], [None]),
        ([weight, weight[:7]], [torch.randn(50), torch.randn(7)]),
    ):
        torch.library.opcheck(torch.ops.dejavu.gemv.default, (x, *arguments, "relu2"))


def test_gemv_without_a_compiler(no_compiler):
    x, weight = torch.randn(2, 63), torch.randn(50, 63)
    models.assert_near(
        kernels.gemv(x, [weight], [None], "identity"), (x @ weight.T).double(), 1e-5
    )


def test_threads_change_no_bit():
    hidden, weight, chosen = torch.randn(1, 500), torch.randn(500, 300), selection(500, 3)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(kernels.gathered_sum(hidden, weight, *chosen, True, ARRIVED))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_compiler_that_fails_is_told_of_once(monkeypatch, caplog):
    def fail(source):
        raise OSError("no compiler here")

    monkeypatch.setattr(cpu, "load_cpp", fail)
    monkeypatch.setattr(cpu, "_library", cpu._library.__wrapped__)
    monkeypatch.setattr(cpu, "function", cpu.function.__wrapped__)
    with caplog.at_level(logging.WARNING):
        assert cpu.function("rows", torch.float32) is None
    assert "no compiler here" in caplog.text


@pytest.mark.parametrize("slots", [1, 15, 19, 65])
def test_attention_weights_are_a_softmax_to_the_last_bits(slots):
    """Values of ones and zeros give the weights themselves; scores reach from 0 to -300."""
    q = torch.ones(1, 1, 1, 1)
    k = -(torch.rand(1, 1, slots, 1) * 18).square()
    k[..., slots // 2, :] = 0
    v = torch.eye(slots)[None, None]
    y = kernels.decode_attention(q, k, v, None, 1.0, 0.0, None, ARRIVED)
    exact = k.double().flatten().softmax(0)
    seen = exact > 1e-36
    assert ((y.flatten().double() - exact).abs() / exact)[seen].max() < 1e-6
    assert (y.flatten()[~seen] < 1e-35).all()


def test_attention_keeps_nan_visible():
    q, k, v = torch.ones(1, 2, 1, 8), torch.zeros(1, 2, 20, 8), torch.ones(1, 2, 20, 8)
    k[0, 0, 7, 3] = float("nan")
    y = kernels.decode_attention(q, k, v, None, 1.0, 0.0, None, ARRIVED)
    assert y[0, 0].isnan().all()
    assert torch.equal(y[0, 1], torch.ones(1, 8))
