"""Decode step: dense Inductor in its modes against dejavu, side by side in one run.

    python benchmarks/decode.py --shape opt-6.7b --density 0.1 --out benchmarks/results/decode.json

Random weights; predictors of the real byte size (5 % of the MLP) that select a fixed random share of the
neurons of every layer but the first. A time counts only after the same step's logits matched an oracle:
the eager model with all other neurons zeroed. Static cache, batch 1; KV length is the cache's.
Bytes are weights read, predictors included; the floor is those bytes at the device's copy bandwidth.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

import dejavu_compile as dv
from dejavu_compile.bench import (
    COPY_BANDWIDTH,
    attach_random_predictors,
    build,
    environment,
    measure,
    mlp_weights,
    oracle_logits,
    weight_bytes,
    write,
)

RESULTS = Path(__file__).parent / "results"


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All providers on one shape."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[args.dtype]
    model = build(args.shape, device, dtype, args.layers)
    full = [torch.arange(out.shape[1]) for _, out in mlp_weights(model)]
    rows = []
    dense = oracle_logits(model, full, args.length)
    for mode in args.modes:
        rows.append(
            measure(model, f"inductor {mode}", args.length, args.repeats, dense,
                    backend="inductor", mode=None if mode == "default" else mode)
            | {"bytes": weight_bytes(model, None)}
        )  # fmt: skip
        print(rows[-1], flush=True)
        write(args.out, {"shape": args.shape, "rows": rows, "partial": True})
    dv_mode = "reduce-overhead" if device == "cuda" else None
    for variant in args.variants:
        options = dict(VARIANTS[variant])
        density = args.density if variant != "exact" else None
        if density is not None:
            chosen = attach_random_predictors(model, density)
            expected = oracle_logits(model, chosen, args.length)
        else:
            dv.detach(model)
            expected = dense
        if dv_mode:
            options["triton.cudagraphs"] = True
        rows.append(
            measure(model, f"dejavu {variant}", args.length, args.repeats, expected,
                    backend="dejavu", options=options)
            | {"bytes": weight_bytes(model, density)}
        )  # fmt: skip
        print(rows[-1], flush=True)
        write(args.out, {"shape": args.shape, "rows": rows, "partial": True})
    best = min(r["p50"] for r in rows if r["provider"].startswith("inductor"))
    tolerance = 0.05 if dtype is not torch.float32 else 1e-4
    for row in rows:
        row["speedup"] = best / row["p50"] if row["error"] < tolerance else None
        row["floor_us"] = 1e6 * row["bytes"] / COPY_BANDWIDTH if device == "cuda" else None
        row["share_of_floor"] = row["floor_us"] / row["p50"] if device == "cuda" else None
    return {"shape": args.shape, "layers": model.config.num_hidden_layers, "dtype": args.dtype,
            "kv_length": args.length, "density": args.density, "batch": 1, "rows": rows}  # fmt: skip


VARIANTS: dict[str, dict[str, Any]] = {
    "inline": {"dejavu.issue": "inline"},
    "side_stream": {"dejavu.issue": "side_stream"},
    "no_gemv": {"dejavu.gemv": False},
    "exact": {},
}


def table(result: dict[str, Any]) -> str:
    """The rows as text."""
    lines = [f"{result['shape']} x{result['layers']} {result['dtype']}, KV {result['kv_length']}, "
             f"MLP density {result['density']}"]  # fmt: skip
    for r in result["rows"]:
        speedup = f"{r['speedup']:.2f}x" if r["speedup"] else "FAILED"
        floor = f"{r['share_of_floor']:.0%}" if r["share_of_floor"] else ""
        lines.append(
            f"  {r['provider']:<26}{r['p50'] / 1e3:9.3f} ms  {r['bytes'] / 1e9:7.2f} GB  {floor:>5} of floor  "
            f"{speedup:>7}  err {r['error']:.1e}  recompiles {r['recompiles']}  skips {r['cudagraph_skips']}"
        )
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, run, print one table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", help="default: opt-6.7b on a GPU, opt-1.3b without one")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument(
        "--repeats", type=int, default=20, help="samples: of ten steps on CUDA, else of one"
    )
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], default="bf16")
    parser.add_argument(
        "--modes", nargs="*", default=["reduce-overhead", "default", "max-autotune"]
    )
    parser.add_argument(
        "--variants", nargs="*", choices=VARIANTS, default=["inline", "side_stream"]
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "decode.json")
    args = parser.parse_args()
    args.shape = args.shape or ("opt-6.7b" if torch.cuda.is_available() else "opt-1.3b")
    print(environment(), flush=True)
    result = run(args)
    write(args.out, result)
    print(table(result))


if __name__ == "__main__":
    main()
