"""What the predictors of a model learn from: what it did on two texts, recorded once, and what it predicts there."""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from predictor_variants import Scorer, Variant, fit, uneven_ranks
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from dejavu_compile.batches import Batch, check_batches
from dejavu_compile.bench import environment
from dejavu_compile.collect import Recording, collect
from dejavu_compile.evaluate import log_probabilities, predicted
from dejavu_compile.passes.site import SiteKind
from dejavu_compile.predictors import SiteExamples, contribution_cutoff, rank_for_budget
from dejavu_compile.shapes import linears, mlps
from dejavu_compile.text import windows

ROOT = Path(__file__).parents[1]
GRADIENT_WINDOWS = 48

Text = list[tuple[Batch, Tensor]]  # each with the dense model's log probabilities


@dataclass(slots=True)
class Study:
    """A model, its recorded tokens by layer, and the two texts that it is run on."""

    model: nn.Module
    recordings: list[Recording]
    unseen: list[Recording]  # of the choice text
    choice: Text
    held_out: Text
    norms: dict[str, list[Tensor]]  # by Variant.norm
    cutoffs: dict[str, list[float]]
    fits: dict[tuple, list[Scorer]] = field(default_factory=dict)

    def source_of(self, layer: int, variant: Variant) -> int:
        """The layer that the predictor reads the input of; the first has none before it."""
        return max(layer - variant.ahead, 0)

    def sites(self, variant: Variant, unseen: bool = False) -> list[SiteExamples]:
        """What the variant's predictors learn, in the library's terms, of all layers but the first."""
        recordings, sites = self.unseen if unseen else self.recordings, []
        for layer in range(1, len(recordings)):
            source = recordings[self.source_of(layer, variant)].stacked("source")
            hidden = recordings[layer].stacked("hidden")
            norm, cutoff = self.norms[variant.norm][layer], self.cutoffs[variant.norm][layer]
            if variant.label == "energy":
                hidden = (hidden.float() * norm / cutoff).square().bfloat16()
                norm, cutoff = torch.ones_like(norm), 1.0
            sites.append(SiteExamples(source, hidden, norm, cutoff))
        return sites

    def scorers(self, variant: Variant, seed: int) -> list[Scorer]:
        """Fitted, or those of a variant that is fitted alike."""
        site, sites = self.recordings[0].site, self.sites(variant)
        rank = rank_for_budget(site.bytes_dense // 2, sites[0].source_width, site.units, 8)
        ranks = [variant.rank(rank)] * len(sites)
        if variant.ranks == "uneven":
            wide = self.scorers(replace(variant, ranks="equal", bits=4), seed)
            ranks = uneven_ranks(wide, sites, self.sites(variant, unseen=True), rank)
        key = (variant.fitted_like, tuple(ranks), seed)
        if key not in self.fits:
            into = [part.into[0].detach().float() for part in mlps(self.model)[1:]]
            self.fits[key] = fit(variant, sites, ranks, seed, into)
        return self.fits[key]


def rms_gradients(model: nn.Module, rows: Tensor, values: list[Tensor], seed: int) -> list[Tensor]:
    """Root of the mean squared gradient of log p by each of `values`, which hooks fill; next tokens drawn from the prediction."""
    generator, squares = torch.Generator().manual_seed(seed), []
    for batch in rows.split(4):
        values.clear()
        log_p = model(input_ids=batch, use_cache=False).logits.log_softmax(-1).flatten(0, 1)
        drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
        gradients = torch.autograd.grad(log_p.gather(1, drawn).sum(), values)
        squares.append(torch.stack([g.flatten(0, -2).square().sum(0) for g in gradients]))
    return list((sum(squares) / rows.numel()).sqrt())


def fisher_norms(model: nn.Module, rows: Tensor, seed: int) -> list[Tensor]:
    """Root of the mean squared gradient of log p by each unit; next tokens drawn from the prediction."""
    modules, hidden = linears(model), []
    handles = [
        modules[id(part.out)].register_forward_pre_hook(
            lambda module, args: hidden.append(args[0].requires_grad_())
        )
        for part in mlps(model)
    ]
    found = rms_gradients(model, rows, hidden, seed)
    for handle in handles:
        handle.remove()
    return found


def model_and_texts(
    path: Path, fit_windows: int, choice: int, held_out: int
) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """The model, and windows to learn from, to choose by (of other files), and held out; so many of each."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model.requires_grad_(False)
    rows = torch.cat(windows(tokenizer, ROOT / "demo/text/calibration.txt"))
    cut = len(rows) * 3 // 4
    learn, rest = spread(rows[:cut], fit_windows), spread(rows[cut:], choice)
    return (
        model,
        learn,
        rest,
        torch.cat(windows(tokenizer, ROOT / "demo/text/heldout.txt", limit=held_out)),
    )


def arguments(description: str, model: str) -> argparse.ArgumentParser:
    """What both studies take."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", type=Path, default=ROOT / "demo/models" / model)
    parser.add_argument("--only", nargs="*", help="names of variants; all by default")
    parser.add_argument(
        "--windows", type=int, nargs=3, default=[192, 8, 12], metavar=("FIT", "CHOICE", "HELD_OUT"),
        help="of 512 tokens each",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="default: a file of its own among the results")
    parser.add_argument("--resume", action="store_true", help="keep what --out holds already")
    parser.add_argument("--table", type=Path, help="a JSON: print its table, run nothing")
    return parser


def begin(
    args: argparse.Namespace, study: str, table: Callable[[list[dict[str, Any]]], str]
) -> list[dict[str, Any]] | None:
    """The variants that a run before has left in --out, with --resume and of the same windows; says where this one runs.

    None, and the table printed, where --table asks for no run at all.
    """
    if args.table:
        print(table(json.loads(args.table.read_text(encoding="utf-8"))["variants"]))
        return None
    args.out = args.out or ROOT / f"benchmarks/results/{study}-{args.model.name}.json"
    print(environment(), flush=True)
    if not args.resume or not args.out.exists():
        return []
    before = json.loads(args.out.read_text(encoding="utf-8"))
    return before["variants"] if before["windows"] == args.windows else []


def prepare(path: Path, fit_windows: int, choice: int, held_out: int) -> Study:
    """Everything that the variants share: recorded once, kept in memory."""
    model, learn, rest, test = model_and_texts(path, fit_windows, choice, held_out)
    seen, unseen = (
        collect(
            model, check_batches(model, part.split(4)), max_tokens=10**9,
            progress=lambda *_: None, kinds=(SiteKind.MLP,),
        )
        for part in (learn, rest)
    )  # fmt: skip
    norms = {
        "column": [part.out.detach().float().norm(dim=0) for part in mlps(model)],
        "fisher": fisher_norms(model, spread(learn, GRADIENT_WINDOWS), seed=0),
    }
    hidden = [r.stacked("hidden") for r in seen]
    of_all = torch.cat([h[::16].float() * n for h, n in zip(hidden, norms["fisher"], strict=True)])
    cutoffs = {
        "column": [cutoff(h, n) for h, n in zip(hidden, norms["column"], strict=True)],
        "fisher": [cutoff(of_all, torch.ones(of_all.shape[1]))] * len(seen),
    }
    texts = (dense_text(model, part) for part in (rest, test))
    return Study(model, seen, unseen, *texts, norms, cutoffs)


def spread(rows: Tensor, count: int) -> Tensor:
    """So many of the rows, evenly."""
    return rows[torch.linspace(0, len(rows) - 1, min(count, len(rows))).long()]


def cutoff(hidden: Tensor, norm: Tensor) -> float:
    """The contribution that a site can barely miss."""
    return contribution_cutoff(SiteExamples(hidden, hidden, norm))


@torch.no_grad()
def dense_text(model: nn.Module, rows: Tensor) -> Text:
    """Windows, and what the dense model predicts there."""
    batches = [{"input_ids": batch} for batch in rows.split(4)]
    return [(b, log_probabilities(model(**b, use_cache=False), predicted(b)[0])) for b in batches]
