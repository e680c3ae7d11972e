"""Other projects' kernels beside ours: the same weights, the same shapes, one run on one NVIDIA GPU.

    python benchmarks/peers.py --dejavu PATH --teal PATH --polar PATH --gpt-fast PATH --out benchmarks/results/peers.json

Each PATH is a checkout that you have: none of their code is in this repository. What isn't given is skipped; what
can't be imported or run is a row that says why, and stops nothing else.

| project | compared |
|---|---|
| Deja Vu (FMInference/DejaVu) | an MLP of given neurons, `mlp_sparse` |
| TEAL (FasterDecoding/TEAL) | a projection of half of its inputs, `splitk_sparse_gemv` |
| Polar Sparsity (susavlsh10/Polar-Sparsity) | an MLP of given neurons; decode attention of half of the heads, `select_attn` |
| gpt-fast (pytorch-labs/gpt-fast) | a dense decode step of Llama-3-8B's shape, compiled |

Method: each side is checked against its oracle, a dense computation in fp32 with everything else zeroed, and timed only if
it is right. Kernels are timed in a CUDA graph over so many layers that no weights are left in L2; theirs after their own
autotuning, ours launched early, as in a compiled decode step. A side's bytes are the weights, or keys and values, that it has
to read; "of copy" is what it reads a second, as a share of what a copy does. "ratio" is their time over ours.
"""

import argparse
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from ops import HEAD_DIM, SHAPES
from peer_imports import folder_with, load, load_file
from peer_rows import (
    Case,
    Measured,
    Row,
    Side,
    compare,
    error_of,
    judged,
    layers_for,
    one_line,
    table,
)
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dejavu_compile._compat import compile_counters
from dejavu_compile.bench import environment, measure, time_us, write
from dejavu_compile.decode_step import TOLERANCE, DecodeStep, Reference, compared_with
from dejavu_compile.kernels._triton import cdiv, jit, start_next, tl, wait_for_previous
from dejavu_compile.kernels.attention import _attention_kernel, launch_attention
from dejavu_compile.kernels.gathered_sum import _sum_kernel, launch_sum
from dejavu_compile.kernels.rows import _rows_kernel, launch_rows
from dejavu_compile.kernels.selection import _compact_kernel, launch_compact
from dejavu_compile.launches import in_a_step
from dejavu_compile.random_selections import attach_gates
from dejavu_compile.shapes import build, cache_bytes, in_float32, weight_bytes

RESULTS = Path(__file__).parent / "results"
TEAL_SHAPES = ((4096, 14336), (14336, 4096), (4096, 4096))  # inputs, outputs
HEADS = 72  # OPT-66B
ATTENTION_SHAPES = tuple((batch, slots) for batch in (1, 16) for slots in (512, 4096))
REPEATS = 20


class Mlps:
    """The MLPs of a few layers in fp16, unit-major both, and one selection of their neurons for all."""

    def __init__(self, d: int, n: int, density: float, device: str) -> None:
        make = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, scale: float = 0.02) -> Tensor:
            made = torch.randn(shape, generator=make, device=device, dtype=torch.float16)
            return made.mul_(scale)

        self.count = round(density * n)
        self.num_bytes = 2.0 * 2 * d * self.count
        self.layers = layers_for(self.num_bytes)
        self.shape = f"{d} x {n}"
        self.density = self.count / n
        self.x, self.bias = normal(1, d, scale=1.0), normal(n)
        self.up = [normal(n, d) for _ in range(self.layers)]
        self.down = [normal(n, d) for _ in range(self.layers)]
        self.chosen = (
            torch.randperm(n, generator=make, device=device)[: self.count].sort().values.int()
        )
        self.selection = as_selection(self.chosen, n)
        self.arrived = torch.zeros(4096, dtype=torch.int32, device=device)
        keep = torch.zeros(n, device=device).index_fill_(0, self.chosen.long(), 1.0)
        hidden = F.relu(self.x.float() @ self.up[0].float().T + self.bias.float())
        self.expected = (hidden * keep) @ self.down[0].float()

    def ours(self, i: int) -> Tensor:
        """Up rows, relu, down sum; to fp16, as theirs."""
        h = launch_rows(
            in_a_step(_rows_kernel), self.x, self.up[i], self.bias, self.selection, "relu"
        )
        y = launch_sum(
            in_a_step(_sum_kernel), h, self.down[i], *self.selection, True, self.arrived
        )
        return rounded(y, self.x.dtype)

    def case(self, what: str, theirs: Callable[[int], Tensor], note: str) -> Case:
        """Against one of theirs."""
        ours, other = (Side(run, self.expected, self.num_bytes) for run in (self.ours, theirs))
        return Case(what, self.shape, self.density, self.x.dtype, self.layers, ours, other, note)


@jit
def _round_kernel(part_ptr, out_ptr, n, PARTS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    start_next(EARLY)
    wait_for_previous(EARLY)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(PARTS):
        x += tl.load(part_ptr + part * n + at, mask=at < n, other=0.0)
    tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=at < n)


def rounded(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of parts [parts, m, d] in another dtype. In a compiled step what reads the sum does it; PyTorch's own launches would wait
    for ours to end, and ours for them."""
    out = torch.empty_like(parts[0], dtype=dtype)
    in_a_step(_round_kernel)[(cdiv(out.numel(), 1024),)](
        parts, out, out.numel(), PARTS=len(parts), BLOCK=1024, EARLY=False
    )
    return out


def as_selection(chosen: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Indices [count] as our ops take them: [n] int32, and the count on the device."""
    index = torch.zeros(n, dtype=torch.int32, device=chosen.device)
    index[: chosen.numel()] = chosen
    return index, torch.tensor(chosen.numel(), dtype=torch.int32, device=chosen.device)


def dejavu_cases(
    root: Path, shapes: list[tuple[int, int]], density: float, device: str
) -> Iterator[Case]:
    """Deja Vu's MLP of given neurons."""
    home = folder_with("Deja Vu", root, "src/ops/triton/gather_gemv.py", "Dejavu")
    module, missing = load(home, "src.ops.triton.gather_gemv")
    note = said(
        "both: the same sorted int32 list, result in fp16; theirs adds by fp32 atomics", missing
    )
    for d, n in shapes:
        w = Mlps(d, n, density, device)
        yield w.case(
            "MLP, given neurons: Deja Vu",
            lambda i, w=w: module.mlp_sparse(w.x, w.up[i], w.down[i], w.chosen, w.bias, None),
            note,
        )


def polar_mlp_cases(
    root: Path, shapes: list[tuple[int, int]], density: float, device: str
) -> Iterator[Case]:
    """Polar Sparsity's."""
    folder_with("Polar Sparsity", root, "HybridTensor/triton/gather_gemm_col.py")
    up, missing = load(root, "HybridTensor.triton.gather_gemm_col")
    down, more = load(root, "HybridTensor.triton.gather_gemm_row")
    for kernel in (up.matmul_gather_kernel_col, down.matmul_gather_kernel_row):
        kernel.configs = [c for c in kernel.configs if c.kwargs["BLOCK_SIZE_M"] <= 32]
    note = said(
        "both: the same sorted int32 list, result in fp16; theirs is made for batches. Of its configs those of up to 32 "
        "rows of tokens were tuned", [*missing, *more],
    )  # fmt: skip
    for d, n in shapes:
        w = Mlps(d, n, density, device)

        def theirs(i: int, w: Mlps = w) -> Tensor:
            h = up.gather_matmul_col(w.x, w.up[i], w.chosen, bias=w.bias, activations="relu")
            return down.gather_matmul_row(h, w.down[i], w.chosen)

        yield w.case("MLP, given neurons: Polar Sparsity", theirs, note)


class Projections:
    """y = W x for a few layers, fp16, stored by inputs: [inputs, outputs]. Half of the inputs pass a threshold."""

    def __init__(self, inputs: int, outputs: int, device: str) -> None:
        make = torch.Generator(device).manual_seed(0)
        like = {"generator": make, "device": device, "dtype": torch.float16}
        self.x = torch.rand(1, inputs, **like) - 0.5
        # One of its values: it is the same in any dtype, and only those above it run.
        self.threshold = self.x.abs().flatten().sort().values[inputs // 2 - 1].item()
        keep = self.x.abs() > self.threshold
        self.density = keep.float().mean().item()
        self.num_bytes = 2.0 * outputs * int(keep.sum())
        self.layers = layers_for(self.num_bytes)
        self.weights = [
            torch.randn(inputs, outputs, **like).mul_(0.02) for _ in range(self.layers)
        ]
        self.shape = f"{inputs} -> {outputs}"
        self.selection = as_selection(keep[0].nonzero().flatten(), inputs)
        self.expected = (self.x * keep).float() @ self.weights[0].float()
        self.arrived = torch.zeros(4096, dtype=torch.int32, device=device)

    def summed(self, i: int) -> Tensor:
        """Ours, of a selection that is given."""
        y = launch_sum(
            in_a_step(_sum_kernel), self.x, self.weights[i], *self.selection, False, self.arrived
        )
        return rounded(y, self.x.dtype)

    def found_and_summed(self, i: int) -> Tensor:
        """Ours, with the launch that makes the selection."""
        selection = launch_compact(in_a_step(_compact_kernel), self.x, self.threshold)
        y = launch_sum(
            in_a_step(_sum_kernel), self.x, self.weights[i], *selection, False, self.arrived
        )
        return rounded(y, self.x.dtype)


class OutputRows:
    """The rows of half of the outputs of the same weights, stored by outputs."""

    def __init__(self, w: Projections) -> None:
        self.weights = [weight.t().contiguous() for weight in w.weights]
        n, d = self.weights[0].shape
        self.x = w.x
        chosen = torch.randperm(n, device=w.x.device)[: n // 2].sort().values
        self.selection, self.count = as_selection(chosen, n), chosen.numel()
        self.num_bytes = 2.0 * d * self.count
        self.expected = self.x.float() @ w.weights[0].float()[:, chosen]

    def run(self, i: int) -> Tensor:
        """Ours: by slot."""
        y = launch_rows(
            in_a_step(_rows_kernel), self.x, self.weights[i], None, self.selection, "identity"
        )
        return y[:, : self.count]


def teal_cases(root: Path, shapes: tuple[tuple[int, int], ...], device: str) -> Iterator[Case]:
    """TEAL's projection of the inputs above a threshold."""
    folder_with("TEAL", root, "kernels/sparse_gemv.py")
    module, missing = load_file(root, "kernels/sparse_gemv.py", "peer_teal")
    note = said(
        "theirs compares with the threshold as it reads, and adds by fp16 atomics", missing
    )
    for inputs, outputs in shapes:
        w = Projections(inputs, outputs, device)

        def theirs(i: int, w: Projections = w) -> Tensor:
            return module.splitk_sparse_gemv(w.x[None], w.weights[i].t(), w.threshold, 10)

        def case(
            what: str, ours: Side, note: str, w: Projections = w, theirs: Any = theirs
        ) -> Case:
            other = Side(theirs, w.expected, w.num_bytes)
            return Case(what, w.shape, w.density, w.x.dtype, w.layers, ours, other, note)

        yield case("half the inputs, given: TEAL", Side(w.summed, w.expected, w.num_bytes), note)
        yield case(
            "half the inputs, found: TEAL", Side(w.found_and_summed, w.expected, w.num_bytes), note
        )
        if outputs > inputs:
            rows = OutputRows(w)
            yield case(
                "half the outputs, given: TEAL", Side(rows.run, rows.expected, rows.num_bytes),
                note + "; ours computes half of the outputs instead, from as many bytes",
            )  # fmt: skip


def polar_attention_cases(
    root: Path, shapes: tuple[tuple[int, int], ...], heads: int, device: str
) -> Iterator[Case]:
    """Polar Sparsity's decode attention of half of the heads, others for each sequence."""
    folder_with("Polar Sparsity", root, "HybridTensor/triton/select_attn_v1.py")
    module, missing = load(root, "HybridTensor.triton.select_attn_v1")
    note = said(
        "each with its own layout of the cache, full, no mask; a sequence has its own heads",
        missing,
    )
    for batch, slots in shapes:
        make = torch.Generator(device).manual_seed(0)
        like = {"generator": make, "device": device, "dtype": torch.float16}
        chosen = torch.rand(batch, heads, generator=make, device=device).argsort()[:, : heads // 2]
        chosen = chosen.sort(dim=1).values.int()
        num_bytes = 2.0 * 2 * batch * chosen.shape[1] * slots * HEAD_DIM
        layers = layers_for(num_bytes)
        q = torch.randn(batch, heads, 1, HEAD_DIM, **like)
        ks, vs = (
            [torch.randn(batch, heads, slots, HEAD_DIM, **like) for _ in range(layers)]
            for _ in range(2)
        )
        keep = torch.zeros(batch, heads, device=device).scatter_(1, chosen.long(), 1.0)
        y = F.scaled_dot_product_attention(q.float(), ks[0].float(), vs[0].float())
        expected = y * keep[:, :, None, None]
        score = (2 * keep - 1).half()
        arrived = torch.zeros(4096, dtype=torch.int32, device=device)
        # [batch, 1, group, head, dim] and [batch, slot, group, head, dim]
        their_q = q.transpose(1, 2)[:, :, None].contiguous()
        their_ks, their_vs = (
            [x.transpose(1, 2)[:, :, None].contiguous() for x in cache] for cache in (ks, vs)
        )
        scale = HEAD_DIM**-0.5

        def ours(i: int, q=q, ks=ks, vs=vs, score=score, arrived=arrived, scale=scale) -> Tensor:
            return launch_attention(
                in_a_step(_attention_kernel), q, ks[i], vs[i], None, scale, 0.0, score, arrived
            )

        def theirs(
            i: int, q=their_q, ks=their_ks, vs=their_vs, scale=scale, chosen=chosen, slots=slots
        ) -> Tensor:
            return module.select_attn(q, ks[i], vs[i], scale, chosen, slots)

        yield Case(
            "attention, half the heads: Polar", f"{heads} heads, KV {slots}, batch {batch}", 0.5,
            torch.float16, layers, Side(ours, expected, num_bytes), Side(theirs, expected, num_bytes),
            note,
        )  # fmt: skip


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Queries' or keys' rows from halves, as transformers rotates them, to pairs, as gpt-fast does."""
    rows, width = weight.shape
    return weight.view(heads, 2, rows // heads // 2, width).transpose(1, 2).reshape(rows, width)


def gpt_fast_model(module: Any, model: nn.Module, length: int) -> nn.Module:
    """Their model of the same shape, with the same weights, and a cache of `length` slots."""
    c, weight = model.config, next(model.parameters())
    args = module.ModelArgs(
        block_size=c.max_position_embeddings, vocab_size=c.vocab_size, n_layer=c.num_hidden_layers,
        n_head=c.num_attention_heads, n_local_heads=c.num_key_value_heads, dim=c.hidden_size,
        intermediate_size=c.intermediate_size, rope_base=c.rope_parameters["rope_theta"],
        norm_eps=c.rms_norm_eps,
    )  # fmt: skip
    with torch.device("meta"):
        theirs = module.Transformer(args).to(weight.dtype)
    theirs = theirs.to_empty(device=weight.device).eval().requires_grad_(False)
    state = {
        "tok_embeddings.weight": model.model.embed_tokens.weight,
        "norm.weight": model.model.norm.weight,
        "output.weight": model.lm_head.weight,
    }
    for i, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        q = interleaved(attention.q_proj.weight, c.num_attention_heads)
        k = interleaved(attention.k_proj.weight, c.num_key_value_heads)
        own = {
            "attention.wqkv": torch.cat([q, k, attention.v_proj.weight]),
            "attention.wo": attention.o_proj.weight, "feed_forward.w1": mlp.gate_proj.weight,
            "feed_forward.w3": mlp.up_proj.weight, "feed_forward.w2": mlp.down_proj.weight,
            "attention_norm": layer.input_layernorm.weight,
            "ffn_norm": layer.post_attention_layernorm.weight,
        }  # fmt: skip
        state |= {f"layers.{i}.{name}.weight": value for name, value in own.items()}
    theirs.load_state_dict(state)
    with torch.device(weight.device):
        theirs.setup_caches(1, length)
    return theirs


def gpt_fast_step(theirs: nn.Module, step: DecodeStep, **how: Any) -> Callable[[], Tensor]:
    """Their compiled decode step after the prompt of `step`, at its token and place."""
    device = step.token.device
    with torch.no_grad():
        theirs(step.prompt, torch.arange(step.start, device=device))
    # Ours attends to every slot of the cache, so that the length alone says what is read: so does theirs.
    theirs.causal_mask = torch.ones_like(theirs.causal_mask)
    compiled = torch.compile(theirs, fullgraph=True, **how)
    position = torch.tensor([step.start], device=device)

    @torch.no_grad()
    def run() -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        with sdpa_kernel(SDPBackend.MATH):  # as their generate.py does: Inductor fuses it
            return compiled(step.token, position)[:, -1]

    return run


def in_a_row(skips: int, recompiles: int) -> str:
    """How a decode step was timed."""
    bad = f", {skips} CUDA graphs skipped, {recompiles} recompiled" if skips or recompiles else ""
    return "steps in a row" + bad


def measured_gpt_fast(
    module: Any, model: nn.Module, expected: Tensor, tolerance: float, length: int, **how: Any
) -> Measured:
    """Their decode step, timed as `measure` times ours."""
    num_bytes = float(weight_bytes(model, None) + cache_bytes(model, length))
    try:
        torch.compiler.reset()
        start = compile_counters()
        run = gpt_fast_step(
            gpt_fast_model(module, model, length), DecodeStep(model, model.forward, length), **how
        )
        for _ in range(4):
            logits = run().float().clone()
        before = compile_counters()
        us = time_us(run, REPEATS, together=10)["p50"]
        after = compile_counters()
    except Exception as error:
        return Measured(num_bytes=num_bytes, failed=one_line(error))
    skips = after["cudagraph_skips"] - start["cudagraph_skips"]
    timed = in_a_row(skips, after["graphs"] - before["graphs"])
    return judged(us, error_of(logits, expected), tolerance, num_bytes, timed)


def gpt_fast_rows(root: Path, shape: str, layers: int, length: int, device: str) -> Iterator[Row]:
    """gpt-fast's dense step against ours without anything attached, and with half of the gates."""
    folder_with("gpt-fast", root, "model.py")
    module, missing = load_file(root, "model.py", "peer_gpt_fast")
    model = build(shape, device, torch.bfloat16, layers, length)
    wide = in_float32(model, shape, length)
    graphs = {"triton.cudagraphs": True} if device == "cuda" else {}

    def ours(name: str, reference: Reference, density: float | None) -> Measured:
        num_bytes = float(weight_bytes(model, density) + cache_bytes(model, length))
        try:
            row = measure(
                model,
                name,
                length,
                REPEATS,
                reference.oracle.logits,
                backend="dejavu",
                options=graphs,
            )
        except Exception as error:
            return Measured(num_bytes=num_bytes, failed=one_line(error))
        timed = in_a_row(row["cudagraph_skips"], row["recompiles"])
        return judged(row["p50"], row["error"], reference.tolerance, num_bytes, timed)

    dense = compared_with(model, wide, [], length, 1)
    # `reduce-overhead` is CUDA graphs; the others are set by their generate.py.
    options = {**graphs, "coordinate_descent_tuning": True, "triton.unique_kernel_names": True}
    theirs = measured_gpt_fast(
        module, model, dense.oracle.logits, dense.tolerance, length, options=options
    )
    what, size = "decode step: gpt-fast", f"{shape} x{layers}, KV {length}"
    note = "logits of one token, the same weights; theirs without sampling, its position fixed"
    yield Row(
        what,
        size,
        1.0,
        "bfloat16",
        ours("dejavu lossless", dense, None),
        theirs,
        said(note, missing),
    )
    kept = attach_gates(model, 0.5, length)
    gated = compared_with(model, wide, kept, length, 1)
    yield Row(
        "decode step, ours gate 50 %: gpt-fast", size, 0.5, "bfloat16", ours("dejavu gate", gated, 0.5), theirs,
        "theirs is dense: the row above, its error against its own oracle",
    )  # fmt: skip


def said(note: str, missing: list[str]) -> str:
    """A note, with what was stood in for."""
    return note + (f"; stood in for: {', '.join(sorted(set(missing)))}" if missing else "")


def rows_of(what: str, made: Iterator[Case | Row]) -> Iterator[Row]:
    """Each case compared. A failure ends this project's rows with one that says why."""
    try:
        for case in made:
            yield case if isinstance(case, Row) else compare(case)
            del case
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    except Exception as error:
        yield Row(what, theirs=Measured(failed=one_line(error)))


def run(args: argparse.Namespace) -> Iterator[Row]:
    """All comparisons that were asked for."""
    shapes, device = [SHAPES[name] for name in args.shapes], "cuda"
    if args.dejavu:
        yield from rows_of("Deja Vu", dejavu_cases(args.dejavu, shapes, args.density, device))
    if args.polar:
        cases = polar_mlp_cases(args.polar, shapes, args.density, device)
        yield from rows_of("Polar Sparsity, MLP", cases)
    if args.teal:
        yield from rows_of("TEAL", teal_cases(args.teal, TEAL_SHAPES, device))
    if args.polar:
        cases = polar_attention_cases(args.polar, ATTENTION_SHAPES, HEADS, device)
        yield from rows_of("Polar Sparsity, attention", cases)
    if args.gpt_fast:
        rows = gpt_fast_rows(args.gpt_fast, "llama-3-8b", args.layers, args.length, device)
        yield from rows_of("gpt-fast", rows)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; ends the program for a path that isn't there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    projects = ("dejavu", "teal", "polar", "gpt-fast")
    for name in projects:
        parser.add_argument(f"--{name}", type=Path, metavar="PATH", help="a checkout")
    parser.add_argument(
        "--shapes", nargs="*", choices=SHAPES, default=["4096", "9216", "12288"], help="of MLPs"
    )
    parser.add_argument("--density", type=float, default=0.1, help="of the MLPs' neurons")
    parser.add_argument("--layers", type=int, default=4, help="of the decode step")
    parser.add_argument("--length", type=int, default=512, help="slots of its cache")
    parser.add_argument("--out", type=Path, default=RESULTS / "peers.json")
    args = parser.parse_args(argv)
    for name in projects:
        path = getattr(args, name.replace("-", "_"))
        if path is not None and not path.is_dir():
            parser.error(f"--{name}: no such folder: {path}")
    return args


def main() -> None:
    """Parse the command line, run, print one table, write JSON."""
    args = parse()
    if not (args.dejavu or args.teal or args.polar or args.gpt_fast):
        print("peers.py compares with checkouts that you name (--help): nothing was measured")
        return
    if not torch.cuda.is_available():
        print("peers.py needs an NVIDIA GPU: nothing was measured")
        return
    print(environment(), flush=True)
    rows: list[Row] = []
    for row in run(args):
        rows.append(row)
        print(f"{row.what}, {row.shape}: {row.ours.us} us, theirs {row.theirs.us} us", flush=True)
        write(args.out, {"tolerance": {str(k): v for k, v in TOLERANCE.items()},
                         "rows": [done.to_dict() for done in rows]})  # fmt: skip
    print(table(rows))


if __name__ == "__main__":
    main()
