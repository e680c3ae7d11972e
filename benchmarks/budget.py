"""Is the budget kept? What `dv.calibrate` chooses within budgets of perplexity, and what that loses on other text.

    python benchmarks/budget.py --model demo/models/opt-python-8m

Each seed is a user with a text of his own: documents of demo/text/calibration.txt in an order of its own, windows spread
evenly over these, as `dejavu calibrate --text` takes them. From there it goes as in `dv.calibrate`: five sixths are
learnt from, and the search for each budget judges on a sixth; predictors are fitted once for all budgets. What was
chosen is then measured on demo/text/heldout.txt, other documents, which decide nothing. `ratio`: the increase there, as a share of what was asked;
`read`: the bytes that the sites with a policy read a step by the cost model, as a share of dense. Rows are written one by
one; a run that was interrupted goes on. Prints one table last.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from dejavu_compile.allocate import allocations, bytes_read, search
from dejavu_compile.artifact import detach
from dejavu_compile.batches import Batch, check_batches
from dejavu_compile.bench import environment, write
from dejavu_compile.calibrate import alternatives, fit, learn_and_judge, remeasured
from dejavu_compile.evaluate import compare, masked
from dejavu_compile.progress import Bars
from dejavu_compile.text import windows, windows_of
from dejavu_compile.workdir import Memory, Tensors

ROOT = Path(__file__).parents[1]
ALLOWED = 1.25  # of what was asked, on other text


class _Once(Memory):
    """Measures a candidate that several budgets' searches meet only once."""

    def __init__(self) -> None:
        self._made: dict[str, Tensors] = {}

    def once(self, name: str, make: Callable[[], Tensors]) -> Tensors:
        """What `make` gave first, of a measured quality."""
        if not name.startswith("quality"):
            return make()
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]


def drawn(tokenizer: Any, path: Path, count: int, seed: int) -> list[torch.Tensor]:
    """Batches of `count` windows, spread evenly over the documents in `path`, in an order of the seed."""
    documents = path.read_text(encoding="utf-8").split(tokenizer.eos_token)
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed))
    text = tokenizer.eos_token.join(documents[number] for number in order.tolist())
    return windows_of(tokenizer, text, str(path), limit=count)


def repetition(
    model: nn.Module, text: list[torch.Tensor], held_out: list[Batch], policy: str, seed: int,
    budgets: Sequence[float],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """A row for each budget, from one fit."""
    detach(model)
    bars, store, started = Bars(False), _Once(), time.monotonic()
    learn, judge = learn_and_judge(check_batches(model, text))
    fitted, recordings = fit(
        model, learn, policy, heads=policy in ("auto", "predict"), lookahead=1, seed=seed,
        progress=bars, store=store,
    )  # fmt: skip
    ways = alternatives(fitted, recordings, policy)
    candidates = allocations(
        model, fitted, recordings, ways, learn, seed=seed, progress=bars, store=store
    )
    fit_s = time.monotonic() - started
    for budget in budgets:
        started = time.monotonic()
        chosen = search(model, candidates, judge, budget, bars, store)
        search_s = time.monotonic() - started
        on_judge, chosen = chosen.quality, remeasured(chosen, recordings)
        chosen.attach(model)
        result = compare(model, held_out, masked(model))
        read, of = bytes_read(chosen, recordings)
        yield {
            "policy": policy, "seed": seed, "budget": budget,
            "judge": on_judge.to_dict(), "held_out": result.to_dict(),
            "ratio": result.perplexity_increase / budget,
            "density": chosen.density, "head_density": chosen.head_density, "read": read / of,
            "sites": [
                {"name": s.name, "policy": str(s.policy), "rank": s.predictor.rank if s.predictor else 0,
                 "density": s.metrics.density if s.metrics else s.density}
                for s in chosen.sites
            ],
            "fit_s": fit_s, "search_s": search_s,
        }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    judge, held_out = row["judge"], row["held_out"]
    return (
        f"{row['policy']:<8}{row['seed']:>4}{row['budget']:>8.1%}{judge['perplexity_increase']:>9.2%}"
        f"{judge['perplexity_increase_at_most']:>9.2%}{held_out['perplexity_increase']:>10.2%}"
        f"{row['ratio']:>7.2f}{row['density']:>9.3f}{row['head_density']:>7.2f}{row['read']:>7.3f}"
    )


def table(rows: list[dict[str, Any]]) -> str:
    """All rows, and whether the budget was kept in each."""
    head = (
        f"{'policy':<8}{'seed':>4}{'asked':>8}{'judge':>9}{'at most':>9}{'held out':>10}{'ratio':>7}{'density':>9}"
        f"{'heads':>7}{'read':>7}"
    )
    worst = max(row["ratio"] for row in rows)
    kept = sum(row["ratio"] <= ALLOWED for row in rows)
    said = f"within {ALLOWED} of what was asked: {kept} of {len(rows)}; at worst {worst:.2f}"
    return "\n".join((head, *map(line, rows), said))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All policies, seeds and budgets that a run before hasn't done."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval().to(device)
    held_out = check_batches(
        model, windows(tokenizer, args.text / "heldout.txt", limit=args.held_out_windows)
    )
    result: dict[str, Any] = {
        "model": Path(args.model).name, "windows": args.windows,
        "held_out_windows": args.held_out_windows, "drawn": "spread", "rows": [],
    }  # fmt: skip
    if args.out.exists():
        before = json.loads(args.out.read_text(encoding="utf-8"))
        same = ("model", "windows", "held_out_windows", "drawn")
        if any(before.get(key) != result[key] for key in same):
            raise SystemExit(f"{args.out} holds another run: give another --out, or remove it")
        result["rows"] = before["rows"]
    done = {(row["policy"], row["seed"], row["budget"]) for row in result["rows"]}
    for policy in args.policies:
        for seed in args.seeds:
            left = [b for b in args.budgets if (policy, seed, b) not in done]
            text = drawn(tokenizer, args.text / "calibration.txt", args.windows, seed)
            for row in repetition(model, text, held_out, policy, seed, left) if left else ():
                result["rows"].append(row)
                write(args.out, result)
                print(line(row), flush=True)
    return result


def main() -> None:
    """Parse the command line, run, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "demo/models/opt-python-8m")
    parser.add_argument("--policies", nargs="+", default=["auto"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.005, 0.01, 0.02])
    parser.add_argument("--windows", type=int, default=192, help="to learn from and to judge on")
    parser.add_argument("--held-out-windows", type=int, default=132)
    parser.add_argument(
        "--text",
        type=Path,
        default=ROOT / "demo/text",
        help="a folder with calibration.txt and heldout.txt",
    )
    parser.add_argument("--out", type=Path, help="default: budget-MODEL.json among the results")
    args = parser.parse_args()
    print(environment(), flush=True)
    args.out = args.out or ROOT / f"benchmarks/results/budget-{args.model.name}.json"
    print(table(run(args)["rows"]))


if __name__ == "__main__":
    main()
