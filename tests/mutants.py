"""Would the property tests notice? Put one deliberate bug at a time into a copy of the package, and see.

    python tests/mutants.py [--only NAME ...] [--out docs/mutants.md]

Each bug is one replacement in one file. The properties run against a copy that has it, until one fails; a bug
that none notices is printed and makes the exit status 1. Takes about half a minute a bug.
"""

import argparse
import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
GRAPHS = (
    "tests/test_properties.py",
    "tests/passes/test_in_place.py",
    "tests/passes/test_demand.py",
)
OPS = ("tests/kernels/test_any_shape.py",)
TRITON = ("tests/kernels/interpreted.py",)


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in `file`; what must notice are the tests of `run`, `first` (a part of a name) first."""

    name: str
    file: str
    old: str
    new: str
    run: tuple[str, ...] = GRAPHS
    first: str = "only_selected"


MUTANTS = (
    # --- the analysis
    Mutant("a value that escapes is restricted", "passes/find_sites.py",
           "found = {node for node in region.interior if not inside.issuperset(node.users)}",
           "found = set()", first="unless_its"),
    Mutant("any activation silences its unit", "passes/find_sites.py",
           "return hidden in zero", "return True", first="carrier_is_zero"),
    Mutant("sums keep the zeros of either term", "passes/separable.py",
           "len(inputs) == 2 and all(arg in zero", "len(inputs) == 2 and any(arg in zero", first="exact_is_lossless"),
    Mutant("a strided slice keeps step 1", "passes/find_sites.py",
           "start + stride * offset, step * stride, node.args[0]\n        elif",
           "start + stride * offset, step, node.args[0]\n        elif", first="only_selected"),
    Mutant("a chunk begins one piece late", "passes/find_sites.py",
           '[:index]]\n    return sum(sizes)', '[: index + 1]]\n    return sum(sizes)', first="only_selected"),
    Mutant("stacked gate and up are taken for paired", "passes/find_sites.py",
           "if along == rank - 2 else (index, pieces[-1], view)",
           "if along == rank - 1 else (index, pieces[-1], view)", first="only_selected"),
    Mutant("what a cache reads is owned by a head", "passes/demand.py",
           "labels[node] = _united(labels[node], _read_outside(user, node))", "pass", first="read_elsewhere"),
    Mutant("two readers: the first one's unit", "passes/demand.py",
           "return torch.where((one == other) | (one == NOBODY) | (other == NOBODY), either, MANY)",
           "return either", first="read_elsewhere"),
    Mutant("keys are shared with the next head, not within a group", "passes/demand.py",
           "of_source = head.unflatten(-3, (shape[-3], -1)).squeeze(-1)",
           "of_source = head.unflatten(-3, (-1, shape[-3])).squeeze(-1).mT", first="only_selected"),
    Mutant("writes in place are not seen", "passes/in_place.py",
           "dirty |= {base[target] for target in targets_of(node)}", "pass", first="mixture_of_writes"),
    Mutant("sizes are compared as numbers", "passes/separable.py",
           "    return str(one) == str(other)\n", "    return bool(one == other)\n", first="sizes_without"),
    Mutant("an einsum's operand isn't permuted", "passes/einsum.py",
           "node = emit.call(aten.transpose.int, node, -2, -1)", "pass", first="normalising"),
    Mutant("a bias is added to a projection that has one", "passes/bias.py",
           "if projection is None or projection.bias is not None or len(value.users) > 1",
           "if projection is None or len(value.users) > 1", first="normalising"),
    # --- the rewrite and the passes behind it
    Mutant("the output's bias is lost", "passes/rewrite.py",
           "    if output.bias is not None:\n        result = emit.call(aten.add.Tensor, result, output.bias)\n"
           "    dtype", "    dtype"),
    Mutant("the bias of fused rows isn't cut", "passes/rewrite.py",
           "bias = emit.call(aten.slice.Tensor, bias, 0, leaf.offset, stop, leaf.step)",
           "bias = emit.call(aten.slice.Tensor, bias, 0, 0, units)"),
    Mutant("a dense leaf isn't gathered", "passes/rewrite.py",
           "return emit.call(aten.index_select.default, leaf.node, leaf.dim, chosen.index)",
           "return leaf.node"),
    Mutant("rows belong to the next head", "passes/rewrite_heads.py",
           "emit.buffer(name, owned.owner.to(device))", "emit.buffer(name, owned.owner.roll(1).to(device))"),
    Mutant("scores are those of one token", "passes/rewrite_heads.py",
           "return _tokens_by(emit, score, decision.site.units)",
           "score = _tokens_by(emit, score, decision.site.units)\n"
           "    return emit.call(aten.expand.default, emit.call(aten.slice.Tensor, score, 0, 0, 1), "
           "list(shape_of(score)))"),
    Mutant("attention isn't scaled", "passes/read_attention.py",
           'scale = found["scale"] if found["scale"] is not None else shape[3] ** -0.5', "scale = 1.0"),
    Mutant("a query's scale is lost", "passes/read_attention.py",
           "node.graph.erase_node(node)\n    return factor", "node.graph.erase_node(node)\n    return 1.0",
           first="decode_kernels_alone"),
    Mutant("a soft cap is inverted", "passes/read_attention.py",
           "return replace(found, softcap=found.softcap * factor)",
           "return replace(found, softcap=found.softcap / factor)"),
    Mutant("gate and up change places", "passes/fuse.py",
           "emit.call(GLU, x, gate, gate_bias, *second.args[1:3],", "emit.call(GLU, x, *second.args[1:3], gate, gate_bias,",
           first="one_launch"),
    Mutant("a predictor joins the launch that waits for it", "passes/gemv.py",
           "rest = [m for m in rest if m.node not in decides]", "rest = rest", first="fusing"),
    Mutant("all parts of a launch are the first", "passes/gemv.py",
           "list(shape_of(member.node)))\n", "list(shape_of(member.node)))\n            start = 0\n", first="fusing"),
    Mutant("detaching leaves the attachment", "dejavu_compile/attachments.py",
           "    del _attached[weight]\n", "", first="detaching"),
    # --- the kernels
    Mutant("a NaN score is a no", "kernels/gemv.py", "return ~(score <= 0)", "return score > 0", OPS, "any_shape"),
    Mutant("the reference sums slots in the order of units", "kernels/gathered_sum.py",
           "chosen = index[:k].long()\n    values", "chosen = index[:k].long().sort().values\n    values", OPS, "any_shape"),
    Mutant("the CPU's soft cap has no effect", "kernels/cpu.cpp",
           "softcap ? softcap * std::tanh(y[r]) : y[r]", "y[r]", OPS, "any_shape"),
    Mutant("Triton: the last slot is left out", "kernels/gathered_sum.py",
           "last = tl.minimum(first + share, count)", "last = tl.minimum(first + share, count - 1)", TRITON, "any_shape"),
    Mutant("Triton: a bias after the activation", "kernels/rows.py",
           "y = activate(y, ACTIVATION)\n            if GLU",
           "y = activate(y - tl.load(bias_ptr + unit, mask=live, other=0.0).to(tl.float32) if BIAS else y, "
           "ACTIVATION)\n            if GLU", TRITON, "any_shape"),
    Mutant("Triton: splits of attention aren't weighed", "kernels/attention.py",
           "y = tl.sum(weight[:, None] * part, axis=0)", "y = tl.sum(part, axis=0)", TRITON, "any_shape"),
    Mutant("Triton: a mask without holes loses its last slot", "kernels/attention.py",
           "stop = tl.max(tl.where(seen, every + 1, begin), axis=0)", "stop = tl.max(tl.where(seen, every, begin), axis=0)",
           TRITON, "any_shape"),
    Mutant("Triton: heads are read at the first one's place", "kernels/heads.py",
           "place = tl.where(any_runs != 0, tl.cumsum(any_runs, axis=0) - 1, -1)",
           "place = tl.where(any_runs != 0, tl.cumsum(any_runs, axis=0) * 0, -1)", TRITON, "any_shape"),
)  # fmt: skip


def package(folder: Path, mutant: Mutant) -> None:
    """The package as installed, with the bug, in `folder`."""
    whole = folder / "dejavu_compile"
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "dejavu_compile", whole, ignore=skip)
    for part in ("passes", "kernels"):
        shutil.copytree(ROOT / part, whole / part, ignore=skip)
    path = whole / mutant.file.removeprefix("dejavu_compile/")
    text = path.read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        raise SystemExit(
            f"{mutant.name}: {mutant.file} holds its text {text.count(mutant.old)} times, not once"
        )
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")


def noticed_by(mutant: Mutant) -> str | None:
    """The first test that fails with the bug."""
    with tempfile.TemporaryDirectory() as folder:
        package(Path(folder), mutant)
        return run(mutant, folder, "-k", mutant.first) or run(mutant, folder)


def run(mutant: Mutant, folder: str, *more: str) -> str | None:
    """The test that fails first, of some."""
    environment = {**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1", "EXAMPLES": "60"}
    if mutant.run is TRITON:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-P", "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider",
               "--hypothesis-profile=quick", *mutant.run, *more]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    failed = re.search(r"^(?:FAILED|ERROR) \S+?::(\w+)", done.stdout, re.MULTILINE)
    if failed is None and done.returncode not in (0, 5):  # 5: no test of that name
        raise SystemExit(
            f"{mutant.name}: pytest ended without a result\n{done.stdout}{done.stderr}"
        )
    return failed[1] if failed else None


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="names, or parts of them")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, help="a Markdown table")
    args = parser.parse_args()
    chosen = [m for m in MUTANTS if not args.only or any(part in m.name for part in args.only)]
    rows, missed = [], 0
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        results = zip(chosen, pool.map(noticed_by, chosen), strict=True)
        for mutant, by in results:
            missed += by is None
            print(f"{mutant.file:<28} {mutant.name:<56} {by or 'NOT NOTICED'}", flush=True)
            rows.append(
                f"| {mutant.name} | `{mutant.file}` | {f'`{by}`' if by else '**not noticed**'} |"
            )
    if args.out:
        head = ["# Deliberate bugs", "", "Written by `python tests/mutants.py --out docs/mutants.md`: each bug is put "
                "into a copy of the package, and the property tests run until one fails.", "",
                "| bug | file | noticed by |", "|---|---|---|"]  # fmt: skip
        args.out.write_text("\n".join([*head, *rows]) + "\n", encoding="utf-8")
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
