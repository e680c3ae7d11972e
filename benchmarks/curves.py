"""How a decode step's time grows with density, KV length, batch and layers: dense Inductor, dejavu, and their bytes.

    python benchmarks/curves.py --shape opt-6.7b
    python benchmarks/curves.py --shape llama-3-8b --modes reduce-overhead max-autotune --curves density kv

Random weights, few layers. Predictors of the real byte size (up to 5 % of an MLP) select known random neurons and heads of every
layer but the first; shapes with gates take thresholds on them instead, in all layers, and attention stays dense.
At batch above 1 each sequence selects its own: an MLP runs their union. `auto` is what the plan chooses for that
artifact. At each batch what it didn't choose for the MLPs is timed too: `mlps dense` by the option dejavu.max_tokens,
`mlps sparse` by an artifact that claims a density of nothing, up to as many tokens as the kernels take.

A point counts only after its logits matched the oracle, the eager model with everything else zeroed that the
program really leaves out (as in decode.py). Bytes are read off the compiled graph: weights, predictors and cache, with the
shares of units that the oracle counted. Each curve is explained by a line: time = a + bytes / bandwidth. Points
where dejavu takes 3 % longer than dense are flagged. Writes JSON after each point, and a picture at the end.
"""

import argparse
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from curves_data import Bench, Place, is_gated

from dejavu_compile.bench import copy_bandwidth, environment, write
from dejavu_compile.growth import CURVES, Point, better_choices, fits, slower_than_dense, table
from dejavu_compile.plots import plot_curves
from dejavu_compile.shapes import SHAPES

RESULTS = Path(__file__).parent / "results"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# By device: what a run of some minutes can hold
DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {
        "shape": "opt-6.7b", "layers": 4, "length": 512, "modes": ["reduce-overhead"],
        "densities": [0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0],
        "lengths": [128, 512, 2048, 8192, 32768], "batches": [1, 2, 4, 8, 16, 32, 64], "layer_counts": [2, 4, 8],
    },
    "cpu": {
        "shape": "opt-125m", "layers": 2, "length": 128, "modes": ["default"],
        "densities": [0.05, 0.2, 0.5, 1.0], "lengths": [128, 512], "batches": [1, 2, 4], "layer_counts": [2, 4],
    },
}  # fmt: skip


def run(args: argparse.Namespace) -> list[Point]:
    """All points, curve by curve; JSON after each."""
    longest = max([args.length, *(args.lengths if "kv" in args.curves else [])])
    bench = Bench(args.shape, DTYPES[args.dtype], longest, args.modes, args.repeats)
    gated = is_gated(bench.take(args.layers))
    if args.density is None:
        args.density = 0.5 if gated else 0.1
    if args.head_density is None and not gated:
        args.head_density = 0.5
    bench.head_density = args.head_density
    started, points = time.monotonic(), []
    usual = Place(args.layers, args.length, 1, args.density)
    places = {
        "density": {x: replace(usual, density=x) for x in args.densities},
        "kv": {x: replace(usual, length=x) for x in args.lengths},
        "batch": {x: replace(usual, batch=x) for x in args.batches},
        "layers": {x: replace(usual, layers=x) for x in args.layer_counts},
    }
    for curve in (c for c in CURVES if c in args.curves):
        for x, place in places[curve].items():
            ways = [bench.dense, bench.sparse] + [bench.other] * (curve == "batch")
            for point in (way(place) for way in ways):
                if point is None:
                    continue
                points.append(replace(point, curve=curve, x=x))
                us = f"{point.us / 1e3:.3f} ms" if point.us is not None else point.failure
                print(f"{time.monotonic() - started:4.0f} s  {curve} {x:g}  {point.provider}  {us}  "
                      f"{point.detail}", flush=True)  # fmt: skip
                save(args, points)
    return points


def save(args: argparse.Namespace, points: list[Point], partial: bool = True) -> None:
    """The points so far, their fits and flags."""
    what = {k: v for k, v in vars(args).items() if k != "out"}
    fitted = {c: {name: asdict(f) for name, f in by.items()} for c, by in fits(points).items()}
    copy = {"copy_bandwidth": copy_bandwidth()} if torch.cuda.is_available() else {}
    write(
        args.out,
        {**what, **copy, "fits": fitted, "slower_than_dense": slower_than_dense(points),
         "better_choices": better_choices(points), "points": [p.to_dict() for p in points],
         **({"partial": True} if partial else {})},
    )  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, run, print one table, write JSON and a picture."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    default = DEFAULTS[device]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default=default["shape"])
    parser.add_argument("--curves", nargs="+", choices=CURVES, default=list(CURVES))
    parser.add_argument(
        "--modes", nargs="+", default=default["modes"], help="of Inductor; the best counts"
    )
    parser.add_argument(
        "--layers", type=int, default=default["layers"], help="where not the curve"
    )
    parser.add_argument(
        "--length", type=int, default=default["length"], help="slots of the cache, likewise"
    )
    parser.add_argument("--density", type=float, help="of MLPs, likewise; default: 0.1, gates 0.5")
    parser.add_argument(
        "--head-density", type=float, help="default: 0.5; with gates attention stays dense"
    )
    parser.add_argument("--densities", type=float, nargs="+", default=default["densities"])
    parser.add_argument("--lengths", type=int, nargs="+", default=default["lengths"])
    parser.add_argument("--batches", type=int, nargs="+", default=default["batches"])
    parser.add_argument("--layer-counts", type=int, nargs="+", default=default["layer_counts"])
    parser.add_argument(
        "--repeats", type=int, default=20, help="samples: of ten steps on CUDA, else of one"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--out", type=Path, default=RESULTS / "curves.json")
    args = parser.parse_args(argv)
    shares = [*args.densities, *(d for d in (args.density, args.head_density) if d is not None)]
    if not all(0 < share <= 1 for share in shares):
        parser.error("a density is a share of the units: above 0, at most 1")
    if min(args.layers, *args.layer_counts) < 2:
        parser.error("at least 2 layers: the first has nothing that early to predict from")
    if min(args.length, *args.lengths) < 32 or min(args.batches) < 1 or args.repeats < 2:
        parser.error(
            "a cache takes 32 slots, a batch 1 sequence, and a median 2 samples, at least"
        )
    print(environment(), flush=True)
    with torch.no_grad():
        points = run(args)
    save(args, points, partial=False)
    plot_curves(points, f"{args.shape}, {args.layers} layers, {args.dtype}", args.out.with_suffix(".png"))  # fmt: skip
    print(table(points))


if __name__ == "__main__":
    main()
