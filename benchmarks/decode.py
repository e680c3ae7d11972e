"""Decode step: dense Inductor in its modes against dejavu, side by side in one run.

    python benchmarks/decode.py --shape opt-6.7b --density 0.1 --head-density 0.5
    python benchmarks/decode.py --shape opt-66b --attention-only --layers 8 --head-density 0.5 --length 4096

Random weights; predictors of the real byte size (5 % of an MLP) that select a fixed random share of the
neurons, and of the heads where asked for, of every layer but the first. A time counts only after the same
step's logits matched an oracle: the eager model with everything else zeroed (`gate`: in fp32). Static cache, full; the KV
length is the cache's. Bytes are weights and cache read, predictors included; the floor is those bytes at the
device's copy bandwidth. Variant `lossless` has nothing attached, `mlps` leaves attention dense, `gate` selects
neurons by their activated gates instead of predictors.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

import dejavu_compile as dv
from dejavu_compile.bench import (
    Kept,
    attach_gates,
    attach_random_predictors,
    build,
    cache_bytes,
    copy_bandwidth,
    environment,
    measure,
    mlps,
    oracle_logits,
    weight_bytes,
    write,
)

RESULTS = Path(__file__).parent / "results"
TOLERANCE = {torch.bfloat16: 0.05, torch.float16: 0.01, torch.float32: 1e-4}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All providers on one shape."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[args.dtype]
    model = build(args.shape, device, dtype, args.layers, args.length, args.attention_only)
    result = {
        "shape": args.shape, "layers": model.config.num_hidden_layers, "dtype": args.dtype,
        "attention_only": args.attention_only, "kv_length": args.length, "density": args.density,
        "head_density": args.head_density, "batch": args.batch, "rows": [],
    }  # fmt: skip
    if device == "cuda":
        result["copy_bandwidth"] = copy_bandwidth()
    dense = oracle_logits(model, [], args.length, args.batch)

    def add(provider: str, expected: torch.Tensor, density: Any, heads: Any,
            tolerance: float = TOLERANCE[dtype], **how: Any) -> None:  # fmt: skip
        row = measure(model, provider, args.length, args.repeats, expected, args.batch,
                      args.breakdown, **how)  # fmt: skip
        cache = args.batch * cache_bytes(model, args.length, heads)
        row["tolerance"] = tolerance
        row["bytes"] = weight_bytes(model, density, heads) + cache
        result["rows"].append(row)
        print({k: v for k, v in row.items() if k not in ("kernels", "timeline")}, flush=True)
        write(args.out, result | {"partial": True})

    for mode in args.modes:
        how = {"backend": "inductor", "mode": None if mode == "default" else mode}
        add(f"inductor {mode}", dense, None, None, **how)
    for variant in args.variants:
        options = dict(VARIANTS[variant])
        if device == "cuda":
            options["triton.cudagraphs"] = True
        density = heads = None
        expected, tolerance = dense, TOLERANCE[dtype]
        dv.detach(model)
        if variant != "lossless":
            density, heads = args.density, args.head_density
            heads = None if variant == "mlps" else heads
            gated = variant == "gate"
            kept = attach_random_predictors(model, None if gated else density, heads)
            if gated:
                gates = attach_gates(model, density, args.length, args.batch)
                expected, eager = in_float32(model, gates, args)
                tolerance = max(tolerance, 1.5 * eager)
            else:
                expected = oracle_logits(model, kept, args.length, args.batch)
        add(
            f"dejavu {variant}",
            expected,
            density,
            heads,
            tolerance,
            backend="dejavu",
            options=options,
        )
    rows = result["rows"]
    best = min(r["p50"] for r in rows if r["provider"].startswith("inductor"))
    for row in rows:
        row["speedup"] = best / row["p50"] if row["error"] < row["tolerance"] else None
        row["floor_us"] = (
            1e6 * row["bytes"] / result["copy_bandwidth"] if device == "cuda" else None
        )
        row["share_of_floor"] = row["floor_us"] / row["p50"] if device == "cuda" else None
    return result


def in_float32(
    model: torch.nn.Module, gates: list[Kept], args: argparse.Namespace
) -> tuple[torch.Tensor, float]:
    """The oracle's logits in fp32, and how far the eager model's are from them in its own dtype.

    A gate next to its threshold falls on either side by rounding alone, in the eager model as in ours.
    """
    device = next(model.parameters()).device
    wide = build(args.shape, device.type, torch.float32, args.layers, args.length)
    wide.load_state_dict(model.state_dict())
    kept = [Kept(part, threshold=g.threshold) for part, g in zip(mlps(wide), gates, strict=True)]
    expected = oracle_logits(wide, kept, args.length, args.batch)
    own = oracle_logits(model, gates, args.length, args.batch)
    return expected, ((own - expected).norm() / expected.norm()).item()


VARIANTS: dict[str, dict[str, Any]] = {
    "inline": {"dejavu.issue": "inline"},
    "side_stream": {"dejavu.issue": "side_stream"},
    "mlps": {},  # attention stays dense
    "no_gemv": {"dejavu.gemv": False},
    "no_pdl": {"dejavu.pdl": False},
    "auto": {},
    "lossless": {},  # nothing attached
    "gate": {},  # MLPs by thresholds on their activated gates: Llama
}


def table(result: dict[str, Any]) -> str:
    """The rows as text."""
    lines = [f"{result['shape']} x{result['layers']} {result['dtype']}, KV {result['kv_length']}, "
             f"batch {result['batch']}, density of MLPs {result['density']}, heads {result['head_density']}"
             + (", attention only" if result["attention_only"] else "")]  # fmt: skip
    for r in result["rows"]:
        speedup = f"{r['speedup']:.2f}x" if r["speedup"] else "FAILED"
        floor = f"{r['share_of_floor']:.0%}" if r["share_of_floor"] else ""
        lines.append(
            f"  {r['provider']:<26}{r['p50'] / 1e3:9.3f} ms  {r['bytes'] / 1e9:7.2f} GB  {floor:>5} of floor  "
            f"{speedup:>7}  err {r['error']:.1e}  recompiles {r['recompiles']}  skips {r['cudagraph_skips']}"
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
    parser.add_argument("--batch", type=int, default=1)
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
    parser.add_argument(
        "--breakdown", action="store_true", help="time by kernel too, and in which order (CUDA)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "decode.json")
    args = parser.parse_args()
    if args.density is None and not args.attention_only:
        args.density = 0.1
    args.shape = args.shape or ("opt-6.7b" if torch.cuda.is_available() else "opt-1.3b")
    print(environment(), flush=True)
    result = run(args)
    write(args.out, result)
    print(table(result))


if __name__ == "__main__":
    main()
