"""Quality against density on the trained demo decoders: predicted, gated, and an oracle.

    python benchmarks/quality.py --model demo/models/opt-python-8m --policies predict

For each density: perplexity, KL and top-1 agreement with dense on held-out text, masked execution of the
compiled graph. The oracle keeps, in each token and layer, the units with the largest |activation| x norm
of the output-projection column; it is applied by module hooks, outside of our graph. With --heads the units
are attention heads, the oracle ranks them by the norm of their contribution after the output projection, and
keeps in each layer those above the quantile that the density asks for. The predictors are asked for what makes them
run at that density, counted by hooks: what they read there is no longer what dense layers give. Prints one table and
writes JSON; the predictors' layers are all but the first.

    python benchmarks/quality.py --model build/decoders/opt-python-107m --text build/decoders --existence --budgets 0.005 0.01 0.02

--existence adds the two-pass check with the best units, the same ones for every token, and random ones, in all layers;
--budgets what `dv.calibrate` chooses for itself within a budget of perplexity, and what it then loses on the text
held out.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import dejavu_compile as dv
from dejavu_compile.batches import check_batches
from dejavu_compile.bench import environment, write
from dejavu_compile.calibrate import remeasured
from dejavu_compile.collect import Recording, collect
from dejavu_compile.evaluate import compare, evaluate
from dejavu_compile.passes.site import SiteKind
from dejavu_compile.shapes import linears, mlps
from dejavu_compile.text import windows

ROOT = Path(__file__).parents[1]
HEAD_DENSITIES = (0.5, 0.67, 0.84, 1.0)
EXISTENCE_BATCHES = 4
EXISTENCE_DENSITIES = (0.05, 0.1, 0.2, 0.5)
DENSITIES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0)


def oracle(model: nn.Module, batches: list[torch.Tensor], density: float, first: int) -> Any:
    """Evaluation with the best units by contribution kept, in every layer from `first` on."""
    modules = linears(model)

    def keep_best(module: nn.Module, args: tuple) -> tuple:
        hidden = args[0]
        contribution = hidden.abs() * module.weight.norm(dim=0)
        k = max(1, round(density * hidden.shape[-1]))
        kept = contribution.topk(k, dim=-1).indices
        mask = torch.zeros_like(hidden).scatter_(-1, kept, 1.0)
        return (hidden * mask,)

    def sparse(**kwargs: Any) -> Any:
        handles = [
            modules[id(part.out)].register_forward_pre_hook(keep_best)
            for part in mlps(model)[first:]
        ]
        try:
            return model.forward(**kwargs)
        finally:
            for handle in handles:
                handle.remove()

    return compare(model, [{"input_ids": b} for b in batches], sparse)


def head_oracle(
    model: nn.Module, batches: list[torch.Tensor], seen: list[Recording], density: float
) -> Any:
    """Evaluation with the heads above each layer's own quantile kept, in every layer but the first."""
    modules = dict(model.named_modules())

    def keep_largest(record: Recording) -> Any:
        contributions = record.stacked("hidden").float()
        cut = contributions.flatten().sort().values
        at = round((1 - density) * cut.numel())
        threshold = -1.0 if at == 0 else cut[at - 1].item()
        heads = record.site.units

        def keep(module: nn.Module, args: tuple) -> tuple:
            y = args[0].unflatten(-1, (heads, -1))
            columns = module.weight.unflatten(1, (heads, -1))
            norms = torch.stack(
                [(y[..., h, :] @ columns[:, h].T).norm(dim=-1) for h in range(heads)], dim=-1
            )
            return ((y * (norms > threshold)[..., None]).flatten(-2),)

        return keep

    def sparse(**kwargs: Any) -> Any:
        handles = [
            modules[record.site.name.removesuffix(".weight")].register_forward_pre_hook(
                keep_largest(record)
            )
            for record in seen[1:]
        ]
        try:
            return model.forward(**kwargs)
        finally:
            for handle in handles:
                handle.remove()

    return compare(model, [{"input_ids": b} for b in batches], sparse)


def running_heads(model: nn.Module, batches: list[torch.Tensor], calibration: Any) -> float:
    """The share of heads that run, of the layers with a predictor, in a model that runs these heads only."""
    modules, handles, read = dict(model.named_modules()), [], {}
    counts = torch.zeros(2)
    predicted = {s.name: s for s in calibration.sites if s.kind == "attention" and s.predictor}

    def remember(name: str) -> Any:
        return lambda module, args: read.__setitem__(name, args[0])

    def keep_predicted(site: Any) -> Any:
        def keep(module: nn.Module, args: tuple) -> tuple:
            runs = site.predictor.score(read[site.source]) > site.threshold
            counts.add_(torch.tensor([runs.sum(), runs.numel()]))
            return ((args[0].unflatten(-1, (site.units, -1)) * runs[..., None]).flatten(-2),)

        return keep

    for name in {s.source for s in predicted.values()}:
        attention = modules[name.rsplit(".", 2)[0]]
        handles.append(attention.q_proj.register_forward_pre_hook(remember(name)))
    for name, site in predicted.items():
        output = modules[name.removesuffix(".weight")]
        handles.append(output.register_forward_pre_hook(keep_predicted(site)))
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return (counts[0] / counts[1]).item()


def asked_for(
    model: nn.Module, batches: list[torch.Tensor], calibration: Any, density: float
) -> tuple[float, float]:
    """The density to ask for so that about this share of the heads run, and the share that did."""
    low, high, best = density - 0.15, min(1.0, density + 0.15), (1.0, 1.0)
    for _ in range(5 if density < 1 else 0):
        middle = (low + high) / 2
        ran = running_heads(model, batches, calibration.at_density(1.0, head_density=middle))
        if abs(ran - density) < abs(best[1] - density):
            best = middle, ran
        low, high = (low, middle) if ran > density else (middle, high)
    return best


def run_heads(args: argparse.Namespace) -> dict[str, Any]:
    """Heads alone, then beside a sparse MLP, each with the oracle at the same density of heads."""
    model, text, held_out = prepared(args)
    rows = []

    def add(what: str, density: float, actual: float, result: Any) -> None:
        rows.append({"what": what, "head_density": density, "actual": actual, **result.to_dict()})
        print(f"{what:<10} {density:5.2f} (measured {actual:.3f})  {result}", flush=True)

    seen = collect(
        model, check_batches(model, held_out), max_tokens=10**9, progress=lambda *_: None,
        kinds=(SiteKind.ATTENTION,),
    )  # fmt: skip
    calibration = dv.calibrate(model, text, density=0.5, head_density=0.5, progress=False)
    dv.detach(model)
    asked = {d: asked_for(model, held_out[::4], calibration, d) for d in HEAD_DENSITIES}
    for what, mlp in (("heads", 1.0), ("and MLPs", args.mlp_density)):
        for density in HEAD_DENSITIES:
            calibration.at_density(mlp, head_density=asked[density][0]).attach(model)
            add(what, *asked[density], evaluate(model, held_out))
            dv.detach(model)
    for density in HEAD_DENSITIES:
        add("oracle", density, density, head_oracle(model, held_out, seen, density))
    return {
        "model": Path(args.model).name, "windows": args.windows, "mlp_density": args.mlp_density,
        "heads": seen[0].site.units, "rows": rows,
    }  # fmt: skip


def prepared(
    args: argparse.Namespace,
) -> tuple[nn.Module, list[torch.Tensor], list[torch.Tensor]]:
    """The model, the text to calibrate on, and the text held out."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval().to(device)
    texts = (
        windows(tokenizer, args.text / f"{name}.txt", limit=limit)
        for name, limit in (("calibration", args.calibration_windows), ("heldout", args.windows))
    )
    return model, *([batch.to(device) for batch in text] for text in texts)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All policies and densities of one model."""
    model, text, held_out = prepared(args)
    rows = []

    def add(policy: str, density: float, actual: float, result: Any) -> None:
        rows.append(
            {"policy": policy, "density": density, "actual_density": actual, **result.to_dict()}
        )
        print(f"{policy:<8} {density:5.2f} (measured {actual:.3f})  {result}", flush=True)

    seen = collect(
        model, check_batches(model, held_out), max_tokens=10**9, progress=lambda *_: None,
        kinds=(SiteKind.MLP,),
    )  # fmt: skip
    seconds = {}
    for policy in args.policies:
        started = time.monotonic()
        calibration = dv.calibrate(model, text, policy=policy, density=0.5, progress=False)
        seconds[policy] = time.monotonic() - started
        for density in args.densities:
            candidate = calibration.at_density(density)
            candidate.attach(model)
            measured = remeasured(candidate, seen, share=1.0)
            add(policy, density, measured.thresholded_density, evaluate(model, held_out))
            rows[-1]["recall"] = _recall(measured)
    dv.detach(model)
    for density in args.densities:
        add("oracle", density, density, oracle(model, held_out, density, first=1))
    result = {"model": Path(args.model).name, "parameters": model.num_parameters(),
              "windows": args.windows, "calibration_s": seconds, "rows": rows}  # fmt: skip
    write(args.out, result | {"partial": True})
    for budget in args.budgets:
        result.setdefault("budgets", []).append(within(model, text, held_out, budget))
        write(args.out, result | {"partial": True})
    if args.existence:
        checked = dv.verify(
            model, held_out[:EXISTENCE_BATCHES], args.existence_densities, progress=False
        )
        print(checked, flush=True)
        checked.plot(args.out.with_suffix(".png"))
        result["existence"] = checked.to_dict()
        write(args.out, result | {"partial": True})
    return result


def _recall(calibration: Any) -> float:
    """The share of the contributions that the selected units make, mean over the sites with a predictor."""
    recalls = [s.metrics.recall for s in calibration.sites if s.predictor is not None]
    return sum(recalls) / len(recalls) if recalls else float("nan")


def within(
    model: nn.Module, text: list[torch.Tensor], held_out: list[torch.Tensor], budget: float
) -> dict[str, Any]:
    """What `calibrate` chooses within a budget, how long it takes, and what that loses on the text held out."""
    started = time.monotonic()
    chosen = dv.calibrate(model, text, max_ppl_increase=budget, progress=False)
    seconds = time.monotonic() - started
    row = {"budget": budget, "seconds": seconds, "density": chosen.density,
           "head_density": chosen.head_density, "measured": chosen.thresholded_density,
           "on_calibration_text": chosen.quality.to_dict(), **evaluate(model, held_out).to_dict()}  # fmt: skip
    dv.detach(model)
    print(f"budget {budget:.2%}: {row}", flush=True)
    return row


def main() -> None:
    """Parse the command line, run, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "demo/models/opt-python-8m")
    parser.add_argument("--policies", nargs="*", default=["predict"])
    parser.add_argument("--heads", action="store_true", help="attention heads instead of MLPs")
    parser.add_argument("--mlp-density", type=float, default=0.25, help="of --heads' second curve")
    parser.add_argument(
        "--text",
        type=Path,
        default=ROOT / "demo/text",
        help="a folder with calibration.txt and heldout.txt",
    )
    parser.add_argument("--densities", type=float, nargs="+", default=DENSITIES)
    parser.add_argument(
        "--existence", action="store_true", help="static and random units too, and a picture"
    )
    parser.add_argument(
        "--existence-densities", type=float, nargs="+", default=EXISTENCE_DENSITIES
    )
    parser.add_argument(
        "--budgets", type=float, nargs="*", default=[], help="of perplexity: 0.01 is 1 %%"
    )
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--calibration-windows", type=int, default=320)
    parser.add_argument("--out", type=Path, help="default: quality-MODEL.json among the results")
    args = parser.parse_args()
    print(environment(), flush=True)
    kind = "heads-" if args.heads else ""
    args.out = args.out or ROOT / f"benchmarks/results/quality-{kind}{args.model.name}.json"
    write(args.out, run_heads(args) if args.heads else run(args))


if __name__ == "__main__":
    main()
