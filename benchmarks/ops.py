"""Each op alone on a GPU: time, bytes and share of the copy bandwidth, at the shapes of OPT.

    python benchmarks/ops.py --out benchmarks/results/ops.json [--sweep]

Each op is captured in one CUDA graph over several layers' weights, so that nothing is answered from the
L2 cache that a real step wouldn't find there. Every result is first compared with its reference.
`--sweep` tries other block sizes and prints the best ones per shape.
"""

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dejavu_compile import kernels as dk
from dejavu_compile.bench import COPY_BANDWIDTH, environment, time_us, write
from dejavu_compile.kernels.gathered_sum import _sum_kernel, launch_sum, sum_config
from dejavu_compile.kernels.gemv import _gemv_kernel, gemv_config, launch_gemv
from dejavu_compile.kernels.rows import _rows_kernel, launch_rows, rows_config
from dejavu_compile.kernels.select import launch_select, select_kernels
from dejavu_compile.predictors import rank_for_budget

RESULTS = Path(__file__).parent / "results"
SHAPES = {
    "4096": (4096, 16384),
    "7168": (7168, 28672),
    "9216": (9216, 36864),
    "12288": (12288, 49152),
}


class Layers:
    """Weights, predictor and a selection for a few layers of one shape."""

    def __init__(self, d: int, n: int, density: float, layers: int) -> None:
        make = torch.Generator("cuda").manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=make, device="cuda", dtype=torch.bfloat16) * 0.02

        rank = rank_for_budget(2 * d * n * 2, d, n, 1)
        self.d, self.n, self.rank, self.count = d, n, rank, round(density * n)
        self.x = normal(1, d)
        self.hidden = normal(1, n)
        self.into = [normal(n, d) for _ in range(layers)]
        self.out = [normal(n, d) for _ in range(layers)]
        self.square = [normal(d, d) for _ in range(layers)]
        self.bias_d = normal(d)
        self.bias_n = normal(n)
        self.down = [torch.randint(-8, 9, (rank, d), device="cuda", dtype=torch.int8, generator=make)
                     for _ in range(layers)]  # fmt: skip
        self.up = [torch.randint(-8, 9, (n, rank), device="cuda", dtype=torch.int8, generator=make)
                   for _ in range(layers)]  # fmt: skip
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


def cases(w: Layers) -> dict[str, tuple[Callable[[int], Any], float]]:
    """Name -> (what to run for layer i, bytes that it must read)."""
    d, n, k, r = w.d, w.n, w.count, w.rank
    select = select_kernels(w.x, w.down[0], w.up[0])
    row = 2.0 * d * k

    def chain(i: int) -> torch.Tensor:
        index, count, *_ = launch_select(select, w.x, w.down[i], w.up[i], w.score_bias)
        h = launch_rows(_rows_kernel, w.x, w.into[i], w.bias_n, (index, count), "relu")
        return launch_sum(_sum_kernel, h, w.out[i], index, count, True).sum(0)

    def inner(i: int) -> None:
        """Only the first launch of `select`."""
        launch_select((select[0], _Skip(), _Skip()), w.x, w.down[i], w.up[i], w.score_bias)

    def scores(i: int) -> None:
        """Only the second."""
        launch_select((_Skip(), select[1], _Skip()), w.x, w.down[i], w.up[i], w.score_bias)

    return {
        "select: inner": (inner, float(r * d)),
        "select: scores": (scores, float(r * n)),
        "select": (lambda i: launch_select(select, w.x, w.down[i], w.up[i], w.score_bias), float(r * (d + n))),
        "rows": (lambda i: launch_rows(_rows_kernel, w.x, w.into[i], w.bias_n, w.selection, "relu"), row),
        "sum": (lambda i: launch_sum(_sum_kernel, w.hidden, w.out[i], *w.selection, True), row),
        "chain": (chain, 2 * row + r * (d + n)),
        "gemv square": (lambda i: launch_gemv(_gemv_kernel, w.x, [w.square[i]], [w.bias_d], "identity"), 2.0 * d * d),
        "gemv QKV": (lambda i: launch_gemv(_gemv_kernel, w.x, [w.square[i], w.square[i - 1], w.square[i - 2]], [w.bias_d] * 3, "identity"), 6.0 * d * d),
        "cublas square": (lambda i: torch.nn.functional.linear(w.x, w.square[i], w.bias_d), 2.0 * d * d),
        "gemv up": (lambda i: launch_gemv(_gemv_kernel, w.x, [w.into[i]], [w.bias_n], "relu"), 2.0 * d * n),
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
    got = launch_sum(_sum_kernel, w.hidden, w.out[0], *w.selection, True).sum(0)
    want = dk.gathered_sum_reference(w.hidden, w.out[0], *w.selection, True)[0]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    got = launch_gemv(_gemv_kernel, w.x, [w.square[0]], [w.bias_d], "identity")
    torch.testing.assert_close(
        got, torch.nn.functional.linear(w.x, w.square[0], w.bias_d), rtol=2e-2, atol=2e-3
    )


def sweep(w: Layers, layers: int) -> None:
    """Print the best block sizes of each kernel at this shape."""
    found: dict[str, list[tuple[float, dict]]] = {"rows": [], "gemv": [], "sum": []}
    for j, bd, warps, waves in itertools.product((1, 2, 4), (1024, 2048, 4096), (4, 8), (8, 16)):
        c = {
            "BLOCK_J": j,
            "BLOCK_D": bd,
            "num_warps": warps,
            "programs": min(132 * waves, -(-w.n // j)),
        }
        found["rows"].append((graph_us(lambda i, c=c: launch_rows(
            _rows_kernel, w.x, w.into[i], w.bias_n, w.selection, "relu", config=c), layers), c))  # fmt: skip
    for j, bd, warps, loop in itertools.product(
        (1, 2, 4), (512, 1024, 2048), (4, 8), (False, True)
    ):
        c = {"BLOCK_J": j, "BLOCK_D": bd, "num_warps": warps, "LOOP": loop}
        found["gemv"].append((graph_us(lambda i, c=c: launch_gemv(
            _gemv_kernel, w.x, [w.square[i]], [w.bias_d], "identity", config=c), layers), c))  # fmt: skip
    for j, bd, warps, waves in itertools.product((8, 16, 32), (128, 256, 512), (4,), (4, 8)):
        splits = max(1, -(-132 * waves // (-(-w.d // bd))))
        c = {"BLOCK_J": j, "BLOCK_D": bd, "num_warps": warps, "splits": splits}
        found["sum"].append((graph_us(lambda i, c=c: launch_sum(
            _sum_kernel, w.hidden, w.out[i], *w.selection, True, config=c), layers), c))  # fmt: skip
    for name, results in found.items():
        results.sort(key=lambda r: r[0])
        print(
            name,
            w.d,
            *(f"\n    {us:6.2f} us {c}" for us, c in [*results[:4], results[-1]]),
            flush=True,
        )
    print("defaults", rows_config(w.n, w.d), gemv_config(w.d), sum_config(w.n, w.d))


def main() -> None:
    """Parse the command line, run, print one table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "ops.json")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("ops.py needs an NVIDIA GPU: nothing was measured")
        return
    print(environment(), flush=True)
    rows = []
    for shape in args.shapes:
        w = Layers(*SHAPES[shape], args.density, args.layers)
        check(w)
        for name, (body, num_bytes) in cases(w).items():
            us = graph_us(body, args.layers)
            share = num_bytes / COPY_BANDWIDTH * 1e6 / us
            rows.append(
                {"shape": shape, "op": name, "us": us, "bytes": num_bytes, "share_of_floor": share}
            )
            print(
                f"{shape:>6} {name:<14}{us:8.2f} us {num_bytes / 1e6:9.2f} MB {share:6.0%}",
                flush=True,
            )
        if args.sweep:
            sweep(w, args.layers)
    write(args.out, {"density": args.density, "rows": rows})


if __name__ == "__main__":
    main()
