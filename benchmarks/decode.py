"""Decode step: dense Inductor in its modes against dejavu, side by side in one run.

    python benchmarks/decode.py --shape opt-6.7b --density 0.1 --head-density 0.5
    python benchmarks/decode.py --shape opt-66b --attention-only --layers 8 --head-density 0.5 --length 512 4096

Random weights; predictors of the real byte size (5 % of an MLP) that select a fixed random share of the
neurons, and of the heads where asked for, of every layer but the first: at batch above 1 other heads for each
sequence. A time counts only after the same step's logits matched an oracle, the eager model with everything else
zeroed: in fp32 where that fits on the GPU beside the model, and then a row may be off by half more than the eager
model is in its own dtype, or by the tolerance. Static cache, full; the KV length is the cache's. Bytes are weights and
cache read, predictors included; the floor is those bytes at the device's copy bandwidth. Variant `lossless` has nothing
attached, `mlps` leaves attention dense, `gate` selects neurons by their activated gates instead of predictors, `sketch` by sketches.
"""

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dejavu_compile as dv
from dejavu_compile.bench import (
    Kept,
    attach_gates,
    attach_heads_per_sequence,
    attach_random_predictors,
    attach_random_sketches,
    build,
    cache_bytes,
    copy_bandwidth,
    environment,
    measure,
    oracle_logits,
    weight_bytes,
    write,
)

RESULTS = Path(__file__).parent / "results"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOLERANCE = {torch.bfloat16: 0.05, torch.float16: 0.01, torch.float32: 1e-4}
# Bytes of a GPU that activations, caches and CUDA graphs may need beside two models
ROOM = 8 << 30


def run(
    args: argparse.Namespace, length: int, batch: int, save: Callable[[Any], None]
) -> dict[str, Any]:
    """All providers on one shape, at one length of the cache and one batch."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = DTYPES[args.dtype]
    model = build(args.shape, device, dtype, args.layers, length, args.attention_only)
    wide = in_float32(model, args, length)
    result = {
        "shape": args.shape, "layers": model.config.num_hidden_layers, "dtype": args.dtype,
        "attention_only": args.attention_only, "kv_length": length, "density": args.density,
        "head_density": args.head_density, "batch": batch,
        "oracle": "eager, " + (args.dtype if wide is None else "fp32"), "rows": [],
    }  # fmt: skip
    if device == "cuda":
        result["copy_bandwidth"] = copy_bandwidth()

    def add(
        provider: str, reference: dict[str, Any], density: Any, heads: Any, **how: Any
    ) -> None:
        expected = reference["logits"]
        row = measure(
            model, provider, length, args.repeats, expected, batch, args.breakdown, **how
        )
        row |= {k: v for k, v in reference.items() if k != "logits"}
        union = heads and 1 - (1 - heads) ** batch
        cache = batch * cache_bytes(model, length, heads)
        row["bytes"] = weight_bytes(model, density, union) + cache
        result["rows"].append(row)
        print({k: v for k, v in row.items() if k not in ("kernels", "timeline")}, flush=True)
        save(result | {"partial": True})

    dense = compared_with(model, wide, [], length, batch)
    for mode in args.modes:
        how = {"backend": "inductor", "mode": None if mode == "default" else mode}
        add(f"inductor {mode}", dense, None, None, **how)
    for variant in args.variants:
        options = dict(VARIANTS[variant])
        if device == "cuda":
            options["triton.cudagraphs"] = True
        density, heads = args.density, args.head_density
        dv.detach(model)
        kept = []
        if variant == "lossless":
            density = heads = None
        elif variant == "gate":
            heads = None
            kept += attach_gates(model, density, length, batch)
        elif variant == "sketch":
            heads = None
            kept += attach_random_sketches(model, density)
        else:
            heads = None if variant == "mlps" else heads
            kept += attach_random_predictors(model, density, heads if batch == 1 else None)
            if heads is not None and batch > 1:
                kept += attach_heads_per_sequence(model, heads, length, batch)
        reference = compared_with(model, wide, kept, length, batch)
        add(f"dejavu {variant}", reference, density, heads, backend="dejavu", options=options)
    rows = result["rows"]
    best = min(r["p50"] for r in rows if r["provider"].startswith("inductor"))
    for row in rows:
        row["speedup"] = best / row["p50"] if row["error"] < row["tolerance"] else None
        row["floor_us"] = (
            1e6 * row["bytes"] / result["copy_bandwidth"] if device == "cuda" else None
        )
        row["share_of_floor"] = row["floor_us"] / row["p50"] if device == "cuda" else None
    return result


def in_float32(model: nn.Module, args: argparse.Namespace, length: int) -> nn.Module | None:
    """A model of the same shape in fp32, or None where that is its dtype, or doesn't fit beside it on the GPU."""
    needed = 4 * sum(p.numel() for p in model.parameters()) + ROOM
    first = next(model.parameters())
    if first.dtype == torch.float32 or not first.is_cuda or needed > torch.cuda.mem_get_info()[0]:
        return None
    return build(args.shape, "cuda", torch.float32, args.layers, length, args.attention_only)


def compared_with(
    model: nn.Module, wide: nn.Module | None, kept: list[Kept], length: int, batch: int
) -> dict[str, Any]:
    """The oracle's logits, the tolerance, and how far the eager model is from them in its own dtype.

    A step in bf16 is off by what its dtype loses, and a gate next to its threshold falls on either side by rounding
    alone, in the eager model as in ours: so a row may be off by half more than the eager model is.
    """
    own = oracle_logits(model, kept, length, batch)
    tolerance = TOLERANCE[model.dtype]
    if wide is None:
        return {"logits": own, "tolerance": tolerance}
    wide.load_state_dict(model.state_dict())  # each time: `attach_gates` changes weights
    expected = oracle_logits(wide, [k.in_model(model, wide) for k in kept], length, batch)
    eager = ((own - expected).norm() / expected.norm()).item()
    return {"logits": expected, "tolerance": max(tolerance, 1.5 * eager), "eager_error": eager}


VARIANTS: dict[str, dict[str, Any]] = {
    "inline": {"dejavu.issue": "inline"},
    "side_stream": {"dejavu.issue": "side_stream"},
    "mlps": {},  # attention stays dense
    "no_gemv": {"dejavu.gemv": False},
    "no_pdl": {"dejavu.pdl": False},
    "auto": {},
    "lossless": {},  # nothing attached
    "gate": {},  # MLPs by thresholds on their activated gates: Llama
    "sketch": {},  # MLPs by sketches of gate and up: Llama
}


def table(result: dict[str, Any]) -> str:
    """The rows as text."""
    lines = [f"{result['shape']} x{result['layers']} {result['dtype']}, KV {result['kv_length']}, "
             f"batch {result['batch']}, density of MLPs {result['density']}, heads {result['head_density']}"
             + (", attention only" if result["attention_only"] else "")]  # fmt: skip
    for r in result["rows"]:
        speedup = f"{r['speedup']:.2f}x" if r["speedup"] else "FAILED"
        eager = f" (eager {r['eager_error']:.1e})" if "eager_error" in r else ""
        floor = f"{r['share_of_floor']:.0%}" if r["share_of_floor"] else ""
        lines.append(
            f"  {r['provider']:<26}{r['p50'] / 1e3:9.3f} ms  {r['bytes'] / 1e9:7.2f} GB  {floor:>5} of floor  "
            f"{speedup:>7}  err {r['error']:.1e}{eager}  recompiles {r['recompiles']}  skips {r['cudagraph_skips']}"
        )
        for kernel in r.get("kernels", [])[:20]:
            lines.append(
                f"    {kernel['us']:9.1f} us {kernel['launches']:6.1f} x  {kernel['kernel'][:80]}"
            )
        if "kernels" in r:
            lines.append(f"    {sum(k['us'] for k in r['kernels']):9.1f} us in kernels")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, run, print one table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", help="default: opt-6.7b on a GPU, opt-1.3b without one")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--density", type=float, help="of the MLPs' neurons; default: 0.1")
    parser.add_argument("--head-density", type=float, help="default: attention stays dense")
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
        "--modes", nargs="*", default=["reduce-overhead", "default", "max-autotune"]
    )
    parser.add_argument(
        "--variants", nargs="*", choices=VARIANTS, default=["inline", "side_stream"]
    )
    parser.add_argument(
        "--breakdown", action="store_true", help="time by kernel too, and in which order (CUDA)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "decode.json")
    args = parser.parse_args()
    if args.density is None and not args.attention_only:
        args.density = 0.1
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
