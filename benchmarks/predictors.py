"""Predictors of MLP units at equal bytes: what they learn from, how they start, how they are rounded, what they read.

    python benchmarks/predictors.py --model demo/models/opt-python-8m --seeds 3

Each variant differs from the library's default in what its row says, and in nothing else. All are fitted on the same
tokens, the first three quarters of demo/text/calibration.txt; thresholds are set on the last quarter, in the running
model, and variants are chosen by their divergence there ("choice"). demo/text/heldout.txt is only reported on.
Selections are applied by module hooks on the eager model, outside of our graph, token by token; layer 0 runs dense.
The variants of the least divergence, and the default, are fitted with all seeds; the others with the first.

recall: share of the contributions' sum that runs, and of the units that pass `contribution_cutoff`. density: of what
ran on the held-out text. Prints one table last and writes JSON, after every variant; --resume goes on from there.
"""

import math
import statistics
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from typing import Any

import torch
from predictor_data import Study, Text, arguments, begin, prepare
from predictor_variants import UNROUNDED, VARIANTS, Scorer, Variant
from torch import Tensor, nn

from dejavu_compile.bench import write
from dejavu_compile.evaluate import Evaluation, Tally, log_probabilities, predicted
from dejavu_compile.predictors import SiteExamples, threshold_for_density
from dejavu_compile.shapes import linears, mlps

DENSITIES = {"relu": (0.1, 0.2, 0.3), "silu": (0.3, 0.4, 0.5)}
CONTENDERS = 2


@dataclass(slots=True)
class Run:
    """What ran of a text, over all layers but the first, and what that lost."""

    quality: Evaluation
    counts: Counter[str]
    scores: list[Tensor]  # by layer, of every fourth token

    def share(self, part: str, whole: str) -> float:
        """Of two counts."""
        return self.counts[part] / self.counts[whole]


@torch.no_grad()
def run(
    study: Study, text: Text, variant: Variant, scorers: list[Scorer], thresholds: list[float],
    density: float, refill: list[Tensor] | None,
) -> Run:  # fmt: skip
    """The eager model with each token's selection applied, by hooks, against dense."""
    modules, handles, counts, tally = linears(study.model), [], Counter(), Tally()
    sources: dict[int, Tensor] = {}
    scores: list[list[Tensor]] = [[] for _ in scorers]

    def remember(layer: int) -> Any:
        return lambda module, args: sources.__setitem__(layer, args[0].flatten(0, -2))

    def keep_selected(layer: int) -> Any:
        def keep(module: nn.Module, args: tuple) -> tuple:
            hidden = args[0].flatten(0, -2)
            score = scorers[layer - 1](sources[study.source_of(layer, variant)])
            scores[layer - 1].append(score[::4])
            if variant.threshold == "token":
                best = score.topk(round(density * score.shape[-1]), dim=-1).indices
                runs = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, best, True)
            else:
                runs = score > thresholds[layer - 1]
            contribution = hidden.abs() * study.norms["column"][layer]
            active = contribution > study.cutoffs["column"][layer]
            counts.update(
                ran=runs.sum().item(), units=runs.numel(),
                kept=(contribution * runs).sum().item(), contribution=contribution.sum().item(),
                found=(active & runs).sum().item(), active=active.sum().item(),
            )  # fmt: skip
            other = 0.0 if refill is None else refill[layer - 1]
            return (torch.where(runs, hidden, other).view_as(args[0]),)

        return keep

    for layer, part in enumerate(mlps(study.model)):
        handles.append(modules[id(part.into[0])].register_forward_pre_hook(remember(layer)))
        if layer:
            handles.append(modules[id(part.out)].register_forward_pre_hook(keep_selected(layer)))
    for batch, dense in text:
        keep, target = predicted(batch)
        tally.add(dense, log_probabilities(study.model(**batch, use_cache=False), keep), target)
    for handle in handles:
        handle.remove()
    return Run(tally.result(), counts, [torch.cat(s) for s in scores])


def thresholds_of(scores: list[Tensor], variant: Variant, density: float) -> list[float]:
    """Of every layer: one for all, or one each."""
    if variant.threshold == "layer":
        return [threshold_for_density(score, density) for score in scores]
    return [threshold_for_density(torch.cat(scores), density)] * len(scores)


def skipped_means(
    sites: list[SiteExamples], scores: list[Tensor], thresholds: list[float]
) -> list[Tensor]:
    """What each unit is on average where it is skipped."""
    means = []
    for site, score, threshold in zip(sites, scores, thresholds, strict=True):
        skipped = score <= threshold
        means.append((site.hidden.float() * skipped).sum(0) / skipped.sum(0).clamp(min=1))
    return means


def measure(study: Study, variant: Variant, seed: int) -> dict[str, Any]:
    """Fit one variant and run it at every density: thresholds first, from the scores of a dense, then a sparse model."""
    begin = time.perf_counter()
    scorers = study.scorers(variant, seed)
    fit_s, rows = time.perf_counter() - begin, []
    scorers = [scorer.rounded(variant.bits) for scorer in scorers]
    sites = study.sites(variant, unseen=True)
    scores = [scorer(site.source) for scorer, site in zip(scorers, sites, strict=True)]
    activation = study.model.config.to_dict().get("hidden_act", "relu")
    for density in DENSITIES[activation]:
        thresholds = thresholds_of(scores, variant, density)
        refill = skipped_means(sites, scores, thresholds) if variant.refill else None
        choice = run(study, study.choice, variant, scorers, thresholds, density, refill)
        thresholds = thresholds_of(choice.scores, variant, density)
        test = run(study, study.held_out, variant, scorers, thresholds, density, refill)
        rows.append(
            {
                "density": density, "measured_density": test.share("ran", "units"),
                "recall_contribution": test.share("kept", "contribution"),
                "recall_active": test.share("found", "active"),
                "choice_density": choice.share("ran", "units"), "choice_kl": choice.quality.kl,
                **test.quality.to_dict(),
            }
        )  # fmt: skip
    dense_bytes = sum(r.site.bytes_dense // 2 for r in study.recordings[1:])
    predictor_bytes = sum(scorer.num_bytes(variant.bits) for scorer in scorers)
    return {
        **asdict(variant), "seed": seed, "fit_s": fit_s, "bytes": predictor_bytes,
        "share_of_bytes": predictor_bytes / dense_bytes,
        "rank_of_layer": [scorer.down.shape[0] for scorer in scorers],
        "choice": at_densities(rows, "choice_density", "choice_kl"),
        "held_out": at_densities(rows, "measured_density", "kl"),
        "rows": rows,
    }  # fmt: skip


def at_densities(rows: list[dict[str, float]], ran: str, kl: str) -> float:
    """Divergence at the densities asked, which differ a little from those that ran: log-linear; geometric mean."""
    points, total = [(row[ran], math.log(row[kl])) for row in rows], 0.0
    for row in rows:
        right = next((i for i in range(1, len(points)) if points[i][0] >= row["density"]), -1)
        (x0, y0), (x1, y1) = points[right - 1], points[right]
        total += y0 + (y1 - y0) * (row["density"] - x0) / (x1 - x0)
    return math.exp(total / len(rows))


def table(results: list[dict[str, Any]]) -> str:
    """One row a variant, best choice first: means over seeds, ± half of the range over them."""
    columns = [("KL, choice", ".4f", lambda r: r["choice"])]
    columns += [("KL, held out", ".4f", lambda r: r["held_out"])]

    def at(i: int, title: str, key: str, form: str) -> None:
        columns.append((title, form, lambda r: r["rows"][i][key]))

    densities = [row["density"] for row in results[0]["rows"]]
    for i, density in enumerate(densities):
        at(i, f"perplexity at {density:.0%}", "perplexity_increase", "+.2%")
        at(i, "ran", "measured_density", ".1%")
        at(i, "top-1", "top1_agreement", ".2%")
    at(0, f"recall at {densities[0]:.0%}: norm", "recall_contribution", ".1%")
    at(0, "active", "recall_active", ".1%")
    runs = defaultdict(list)
    for result in results:
        runs[result["name"]].append(result)
    head = ["variant", "seeds", "bytes", *(title for title, _, _ in columns)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for of in sorted(runs.values(), key=lambda of: statistics.fmean(r["choice"] for r in of)):
        cells = [of[0]["name"], str(len(of)), f"{of[0]['share_of_bytes']:.1%}"]
        cells += [shown([value(r) for r in of], form) for _, form, value in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shown(values: list[float], form: str) -> str:
    """Their mean, and where there are several half of their range, in the same digits."""
    half = (max(values) - min(values)) / 2 * (100 if form.endswith("%") else 1)
    spread = f" ± {half:{form.strip('+%f')}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{spread}"


def main() -> None:
    """Parse the command line, run, write JSON after every variant."""
    parser = arguments(__doc__.splitlines()[0], "opt-python-8m")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    results = begin(args, "predictors", table)
    if results is None:
        return
    study = prepare(args.model, *args.windows)

    def add(variant: Variant, seed: int) -> None:
        if any((r["name"], r["seed"]) == (variant.name, seed) for r in results):
            return
        result = measure(study, variant, seed)
        results.append(result)
        write(args.out, {"model": args.model.name, "windows": args.windows, "variants": results})
        increases = ", ".join(f"{row['perplexity_increase']:+.2%}" for row in result["rows"])
        print(
            f"{variant.name:<28} seed {seed}: KL {result['choice']:.5f} (held out "
            f"{result['held_out']:.5f}), perplexity {increases}, fitted in {result['fit_s']:.0f} s",
            flush=True,
        )

    chosen = [v for v in VARIANTS if not args.only or v.name in args.only]
    for variant in chosen:
        add(variant, 0)
    # Of the default's bytes, from a source that is there in time
    contenders = {v.name for v in chosen if v.bits != UNROUNDED and v.ahead >= 1}
    firsts = (r for r in results if r["name"] in contenders and r["seed"] == 0)
    best = sorted(firsts, key=lambda r: r["choice"])[:CONTENDERS]
    repeated = {"default", *(r["name"] for r in best)}
    for seed in range(1, args.seeds):
        study.fits.clear()
        for variant in (v for v in chosen if v.name in repeated):
            add(variant, seed)
    print(table(results))


if __name__ == "__main__":
    main()
