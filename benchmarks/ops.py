"""Each op alone on a GPU: time, bytes and share of the copy bandwidth, at the shapes of OPT.

    python benchmarks/ops.py --out benchmarks/results/ops.json [--slots 4096 --group 4 --sweep sum attention]

Each op is captured in one CUDA graph over several layers' weights, so that nothing is answered from the
L2 cache that a real step wouldn't find there. Every result is first compared with its reference.
`--sweep` tries other block sizes of the kernels it names and prints the best ones per shape.
"""

import argparse
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from dejavu_compile import kernels as dk
from dejavu_compile._compat import has_early_launch
from dejavu_compile.bench import copy_bandwidth, environment, time_us, write
from dejavu_compile.kernels.attention import _attention_kernel, launch_attention
from dejavu_compile.kernels.gathered_sum import _sum_kernel, launch_sum
from dejavu_compile.kernels.gemv import _gemv_kernel, launch_gemv
from dejavu_compile.kernels.heads import _head_sum_kernel, launch_head_sum
from dejavu_compile.kernels.nibbles import pack
from dejavu_compile.kernels.rows import _rows_kernel, launch_rows
from dejavu_compile.kernels.select import launch_select, select_kernels
from dejavu_compile.launches import in_a_step
from dejavu_compile.predictors import rank_and_bits

ops = torch.ops.dejavu
RESULTS = Path(__file__).parent / "results"
SHAPES = {
    "4096": (4096, 16384),
    "7168": (7168, 28672),
    "9216": (9216, 36864),
    "12288": (12288, 49152),
}
HEAD_DIM = 128


class Layers:
    """Weights, caches, predictor and a selection for a few layers of one shape."""

    def __init__(
        self, d: int, n: int, density: float, layers: int, slots: int, group: int, bits: int
    ) -> None:
        make = torch.Generator("cuda").manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=make, device="cuda", dtype=torch.bfloat16) * 0.02

        def predictor(*shape: int) -> torch.Tensor:
            made = torch.randint(-7, 8, shape, device="cuda", dtype=torch.int8, generator=make)
            return pack(made) if self.bits == 4 else made

        rank, self.bits = rank_and_bits(2 * d * n * 2, d, n, least_bits=bits)
        self.d, self.n, self.rank, self.count = d, n, rank, round(density * n)
        self.x = normal(1, d)
        self.hidden = normal(1, n)
        self.into = [normal(n, d) for _ in range(layers)]
        self.out = [normal(n, d) for _ in range(layers)]
        self.square = [normal(d, d) for _ in range(layers)]
        self.bias_d = normal(d)
        self.arrived = torch.zeros(4096, dtype=torch.int32, device="cuda")
        self.bias_n = normal(n)
        self.down = [predictor(rank, d) for _ in range(layers)]
        self.up = [predictor(n, rank) for _ in range(layers)]
        self.heads, self.slots, self.group = d // HEAD_DIM, slots, group
        half = torch.arange(self.heads, device="cuda") % 2 == 0
        self.head_score = torch.where(half, 1.0, -1.0).to(torch.bfloat16)[None]
        self.q = normal(1, self.heads, 1, HEAD_DIM)
        self.k, self.v = (
            [normal(1, self.heads // group, slots, HEAD_DIM) for _ in range(layers)]
            for _ in range(2)
        )
        self.mask = torch.ones(1, 1, 1, slots, dtype=torch.bool, device="cuda")
        picked = torch.randperm(n, generator=make, device="cuda")[: self.count]
        self.score_bias = torch.full((n,), -1e6, device="cuda")
        self.score_bias[picked] = 1e6
        self.selection = dk.select_reference(self.x, self.down[0], self.up[0], self.score_bias)


def graph_us(body: Callable[[int], Any], layers: int) -> float:
    """Median time of one layer of `body`, replayed in a CUDA graph over all layers."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(layers):
            body(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(layers):
            body(i)
    return time_us(graph.replay, 20)["p50"] / layers


class _Skip:
    """Stands for a kernel that isn't launched."""

    def __getitem__(self, grid: tuple) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def attention(w: Layers, i: int, score: torch.Tensor | None, **config: Any) -> torch.Tensor:
    """One layer's attention over a full cache."""
    return launch_attention(
        _attention_kernel, w.q, w.k[i], w.v[i], w.mask, 0.1, 0.0, score, w.arrived, **config
    )


def cases(w: Layers) -> dict[str, tuple[Callable[[int], Any], float]]:
    """Name -> (what to run for layer i, bytes that it must read)."""
    d, n, k, r = w.d, w.n, w.count, w.rank * w.bits / 8
    select = select_kernels(w.x, w.down[0], w.up[0])
    row = 2.0 * d * k

    def chain(
        i: int, predict: Any = select, up: Any = _rows_kernel, down: Any = _sum_kernel
    ) -> torch.Tensor:
        index, count, *_ = launch_select(predict, w.x, w.down[i], w.up[i], w.score_bias)
        h = launch_rows(up, w.x, w.into[i], w.bias_n, (index, count), "relu")
        return launch_sum(down, h, w.out[i], index, count, True, w.arrived)

    overlaps = has_early_launch(w.x.device)
    begun_before: list[Sequence[torch.Tensor]] = []
    # As a compiled step launches them in line; of a predictor on a side stream only the second launch is early.
    early = tuple(map(in_a_step, select)), in_a_step(_rows_kernel), in_a_step(_sum_kernel)

    def ahead(i: int) -> torch.Tensor:
        """As a step runs it: the next layer's predictor beside this layer's rows and sum."""
        begun = w.selection if i == 0 else begun_before.pop()
        scratch = ops.select_begin(w.x, w.down[i], w.up[i], w.score_bias, i, overlaps)
        h = launch_rows(early[1], w.x, w.into[i], w.bias_n, begun, "relu")
        y = launch_sum(early[2], h, w.out[i], *begun, True, w.arrived)
        ops.select_join(*scratch[:2], list(scratch[2:]), w.x, i)
        begun_before[:] = [scratch[:2]]
        return y

    def inner(i: int) -> None:
        """Only the first launch of `select`."""
        launch_select((select[0], _Skip(), _Skip()), w.x, w.down[i], w.up[i], w.score_bias)

    def scores(i: int) -> None:
        """Only the second."""
        launch_select((_Skip(), select[1], _Skip()), w.x, w.down[i], w.up[i], w.score_bias)

    return {
        "select: inner": (inner, r * d),
        "select: scores": (scores, r * n),
        "select": (lambda i: launch_select(select, w.x, w.down[i], w.up[i], w.score_bias), r * (d + n)),
        "select, launched early": (lambda i: launch_select(early[0], w.x, w.down[i], w.up[i], w.score_bias), r * (d + n)),
        "rows": (lambda i: launch_rows(_rows_kernel, w.x, w.into[i], w.bias_n, w.selection, "relu"), row),
        "sum": (lambda i: launch_sum(_sum_kernel, w.hidden, w.out[i], *w.selection, True, w.arrived), row),
        "chain": (chain, 2 * row + r * (d + n)),
        "chain, launched early": (lambda i: chain(i, *early), 2 * row + r * (d + n)),
        "chain, one layer ahead": (ahead, 2 * row + r * (d + n)),
        "gemv square": (lambda i: launch_gemv(_gemv_kernel, w.x, [w.square[i]], [w.bias_d], "identity"), 2.0 * d * d),
        "gemv QKV": (lambda i: launch_gemv(_gemv_kernel, w.x, [w.square[i], w.square[i - 1], w.square[i - 2]], [w.bias_d] * 3, "identity"), 6.0 * d * d),
        "cublas square": (lambda i: torch.nn.functional.linear(w.x, w.square[i], w.bias_d), 2.0 * d * d),
        "gemv up": (lambda i: launch_gemv(_gemv_kernel, w.x, [w.into[i]], [w.bias_n], "relu"), 2.0 * d * n),
        "head_sum": (lambda i: launch_head_sum(_head_sum_kernel, w.x, w.square[i], w.head_score, w.arrived), 1.0 * d * d),
        "attention": (lambda i: attention(w, i, None), 4.0 * d // w.group * w.slots),
        "attention, half": (lambda i: attention(w, i, w.head_score), 2.0 * d // w.group * w.slots),
        "cublas up": (lambda i: torch.nn.functional.linear(w.x, w.into[i], w.bias_n), 2.0 * d * n),
    }  # fmt: skip


def check(w: Layers) -> None:
    """Every launcher against its reference."""
    index, count, *_ = launch_select(
        select_kernels(w.x, w.down[0], w.up[0]), w.x, w.down[0], w.up[0], w.score_bias
    )
    torch.testing.assert_close(index, w.selection[0])
    assert int(count) == w.count
    got = launch_rows(_rows_kernel, w.x, w.into[0], w.bias_n, w.selection, "relu")
    want = dk.gathered_rows_reference(w.x, w.into[0], w.bias_n, *w.selection, "relu")
    torch.testing.assert_close(got[:, : w.count], want[:, : w.count], rtol=2e-2, atol=1e-3)
    got = launch_sum(_sum_kernel, w.hidden, w.out[0], *w.selection, True, w.arrived).sum(dim=0)
    want = dk.gathered_sum_reference(w.hidden, w.out[0], *w.selection, True)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    got = launch_gemv(_gemv_kernel, w.x, [w.square[0]], [w.bias_d], "identity")
    torch.testing.assert_close(
        got, torch.nn.functional.linear(w.x, w.square[0], w.bias_d), rtol=2e-2, atol=2e-3
    )
    got = launch_head_sum(_head_sum_kernel, w.x, w.square[0], w.head_score, w.arrived).sum(dim=0)
    want = dk.head_sum_reference(w.x, w.square[0], w.head_score)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    for score in (None, w.head_score):
        want = dk.attention_reference(w.q, w.k[0], w.v[0], w.mask, 0.1, 0.0, score)
        torch.testing.assert_close(attention(w, 0, score), want, rtol=2e-2, atol=1e-3)


def timed(
    run: Callable[..., Any], configs: Iterable[dict[str, int]], layers: int
) -> list[tuple[float, dict[str, int]]]:
    """`run(layer, config)` under each of the configs that fits the chip, fastest first."""
    from triton.runtime.errors import OutOfResources

    found = []
    for config in configs:
        try:
            found.append((graph_us(lambda i, c=config: run(i, c), layers), config))
        except OutOfResources:
            continue
    return sorted(found, key=lambda pair: pair[0])


def grid(**values: tuple[int, ...]) -> list[dict[str, int]]:
    """Every combination."""
    return [
        dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())
    ]


def sweep(w: Layers, layers: int, names: Sequence[str]) -> None:
    """Print the best block sizes of the named kernels at this shape."""
    blocks = -(-w.slots // 64)
    candidates = {
        "rows": (
            lambda i, c: launch_rows(
                _rows_kernel, w.x, w.into[i], w.bias_n, w.selection, "relu", config=c
            ),
            grid(BLOCK_J=(1, 2, 4), BLOCK_D=(1024, 2048, 4096), num_warps=(4, 8), programs=(1056, 2112)),
        ),
        "gemv": (
            lambda i, c: launch_gemv(
                _gemv_kernel, w.x, [w.square[i]], [w.bias_d], "identity", config=c
            ),
            grid(BLOCK_J=(1, 2, 4), BLOCK_D=(512, 1024, 2048), num_warps=(4, 8), LOOP=(False, True)),
        ),
        "sum": (
            lambda i, c: launch_sum(
                _sum_kernel, w.hidden, w.out[i], *w.selection, True, w.arrived, config=c
            ),
            grid(BLOCK_J=(8, 16, 32), BLOCK_D=(128, 256, 512), num_warps=(4,), splits=(8, 16, 32)),
        ),
        "head_sum": (
            lambda i, c: launch_head_sum(
                _head_sum_kernel, w.x, w.square[i], w.head_score, w.arrived, config=c
            ),
            grid(BLOCK_J=(16, 32, 64), BLOCK_D=(128, 256), num_warps=(4,), splits=(8, 16, 32)),
        ),
        "attention": (
            lambda i, c: attention(w, i, w.head_score, config=c),
            [
                {"splits": -(-blocks // per), "per_split": 64 * per, "BLOCK_S": block,
                 "num_warps": warps, "STAGES": stages}
                for per in (1, 2, 4, 8, 16) if per <= blocks and -(-blocks // per) <= 64
                for block in (32, 64, 128) if block <= 64 * per
                for stages in ((1,) if block >= 64 * per else (1, 2, 3))
                for warps in (4,)
            ],
        ),
    }  # fmt: skip
    for name in names:
        results = timed(*candidates[name], layers)
        best = (f"\n    {us:6.2f} us {c}" for us, c in [*results[:4], results[-1]])
        print(name, w.d, w.slots, *best, flush=True)


def main() -> None:
    """Parse the command line, run, print one table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--slots", type=int, default=512, help="length of the cache")
    parser.add_argument("--group", type=int, default=1, help="heads that share keys")
    parser.add_argument(
        "--bits", type=int, choices=(4, 8), default=4, help="of a predictor's weight"
    )
    parser.add_argument("--sweep", nargs="*", default=[], help="kernels to try block sizes of")
    parser.add_argument("--out", type=Path, default=RESULTS / "ops.json")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("ops.py needs an NVIDIA GPU: nothing was measured")
        return
    print(environment(), flush=True)
    rows = []
    for shape in args.shapes:
        w = Layers(*SHAPES[shape], args.density, args.layers, args.slots, args.group, args.bits)
        check(w)
        for name, (body, num_bytes) in cases(w).items():
            us = graph_us(body, args.layers)
            share = num_bytes / copy_bandwidth() * 1e6 / us
            rows.append(
                {"shape": shape, "op": name, "us": us, "bytes": num_bytes, "share_of_floor": share}
            )
            print(
                f"{shape:>6} {name:<24}{us:8.2f} us {num_bytes / 1e6:9.2f} MB {share:6.0%}",
                flush=True,
            )
        if args.sweep:
            sweep(w, args.layers, args.sweep)
    write(args.out, {"density": args.density, "rows": rows})


if __name__ == "__main__":
    main()
