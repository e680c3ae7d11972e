"""The Triton kernels against their references. Not collected by name: `test_interpreter.py` runs it.

With TRITON_INTERPRET=1 the kernels run on CPU tensors, else on the GPU. Whatever a launcher allocates is
filled with NaN or wild indices first, so that an element that no program writes shows up.
"""

import importlib
import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import sketch_inputs, sketch_oracle
from launched import operations
from strategies import kernel_cases

from dejavu_compile import launches
from dejavu_compile.kernels import (
    attention_reference,
    compact_reference,
    gathered_glu_reference,
    gathered_rows_reference,
    gathered_sum_reference,
    gemv_reference,
    head_sum_reference,
    select_reference,
)
from dejavu_compile.kernels._triton import empty
from dejavu_compile.kernels.gemv import running, running_rows
from dejavu_compile.kernels.nibbles import pack, unpacked
from dejavu_compile.kernels.pairs import pack_pairs

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
TRITON = importlib.import_module("dejavu_compile.kernels._triton")
# The functions `select`, ... of the package hide the modules of the same name.
ATTENTION, GEMV, HEADS, ROWS, SELECT, SELECTION, SKETCH, SUM = (
    importlib.import_module(f"dejavu_compile.kernels.{name}")
    for name in (
        "attention", "gemv", "heads", "rows", "select", "selection", "sketch", "gathered_sum",
    )
)  # fmt: skip
WILD = 2**30
ARRIVED = torch.zeros(4096, dtype=torch.int32, device=DEVICE)

DTYPES = pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16] + ([] if INTERPRETED else [torch.float16]),
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
TOKENS = pytest.mark.parametrize("m", [1, 3], ids=["m1", "m3"])
# Rows are read once for four tokens at most
SEVERAL = pytest.mark.parametrize("m", [1, 3, 6], ids=["m1", "m3", "m6"])
# The interpreter takes milliseconds a program
SIZES = pytest.mark.parametrize(
    ("n", "d"), [(9, 63)] if INTERPRETED else [(100, 63), (1000, 128), (3001, 2048), (515, 4100)],
    ids=lambda v: str(v),
)  # fmt: skip
ADDED = pytest.mark.parametrize("most_left", [2**30, 0], ids=["left", "added"], indirect=True)
SHARES = pytest.mark.parametrize(
    "share", ["none", "some", "all"] if INTERPRETED else ["none", "one", "some", "all"]
)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Outputs and scratch that start as NaN or as indices far outside."""

    def poison(*shape, like, dtype=None):
        out = empty(*shape, like=like, dtype=dtype)
        return out.fill_(float("nan") if out.is_floating_point() else WILD)

    ARRIVED.zero_()
    for module in (ATTENTION, GEMV, HEADS, ROWS, SELECT, SELECTION, SKETCH, SUM):
        monkeypatch.setattr(module, "empty", poison)
    yield
    assert not ARRIVED.any(), "counters are left at zero for the next launch"


@pytest.fixture
def most_left(request, monkeypatch):
    """Parts that a sum of one token leaves, or adds up itself."""
    monkeypatch.setattr(TRITON, "MOST_LEFT", request.param)


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(DEVICE, dtype)


def chosen(n, share):
    """A selection, with wild indices past its count."""
    keep = {
        "none": torch.zeros(n, dtype=torch.bool),
        "one": torch.arange(n) == n - 1,
        "some": torch.arange(n) % 3 == 1,
        "all": torch.ones(n, dtype=torch.bool),
    }[share]
    units = keep.nonzero().flatten()
    index = torch.full((n,), WILD, dtype=torch.int32)
    index[: len(units)] = units
    return index.to(DEVICE), torch.tensor(len(units), dtype=torch.int32, device=DEVICE)


def assert_selection(got, expected):
    index, count = got[:2]
    assert int(count) == int(expected[1])
    assert torch.equal(index, expected[0])


def assert_live(got, exact, selection, dtype):
    """Slots past the count are never written: what they held stays there."""
    k = int(selection[1])
    assert got[:, k:].isnan().all()
    assert_close(got[:, :k], exact[:, :k], dtype)


def assert_close(got, exact, dtype, sums=2e-6):
    """Both accumulate in fp32; what differs is the order of sums and one rounding."""
    assert got.shape == exact.shape
    eps = torch.finfo(dtype).eps
    scale = exact.double().abs().max().clamp_min(1) if exact.numel() else 1
    error = (got.double() - exact.double()).abs()
    assert not got.isnan().any()
    assert not error.numel() or error.max() <= (eps + sums) * scale


def launch_select(source, down, up, bias):
    return SELECT.launch_select(SELECT.select_kernels(source, down, up), source, down, up, bias)


@DTYPES
@TOKENS
@pytest.mark.parametrize("n", [33, 2500] if INTERPRETED else [1, 33, 2500, 20000])
@pytest.mark.parametrize("threshold", [0.0, 1e9])
def test_compact(n, m, dtype, threshold):
    values = randn(m, n, dtype=dtype)
    values[:, ::4] = 0
    got = SELECTION.launch_compact(SELECTION._compact_kernel, values, threshold)
    assert_selection(got, compact_reference(values, threshold))


@DTYPES
@TOKENS
def test_compact_by_scaled_values(m, dtype):
    values, scale = randn(m, 2500, dtype=dtype), randn(2500).abs()
    scale[::3] = 0
    for threshold in (0.7, float("-inf")):
        got = SELECTION.launch_compact(SELECTION._compact_kernel, values, threshold, scale)
        assert_selection(got, compact_reference(values, threshold, scale))


def test_compact_keeps_nan():
    values = torch.zeros(2, 100, device=DEVICE)
    values[1, 70] = float("nan")
    got = SELECTION.launch_compact(SELECTION._compact_kernel, values, 1e30)
    assert (int(got[1]), int(got[0][0])) == (1, 70)


@DTYPES
@TOKENS
@pytest.mark.parametrize(
    ("n", "d"), [(37, 32), (3, 4352)] if INTERPRETED else [(37, 32), (1000, 4096), (333, 9232)]
)
def test_sketch(n, d, m, dtype):
    """With one element of x a thousand times the others, as residual streams have."""
    x, gate, up, numbers = sketch_inputs(n, d, m, dtype)
    x[:, 7] *= 1000
    inputs = (x, gate, up, numbers)
    got = SKETCH.launch_sketch(SKETCH._sketch_kernel, *(t.to(DEVICE) for t in inputs), "silu")
    exact = sketch_oracle(*inputs)
    assert got.dtype is torch.float32
    # A block of x keeps 13 or 20 bits below its largest element; such errors add up like noise. Weights are 4.6 and 1.1
    # steps on average: so much steeper is one factor than x, and so much larger than x the other.
    noise = x.abs().max() * 2.0 ** (-20 if dtype is torch.float32 else -13) * d**0.5
    size = x.double().norm(dim=1, keepdim=True) + 2
    bound = 4 * noise * 4.6 * 1.1 * size * numbers[0] * numbers[2]
    assert ((got.cpu() - exact).abs() <= bound + 4e-6 * exact.max()).all()


def test_sketch_of_every_code():
    """In each place of a word, of either matrix: exact."""
    x = torch.arange(1.0, 17.0)[None]
    for column in range(16):
        nibbles, pairs = torch.zeros(64, 16), torch.zeros(64, 16, dtype=torch.int8)
        nibbles[:, column] = torch.arange(64) % 16 - 8
        pairs[:, column] = torch.arange(64) // 16
        inputs = x, pack(nibbles), pack_pairs(pairs), torch.tensor([1.0, 0, 1, 0, 0])[:, None] * torch.ones(64)  # fmt: skip
        got = SKETCH.launch_sketch(
            SKETCH._sketch_kernel, *(t.to(DEVICE) for t in inputs), "identity"
        )
        other = (x * (pairs - 1.5)).sum(1)
        exact = ((torch.arange(64) % 16 - 8) * x[0, column] * other).abs()
        assert torch.equal(got[0].cpu(), exact)


def test_sketch_keeps_nan():
    x, *rest = (t.to(DEVICE) for t in sketch_inputs(37, 64, 2))
    x[1, 40] = float("nan")
    got = SKETCH.launch_sketch(SKETCH._sketch_kernel, x, *rest, "silu").isnan()
    assert got[1].all() and not got[0].any()


def exact_predictor(m, n, s, r, dtype):
    """Small integers: scores are exact in any order, so that the lists have to be equal."""
    source = torch.randint(-3, 4, (m, s)).to(DEVICE, dtype)
    down = torch.randint(-1, 2, (r, s)).to(DEVICE)
    up = torch.randint(-1, 2, (n, r)).to(DEVICE)
    return source, down, up, torch.randint(-20, 20, (n,)).to(DEVICE, torch.float32)


def as_stored(matrix, kind):
    return pack(matrix) if kind == "int4" else matrix.to(kind)


@pytest.mark.parametrize("weights", ["same", "int8"])
@DTYPES
@TOKENS
@pytest.mark.parametrize(
    ("n", "s", "r"),
    [(33, 63, 3), (33, 64, 8)]
    if INTERPRETED
    else [(100, 63, 16), (33, 5000, 3), (1, 7, 1), (100, 64, 16), (33, 5000, 48), (70, 1100, 640)],
)
def test_select(n, s, r, m, dtype, weights):
    source, down, up, bias = exact_predictor(m, n, s, r, dtype)
    kind = torch.int8 if weights == "int8" else dtype
    down, up = down.to(kind), up.to(kind)
    for shift in (0.0, 1e6):
        got = launch_select(source, down, up, bias + shift)
        assert_selection(got, select_reference(source, down, up, bias + shift))


@DTYPES
@TOKENS
@pytest.mark.parametrize(
    ("n", "s", "r"),
    [(33, 64, 8), (5, 1608, 24)]
    if INTERPRETED
    else [(100, 64, 16), (33, 5000, 48), (70, 1104, 640), (1000, 4096, 2080), (1, 8, 8)],
)
def test_select_of_nibbles(n, s, r, m, dtype):
    source, down, up, bias = exact_predictor(m, n, s, r, dtype)
    down, up = pack(down), pack(up)
    for shift in (0.0, 1e6):
        got = launch_select(source, down, up, bias + shift)
        assert_selection(got, select_reference(source, down, up, bias + shift))


def test_select_of_every_nibble():
    """In each place of a word, of either matrix."""
    every = torch.arange(-8, 8)
    source = torch.arange(1.0, 9.0, device=DEVICE)[None]
    for column in range(8):
        x = float(source[0, 7 - column])
        down, up = torch.zeros(8, 8), torch.zeros(16, 8)
        down[column, 7 - column] = 1
        up[:, column] = every
        down_of_each, one = torch.zeros(16, 8), torch.eye(16)
        down_of_each[:, 7 - column] = every
        for matrices in ((down, up), (down_of_each, one)):
            down_, up_ = (pack(m).to(DEVICE) for m in matrices)
            for at in (-8, -1, 7):
                bias = torch.full((16,), -at * x, device=DEVICE)
                got = launch_select(source, down_, up_, bias)
                assert got[0][: int(got[1])].tolist() == list(range(at + 9, 16))


@pytest.mark.parametrize("words", [False, True], ids=["bytes", "words"])
def test_select_of_every_int8(words):
    every = torch.arange(-128, 128, device=DEVICE).to(torch.int8)[:, None]
    width = 4 if words else 1
    source = torch.ones(1, width, device=DEVICE)
    down, up = torch.zeros(width, width), torch.zeros(256, width)
    down[-1, 0] = 1
    down, up = down.to(DEVICE, torch.int8), up.to(DEVICE, torch.int8)
    up[:, -1:] = every
    for at in (-128, -1, 127):
        bias = torch.full((256,), -float(at), device=DEVICE)
        assert int(launch_select(source, down, up, bias)[1]) == 127 - at


@pytest.mark.parametrize("kind", [torch.int8, "int4"], ids=["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_scores_keep_the_precision_of_the_source(dtype, kind):
    """One element a thousand times the others, as residual streams have."""
    n, s, r = (64, 256, 16) if INTERPRETED else (2000, 4096, 640)
    source = randn(2, s, dtype=dtype)
    source[:, 7] *= 1000
    most = 7 if kind == "int4" else 127
    down, up = (
        as_stored(torch.randint(-most, most + 1, shape, device=DEVICE), kind)
        for shape in ((r, s), (n, r))
    )
    exact = (source.double() @ unpacked(down).double().T @ unpacked(up).double().T)[:1]
    margin = exact.norm() / n**0.5 * (1e-4 if dtype is torch.float32 else 4e-3)
    for margin_, selected in ((margin, n), (-margin, 0)):
        bias = (-exact[0] + margin_).float()
        assert int(launch_select(source[:1], down, up, bias)[1]) == selected


@pytest.mark.parametrize(
    ("kind", "width"),
    [(torch.float32, 63), (torch.float32, 64), (torch.int8, 63), (torch.int8, 64), ("int4", 64)],
)
def test_select_keeps_nan(kind, width):
    source, down, up, bias = exact_predictor(2, 100, width, 16, torch.float32)
    down, up = as_stored(down, kind), as_stored(up, kind)
    bias[:] = -1e6
    bias[40] = float("nan")
    got = launch_select(source, down, up, bias)
    assert (int(got[1]), int(got[0][0])) == (1, 40)
    for value in ("nan", "inf"):
        source[1, 5] = float(value)
        # -inf scores are a plain no; what no score can be computed for is kept
        expected = select_reference(source, down, up, bias)
        got = launch_select(source, down, up, bias)
        assert set(expected[0][: int(expected[1])].tolist()) <= set(got[0][: int(got[1])].tolist())


@DTYPES
@SEVERAL
@SIZES
@SHARES
def test_rows(n, d, m, dtype, share):
    x, weight, bias = randn(m, d, dtype=dtype), randn(n, d, dtype=dtype), randn(n, dtype=dtype)
    selection = chosen(n, share)
    for b in (None, bias):
        got = ROWS.launch_rows(ROWS._rows_kernel, x, weight, b, selection, "identity")
        expected = gathered_rows_reference(x, weight, b, *selection, "identity")
        assert got.dtype is dtype
        assert_live(got, expected, selection, dtype)


@pytest.mark.parametrize("activation", ROWS.REFERENCE)
@TOKENS
def test_activations(activation, m):
    x, weight, bias, selection = randn(m, 63), randn(9, 63) / 8, randn(9), chosen(9, "some")
    got = ROWS.launch_rows(ROWS._rows_kernel, x, weight, bias, selection, activation)
    expected = gathered_rows_reference(x, weight, bias, *selection, activation)
    assert_live(got, expected, selection, torch.float32)
    x[0, 5] = float("nan")
    k = int(selection[1])
    got = ROWS.launch_rows(ROWS._rows_kernel, x, weight, bias, selection, activation)
    assert got[0, :k].isnan().all()
    assert not got[1:, :k].isnan().any()


@DTYPES
@SEVERAL
@SHARES
@pytest.mark.parametrize("activation", ["silu"])
def test_glu_of_interleaved_rows(m, dtype, share, activation):
    n, d = 9, 63
    x, both = randn(m, d, dtype=dtype), randn(2 * n, d, dtype=dtype)
    gate_bias, up_bias, selection = randn(n, dtype=dtype), randn(n, dtype=dtype), chosen(n, share)
    for gate, up in ((both[::2], both[1::2]), (both[:n], both[n:])):
        got = ROWS.launch_rows(
            ROWS._rows_kernel, x, gate, gate_bias, selection, activation, up, up_bias
        )
        expected = gathered_glu_reference(x, gate, gate_bias, up, up_bias, *selection, activation)
        assert_live(got, expected, selection, dtype)


def test_strided_bias():
    """`interleaved(x) + bias` is rewritten to rows with every second element of the bias."""
    x, weight, bias, selection = randn(1, 63), randn(200, 63), randn(200), chosen(100, "some")
    got = ROWS.launch_rows(ROWS._rows_kernel, x, weight[::2], bias[::2], selection, "identity")
    expected = gathered_rows_reference(x, weight[::2], bias[::2], *selection, "identity")
    assert_live(got, expected, selection, torch.float32)


@DTYPES
@SEVERAL
@SIZES
def test_gemv(n, d, m, dtype):
    x = randn(m, d, dtype=dtype)
    sizes = (n, n // 2 + 1, 3, 5)
    weights = [randn(size, d, dtype=dtype) for size in sizes]
    biases = [randn(size, dtype=dtype) for size in sizes]
    for k in (1, 2, 3, 4):
        for absent in ((), (0,), (0, 1, 2, 3)):
            used = [None if i in absent else b for i, b in enumerate(biases[:k])]
            got = GEMV.launch_gemv(GEMV._gemv_kernel, x, weights[:k], used, "relu")
            exact = F.linear(x.double(), torch.cat(weights[:k]).double())
            exact += torch.cat([b.double() * (i not in absent) for i, b in enumerate(biases[:k])])
            assert_close(got, F.relu(exact), dtype)


@pytest.mark.parametrize("compacted", [True, False], ids=["by_slot", "by_unit"])
@DTYPES
@SEVERAL
@SIZES
@SHARES
@ADDED
def test_sum(n, d, m, dtype, share, compacted, most_left):
    selection = chosen(n, share)
    k = int(selection[1])
    hidden = torch.full((m, n), float("nan"), dtype=dtype, device=DEVICE)
    live = slice(0, k) if compacted else selection[0][:k].long()
    hidden[:, live] = randn(m, k, dtype=dtype)
    fused = randn(2 * n, d, dtype=dtype)
    for weight in (fused[n:], fused[::2]):
        got = SUM.launch_sum(SUM._sum_kernel, hidden, weight, *selection, compacted, ARRIVED).sum(
            0
        )
        expected = gathered_sum_reference(hidden, weight, *selection, compacted)
        assert got.dtype is torch.float32
        assert_close(got, expected, torch.float32)


def test_many_units():
    """In the interpreter fewer, but more than one block of everything."""
    n, d = (200 if INTERPRETED else 10000), 63
    x, weight = randn(1, d), randn(n, d)
    selection = SELECTION.launch_compact(SELECTION._compact_kernel, randn(1, n), 1.0)
    rows = ROWS.launch_rows(ROWS._rows_kernel, x, weight, None, selection, "relu")
    expected = gathered_rows_reference(x, weight, None, *selection, "relu")
    assert_live(rows, expected, selection, torch.float32)
    expected = gathered_sum_reference(rows, weight, *selection, True)
    # Four blocks at once, and then one after the other
    several = {"BLOCK_J": 4, "BLOCK_D": 32, "num_warps": 4, "splits": 3, "FOUR": True}
    for config in (None, several, {**several, "splits": 1}):
        got = SUM.launch_sum(SUM._sum_kernel, rows, weight, *selection, True, ARRIVED, config)
        assert len(got) == (1 if config is None else config["splits"])
        assert_close(got.sum(0), expected, torch.float32)


@DTYPES
@SEVERAL
def test_rows_times_a_gate_that_is_known(dtype, m):
    n, d = 70, 63
    x, weight, times = randn(m, d, dtype=dtype), randn(n, d, dtype=dtype), randn(m, n, dtype=dtype)
    selection = chosen(n, "some")
    got = ROWS.launch_rows(ROWS._rows_kernel, x, weight, None, selection, "identity", times=times)
    wide = (t.float() for t in (x, weight))
    exact = gathered_rows_reference(*wide, None, *selection, "identity", times.float())
    assert_live(got, exact, selection, dtype)


def test_same_input_gives_the_same_bits():
    hidden, weight, selection = randn(1, 200), randn(200, 63), chosen(200, "some")
    one, two = (
        SUM.launch_sum(SUM._sum_kernel, hidden, weight, *selection, True, ARRIVED)
        for _ in range(2)
    )
    assert torch.equal(one, two)


def scores(m, heads, share):
    """Scores of heads, another set running for each token. A NaN runs."""
    keep = torch.arange(m)[:, None] % 2 == torch.arange(heads) % 2
    keep = {"none": keep & False, "some": keep, "all": keep | True}[share]
    return torch.where(keep, 0.3, 0.0).to(DEVICE)


@DTYPES
@SEVERAL
@pytest.mark.parametrize("share", ["none", "some", "all"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("d", [63] if INTERPRETED else [63, 2048, 4100, 9216])
def test_gemv_skips_rows_of_heads_that_do_not_run(dtype, m, share, bias, d):
    """Heads of 4 rows, with rows of no head between them; what doesn't run is left as it was."""
    owner = torch.tensor([0, -1, 1, -1, 2, 3], dtype=torch.int32, device=DEVICE)
    score, n = scores(m, 4, share), 24
    x, weight, other = randn(m, d, dtype=dtype), randn(n, d, dtype=dtype), randn(7, d, dtype=dtype)
    biases = [randn(n, dtype=dtype) if bias else None, None if bias else randn(7, dtype=dtype)]
    wide = [None if b is None else b.float() for b in biases]
    exact = gemv_reference(
        x.float(), [weight.float(), other.float()], wide, "identity", owner, score
    )
    runs = running_rows(weight, owner, score)
    weight = weight.masked_fill(~runs[:, None], float("nan"))
    got = GEMV.launch_gemv(GEMV._gemv_kernel, x, [weight, other], biases, "identity", owner, score)
    runs = torch.cat([runs, runs.new_ones(7)])
    assert got[:, ~runs].isnan().all()
    assert_close(got[:, runs], exact[:, runs], dtype)


@DTYPES
@SEVERAL
@pytest.mark.parametrize("place", [0, 4])
@pytest.mark.parametrize("skips", [True, False], ids=["heads", "all"])
def test_gemv_writes_keys_and_values_into_their_caches(dtype, m, place, skips):
    """And nothing else of them, nor what it returns for these weights."""
    d, groups, slots, width = 63, 3, 5, 8
    x, sizes = randn(m, d, dtype=dtype), (24, groups * width, 7, groups * width)
    weights = [randn(n, d, dtype=dtype) for n in sizes]
    biases = [randn(sizes[0], dtype=dtype), None, None, randn(sizes[3], dtype=dtype)]
    owner, score = None, None
    if skips:
        owner = torch.tensor([0, -1, 1, -1, 2, 3], dtype=torch.int32, device=DEVICE)
        score = scores(m, 4, "all")
    keys, values = (randn(m, slots, groups, width, dtype=dtype).transpose(1, 2) for _ in range(2))
    before = keys.clone(), values.clone()
    position = torch.tensor(place, device=DEVICE)
    caches = GEMV.Caches(keys, values, position, key=1, value=3)
    got = GEMV.launch_gemv(
        GEMV._gemv_kernel, x, weights, biases, "identity", owner, score, caches=caches
    )
    parts = [
        F.linear(x.double(), w.double(), None if b is None else b.double())
        for w, b in zip(weights, biases, strict=True)
    ]
    left = got.split(sizes, dim=1)
    for i in (0, 2):
        assert_close(left[i], parts[i], dtype)
    for i, cache, old in ((1, keys, before[0]), (3, values, before[1])):
        assert left[i].isnan().all()
        assert_close(cache[:, :, place], parts[i].unflatten(1, (groups, width)), dtype)
        others = torch.arange(slots, device=DEVICE) != place
        assert torch.equal(cache[:, :, others], old[:, :, others])


def test_caches_of_another_layout_are_refused():
    x, weight = randn(1, 16), randn(24, 16)
    keys, values = randn(1, 3, 5, 8), randn(1, 5, 3, 8).transpose(1, 2)
    caches = GEMV.Caches(keys, values, torch.tensor(0, device=DEVICE), 0, 1)
    with pytest.raises(ValueError, match="caches of one layout"):
        GEMV.launch_gemv(GEMV._gemv_kernel, x, [weight] * 2, [None] * 2, "identity", caches=caches)


@DTYPES
@SEVERAL
@pytest.mark.parametrize("share", ["none", "some", "all"])
@pytest.mark.parametrize(
    ("heads", "width", "d"), [(4, 12, 70)] if INTERPRETED else [(4, 12, 70), (72, 128, 4100)]
)
@ADDED
def test_head_sum(dtype, m, share, heads, width, d, most_left):
    score = scores(m, heads, share)
    every = running(score).repeat_interleave(width, dim=1)
    hidden, weight = randn(m, heads * width, dtype=dtype), randn(heads * width, d, dtype=dtype)
    exact = head_sum_reference(hidden.float(), weight.float(), score)
    hidden = hidden.masked_fill(~every, float("nan"))
    # Four blocks at once, and then one after the other, of which each is of one head
    several = {"BLOCK_J": 4, "BLOCK_D": 32, "num_warps": 4, "splits": 2, "FOUR": True}
    for config in (None, several):
        got = HEADS.launch_head_sum(HEADS._head_sum_kernel, hidden, weight, score, ARRIVED, config)
        assert_close(got.sum(0), exact, torch.float32)


MASKS = {
    "none": lambda b, h, s: None,
    "boolean": lambda b, h, s: torch.rand(b, 1, 1, s) > 0.4,
    "added": lambda b, h, s: torch.randn(1, h, 1, s),
    "minus_infinity": lambda b, h, s: torch.where(torch.arange(s) < 9, 0.0, -torch.inf).expand(
        b, 1, 1, s
    ),
    "nothing": lambda b, h, s: torch.zeros(b, 1, 1, s, dtype=torch.bool),
    # Another length for each sequence, and a window: no holes
    "window": lambda b, h, s: (
        torch.arange(s) % (s // 2 + 7 * torch.arange(b)[:, None, None, None] + 1) > s // 3
    ),
}


# The interpreter's matrix products take bfloat16 for integers
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
)
@pytest.mark.parametrize("share", ["none", "some", "all", "dense"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "slots", "d"),
    [(4, 2, 150, 12)]
    if INTERPRETED
    else [(4, 2, 150, 12), (32, 8, 4096, 128), (7, 1, 513, 64), (72, 72, 700, 128)],
)
def test_decode_attention(dtype, share, mask, softcap, heads, kv_heads, slots, d):
    batch = 2
    q = randn(batch, heads, 1, d, dtype=dtype)
    k, v = (randn(batch, kv_heads, slots, d, dtype=dtype) for _ in range(2))
    mask = MASKS[mask](batch, heads, slots)
    if mask is not None:
        mask = mask.to(DEVICE) if mask.dtype is torch.bool else mask.to(DEVICE, dtype)
    score = None if share == "dense" else scores(batch, heads, share)
    exact = attention_reference(q.double(), k.double(), v.double(), mask, 0.3, softcap, score)
    if score is not None:
        q = q.masked_fill(~running(score)[:, :, None, None], float("nan"))
    for config in (
        None,
        {
            **ATTENTION.attention_config(batch * kv_heads, slots, dtype.itemsize),
            "splits": 1,
            "per_split": 4096,
        },
    ):
        got = ATTENTION.launch_attention(
            ATTENTION._attention_kernel, q, k, v, mask, 0.3, softcap, score, ARRIVED, config
        )
        # A softmax turns the rounding of a logit of size 20 into a factor.
        assert_close(got, exact, dtype, sums=4e-6)


# --- shapes, strides and counts that nobody chose -----------------------------------------------------------

CASES = kernel_cases(most=40 if INTERPRETED else 3000, dtypes=("float32",) if INTERPRETED else
                     ("float32", "bfloat16"))  # fmt: skip
FEW = settings(max_examples=6 if INTERPRETED else 8, deadline=None, derandomize=True,
               suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip


@FEW
@given(CASES, st.booleans())
def test_selected_rows_and_their_sum_in_any_shape(case, compacted):
    here = case.on(DEVICE)
    here.check_compact(lambda *args: SELECTION.launch_compact(SELECTION._compact_kernel, *args))
    here.check_rows(
        lambda x, w, b, chosen, act: ROWS.launch_rows(ROWS._rows_kernel, x, w, b, chosen, act)
    )
    here.check_glu(
        lambda x, g, u, chosen, act: ROWS.launch_rows(
            ROWS._rows_kernel, x, g, None, chosen, act, u, None
        )
    )
    here.check_sum(
        lambda hidden, w, chosen, by_slot: SUM.launch_sum(
            SUM._sum_kernel, hidden, w, *chosen, by_slot, ARRIVED
        ).sum(0),
        compacted,
    )


@FEW
@given(CASES, st.booleans(), st.sampled_from([0.0, 2.0]))
def test_heads_in_any_shape(case, masked, softcap):
    here = case.on(DEVICE)
    here.check_gemv(
        lambda x, weights, owner, score: GEMV.launch_gemv(
            GEMV._gemv_kernel, x, weights, [None, None], "identity", owner, score
        )
    )
    here.check_head_sum(
        lambda hidden, w, score: HEADS.launch_head_sum(
            HEADS._head_sum_kernel, hidden, w, score, ARRIVED
        ).sum(0)
    )
    here.check_attention(
        lambda *inputs: ATTENTION.launch_attention(ATTENTION._attention_kernel, *inputs, ARRIVED),
        masked,
        softcap,
    )


# --- block sizes that a search may choose ----------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 3], ids=["m1", "m3"])
@pytest.mark.parametrize("name", operations(1))
def test_every_candidate_computes_what_the_op_does(name, tokens):
    (op, *args), (_, *expected_args) = operations(tokens, DEVICE)[name], operations(tokens)[name]
    exact = op(*expected_args)  # on the CPU, by PyTorch or in C++
    arguments, kernel = launches.arguments_of(op, args), launches.KERNELS[op]
    exact = kernel.written(launches.arguments_of(op, expected_args), exact)
    candidates = kernel.candidates(arguments)
    assert len(candidates) > 3
    for config in candidates:
        got = kernel.written(arguments, kernel.launch(kernel.kernel, arguments, config))
        assert_close(got.cpu(), exact, torch.float32, sums=1e-5)
