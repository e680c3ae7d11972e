"""`select_begin` and `select_join` are `select`, on another stream; and under CUDA graphs."""

import importlib
from functools import partial

import pytest
import torch
from torch import nn

from dejavu_compile._compat import has_early_launch
from dejavu_compile.kernels import (
    gathered_rows,
    gathered_rows_reference,
    gathered_sum,
    gathered_sum_reference,
    select,
    select_begin,
    select_join,
    select_reference,
)
from dejavu_compile.kernels._triton import EARLY, HEADS_START, ROWS_START, LaunchedEarly
from dejavu_compile.kernels.nibbles import pack

GEMV = importlib.import_module("dejavu_compile.kernels.gemv")
ROWS = importlib.import_module("dejavu_compile.kernels.rows")


def predictor(m=2, n=100, s=63, r=16, device="cpu", dtype=torch.float32):
    made = (torch.randn(m, s), torch.randn(r, s), torch.randn(n, r))
    return (*(t.to(device, dtype) for t in made), torch.randn(n).to(device))


def packed_predictor(m, n, s, r, device, dtype):
    down, up = (pack(torch.randint(-7, 8, shape, dtype=torch.int8)) for shape in ((r, s), (n, r)))
    source, bias = torch.randn(m, s, dtype=dtype), torch.randn(n)
    return tuple(t.to(device) for t in (source, down, up, bias))


def test_begin_is_select_on_the_cpu():
    arguments = predictor()
    index, count, *scratch = select_begin(*arguments, 0)
    select_join(index, count, scratch, arguments[0], 0)
    expected = select(*arguments)
    assert torch.equal(index, expected[0])
    assert torch.equal(count, expected[1])


def test_opcheck_begin():
    torch.library.opcheck(torch.ops.dejavu.select_begin.default, (*predictor(), 0))
    strided = (torch.randn(63, 2).T, *predictor()[1:])
    torch.library.opcheck(torch.ops.dejavu.select_begin.default, (*strided, 0))


def test_opcheck_join():
    arguments = predictor()
    index, count, *scratch = select_begin(*arguments, 0)
    torch.library.opcheck(
        torch.ops.dejavu.select_join.default, (index, count, scratch, arguments[0], 0)
    )


def ahead(source, down, up, bias, weight):
    index, count, *scratch = torch.ops.dejavu.select_begin(source, down, up, bias, 0)
    between = torch.relu(source) @ weight.T
    torch.ops.dejavu.select_join(index, count, scratch, source, 0)
    rows = torch.ops.dejavu.gathered_rows(source, weight, None, index, count, "relu")
    return rows, between, index, count


@torch.no_grad()
def test_join_stays_before_the_readers_when_compiled():
    weight = torch.randn(100, 63)
    compiled = torch.compile(ahead, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        arguments = (*predictor(), weight)
        for got, expected in zip(compiled(*arguments), ahead(*arguments), strict=True):
            torch.testing.assert_close(got, expected)


# --- CUDA graphs: one selection a replay, never that of the capture ------------------------------------


def select_inline(source, down, up, bias):
    return select(source, down, up, bias)


def select_aside(source, down, up, bias, early=False):
    index, count, *scratch = select_begin(source, down, up, bias, 0, early)
    nn.functional.relu(source) @ source.T  # work that the side stream overlaps
    select_join(index, count, scratch, source, 0)
    return index, count


@pytest.mark.gpu
@pytest.mark.parametrize(
    "how",
    [select_inline, select_aside, partial(select_aside, early=True)],
    ids=["inline", "side_stream", "early"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("make", "d"), [(predictor, 63), (packed_predictor, 64)])
@torch.no_grad()
def test_cuda_graph_replay_selects_anew(how, dtype, make, d):
    n = 1000
    if isinstance(how, partial) and not has_early_launch(torch.device("cuda")):
        pytest.skip("this GPU launches no kernel early")
    source, down, up, bias = make(1, n, d, 16, "cuda", dtype)
    weight, out = (torch.randn(n, d, device="cuda", dtype=dtype) / 8 for _ in range(2))
    arrived = torch.zeros(256, dtype=torch.int32, device="cuda")

    def step():
        index, count = how(source, down, up, bias)
        hidden = gathered_rows(source, weight, None, index, count, "relu")
        return index, count, gathered_sum(hidden, out, index, count, True, arrived)

    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        index, count, result = step()

    counts = set()
    for shift in (0.0, 10.0, -10.0, 1e6, -1e6):
        source.copy_(torch.randn(1, d))
        bias.copy_(torch.randn(n) + shift)
        graph.replay()
        torch.cuda.synchronize()
        expected = select_reference(source, down, up, bias)
        near = (int(count) - int(expected[1])) / n
        assert abs(near) < 0.01  # a score of nearly zero may fall on either side
        hidden = gathered_rows_reference(source, weight, None, index, count, "relu")
        exact = gathered_sum_reference(hidden, out, index, count, True)
        torch.testing.assert_close(result, exact, rtol=2e-2, atol=2e-2)
        counts.add(int(count))
    assert {0, n} <= counts
    assert len(counts) >= 4


@pytest.mark.gpu
@torch.no_grad()
def test_rows_that_read_a_joined_selection_before_they_wait_read_this_replays():
    if not has_early_launch(torch.device("cuda")):
        pytest.skip("this GPU launches no kernel early")
    n, d = 16384, 1024
    source, down, up, bias = packed_predictor(1, n, d, 256, "cuda", torch.bfloat16)
    weight = torch.randn(n, d, device="cuda", dtype=torch.bfloat16)
    early = LaunchedEarly(ROWS._rows_kernel, EARLY | HEADS_START | ROWS_START)

    def step():
        index, count, *scratch = select_begin(source, down, up, bias, 0, True)
        hidden = GEMV.launch_gemv(
            LaunchedEarly(GEMV._gemv_kernel), source, [weight[:d]], [None], "relu"
        )
        select_join(index, count, scratch, source, 0)
        rows = ROWS.launch_rows(early, hidden, weight, None, (index, count), "relu")
        return hidden, index, count, rows

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        hidden, index, count, rows = step()
    for seed in range(20):
        bias.copy_(1e6 * torch.randn(n, generator=torch.Generator().manual_seed(seed)).sign())
        index.zero_()  # where nothing waits, this unit is read again and again
        graph.replay()
        torch.cuda.synchronize()
        chosen = (bias > 0).nonzero().flatten()
        assert torch.equal(index[: int(count)], chosen.int())
        exact = torch.relu(hidden.float() @ weight[chosen].float().T)
        torch.testing.assert_close(rows[:, : int(count)].float(), exact, rtol=2e-2, atol=2e-1)
