"""Decode step: dense Inductor in its modes against dejavu, side by side in one run.

    python benchmarks/decode.py --shape opt-6.7b --density 0.1 0.05 --head-density 0.5 0.2
    python benchmarks/decode.py --shape opt-66b --attention-only --layers 8 --head-density 0.5 --length 512 4096

Random weights; predictors of the real byte size (up to 5 % of an MLP, rank at most 1,024) that select a fixed random share of the
neurons, and of the heads where asked for, of every layer but the first: at batch above 1 other heads for each
sequence. A time counts only after the same step's logits matched an oracle, the eager model with everything else
zeroed: in fp32 where that fits on the GPU beside the model, and then a row may be off by half more than the eager
model is in its own dtype, or by the tolerance. At batch 1 the step before selects other neurons: who reads the last
step's lists doesn't match. Static cache, full; the KV length is the cache's. Bytes are weights and
cache read, predictors included; the floor is those bytes at the device's copy bandwidth. Variant `lossless` has nothing
attached, `given` has the selections of MLPs without their predictors, so that what these take is its difference to `auto`,
`mlps` leaves attention dense, `gate` selects neurons by their activated gates instead of
predictors, `sketch` by sketches of their projections.

`--breakdown` reads off the compiled graph what the step must read, and on CUDA sets each kernel of a profile against it.
`own us`: by which a kernel moved the end of what ran before it; these and the gaps add up to the step. `above`: its own
time less that of its bytes at the copy bandwidth; `-` where it isn't certain which bytes are its.
"""

import argparse
import itertools
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from given import predictor_bytes, selections_given

import dejavu_compile as dv
from dejavu_compile.bench import copy_bandwidth, environment, measure, write
from dejavu_compile.breakdown import table as table_of_kernels
from dejavu_compile.decode_step import Reference, compared_with
from dejavu_compile.random_selections import (
    attach_gates,
    attach_per_sequence,
    attach_random_predictors,
    attach_random_sketches,
    the_other_units,
)
from dejavu_compile.shapes import SHAPES, build, cache_bytes, in_float32, mlps, weight_bytes

RESULTS = Path(__file__).parent / "results"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def run(
    args: argparse.Namespace, length: int, batch: int, save: Callable[[Any], None]
) -> dict[str, Any]:
    """All providers on one shape, at one length of the cache and one batch."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = DTYPES[args.dtype]
    model = build(args.shape, device, dtype, args.layers, length, args.attention_only)
    wide = in_float32(model, args.shape, length, args.attention_only)
    result = {
        "shape": args.shape, "layers": model.config.num_hidden_layers, "dtype": args.dtype,
        "attention_only": args.attention_only, "kv_length": length, "batch": batch,
        "oracle": "eager, " + (args.dtype if wide is None else "fp32"), "rows": [],
    }  # fmt: skip
    if device == "cuda":
        result["copy_bandwidth"] = copy_bandwidth()

    def add(provider: str, reference: Reference, density: Any, heads: Any, **how: Any) -> None:
        """One row: `density` and `heads` are the shares that run, None where all do."""
        row = measure(
            model, provider, length, args.repeats, reference.oracle.logits, batch, args.breakdown,
            reference.oracle.shares if args.breakdown else None, partial(the_other_units, model), **how,
        )  # fmt: skip
        row |= {"tolerance": reference.tolerance, "density": density, "head_density": heads}
        if reference.eager_error is not None:
            row["eager_error"] = reference.eager_error
        union = heads and 1 - (1 - heads) ** batch
        cache = batch * cache_bytes(model, length, heads)
        row["bytes"] = weight_bytes(model, density, union) + cache
        result["rows"].append(row)
        print({k: v for k, v in row.items() if not isinstance(v, list | dict)}, flush=True)
        save(result | {"partial": True})

    dense = compared_with(model, wide, [], length, batch)
    for mode in args.modes:
        how = {"backend": "inductor", "mode": None if mode == "default" else mode}
        add(f"inductor {mode}", dense, None, None, **how)
    pairs = list(zip(args.density, args.head_density, strict=True))
    for variant, (density, heads) in (
        (v, pair) for v in args.variants for pair in (pairs if v != "lossless" else [(None, None)])
    ):
        options = dict(VARIANTS[variant])
        if device == "cuda":
            options["triton.cudagraphs"] = True
        dv.detach(model)
        kept = []
        if variant.startswith("gate"):
            heads = None
            kept += attach_gates(model, density, length, batch)
        elif variant.startswith("sketch"):
            heads = None
            kept += attach_random_sketches(model, density)
        elif variant != "lossless":
            heads = None if variant == "mlps" else heads
            kept += attach_random_predictors(model, density, heads if batch == 1 else None)
            if heads is not None and batch > 1:
                kept += attach_per_sequence(model, None, heads, length, batch, kept)
        reference = compared_with(model, wide, kept, length, batch)
        with selections_given() if variant == "given" else nullcontext():
            add(f"dejavu {variant}", reference, density, heads, backend="dejavu", options=options)
        if variant == "given":
            result["rows"][-1]["bytes"] -= predictor_bytes([part.out for part in mlps(model)])
    rows = result["rows"]
    dense = [r["p50"] for r in rows if r["provider"].startswith("inductor")]
    for row in rows:
        right = row["error"] < row["tolerance"]
        row["speedup"] = min(dense) / row["p50"] if dense and right else None
        row["floor_us"] = (
            1e6 * row["bytes"] / result["copy_bandwidth"] if device == "cuda" else None
        )
        row["share_of_floor"] = row["floor_us"] / row["p50"] if device == "cuda" else None
    return result


VARIANTS: dict[str, dict[str, Any]] = {
    "inline": {"dejavu.issue": "inline"},
    "side_stream": {"dejavu.issue": "side_stream"},
    "mlps": {},  # attention stays dense
    "no_gemv": {"dejavu.gemv": False},
    "no_pdl": {"dejavu.pdl": False},
    "auto": {},
    "given": {},  # the selections of MLPs, without predictors
    "autotune": {"dejavu.autotune": True},
    "lossless": {},  # nothing attached
    "gate": {},  # MLPs by thresholds on their activated gates: Llama
    "gate_autotune": {"dejavu.autotune": True},
    "sketch": {},  # MLPs by sketches of gate and up: Llama
    "sketch_autotune": {"dejavu.autotune": True},
}


def table(result: dict[str, Any]) -> str:
    """The rows as text."""
    lines = [f"{result['shape']} x{result['layers']} {result['dtype']}, KV {result['kv_length']}, "
             f"batch {result['batch']}"
             + (", attention only" if result["attention_only"] else "")]  # fmt: skip
    for r in result["rows"]:
        right = r["error"] < r["tolerance"]
        speedup = f"{r['speedup']:.2f}x" if r["speedup"] else "" if right else "FAILED"
        eager = f" (eager {r['eager_error']:.1e})" if "eager_error" in r else ""
        floor = f"{r['share_of_floor']:.0%}" if r["share_of_floor"] else ""
        runs = (
            f"MLPs {r['density']}, heads {r['head_density']}"
            if r["density"] or r["head_density"]
            else ""
        )
        lines.append(
            f"  {r['provider']:<26}{runs:<22}{r['p50'] / 1e3:9.3f} ms  {r['bytes'] / 1e9:7.2f} GB  {floor:>5} of floor  "
            f"{speedup:>7}  err {r['error']:.1e}{eager}  recompiles {r['recompiles']}  skips {r['cudagraph_skips']}"
        )
        if "kernels" in r:
            lines.append(table_of_kernels(r))
        elif r.get("read_bytes"):
            lines.append(f"    must read {r['read_bytes'] / 1e9:.3f} GB by its graph")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, run, print one table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shape", choices=SHAPES, help="default: opt-6.7b on a GPU, opt-1.3b without one"
    )
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument(
        "--density", type=float, nargs="+", help="of the MLPs' neurons; default: 0.1"
    )
    parser.add_argument(
        "--head-density",
        type=float,
        nargs="+",
        help="one for each density; default: attention stays dense",
    )
    parser.add_argument(
        "--attention-only", action="store_true", help="MLPs and vocabulary too small to matter"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--length", type=int, nargs="+", default=[512], help="slots of the cache")
    parser.add_argument(
        "--repeats", type=int, default=20, help="samples: of ten steps on CUDA, else of one"
    )
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], default="bf16")
    parser.add_argument(
        "--modes",
        nargs="*",
        default=["reduce-overhead", "default", "max-autotune"],
        help="of dense Inductor, the best of which is what others are compared with; none: no comparison",
    )
    parser.add_argument(
        "--variants", nargs="*", choices=VARIANTS, default=["inline", "side_stream"]
    )
    parser.add_argument(
        "--breakdown",
        action="store_true",
        help="what the compiled graph must read, and on CUDA time, bytes and gaps by kernel",
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "decode.json")
    args = parser.parse_args(argv)
    if args.density is None:
        args.density = [None if args.attention_only else 0.1] * len(args.head_density or [0])
    args.head_density = args.head_density or [None] * len(args.density)
    if len(args.density) != len(args.head_density):
        parser.error(
            f"{len(args.density)} densities of MLPs for {len(args.head_density)} of heads"
        )
    args.shape = args.shape or ("opt-6.7b" if torch.cuda.is_available() else "opt-1.3b")
    print(environment(), flush=True)
    done: list[dict[str, Any]] = []
    for length, batch in itertools.product(args.length, args.batch):
        done.append(
            run(args, length, batch, lambda last: write(args.out, {"runs": [*done, last]}))
        )
        write(args.out, {"runs": done})
    print("\n".join(table(result) for result in done))


if __name__ == "__main__":
    main()
