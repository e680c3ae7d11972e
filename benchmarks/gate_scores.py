"""What the score of a gate should know of `up`: variants of it, at equal density and at equal bytes.

    python benchmarks/gate_scores.py --model demo/models/llama-python-8m

The policy `gate` reads the gate projection in full and runs the units u where |a_u| s_u is above a threshold: a_u the
activated gate, s_u = rms of d log p / d a_u. What a unit adds is a_u up_u, and up_u isn't there yet. Here a score is

    |a_u| sqrt(U_u^2 + r_u^2) w_u        U: an approximation of up, r: rms of what it misses, w: a weight

by hooks on the eager model, outside of our graph, token by token, in all layers. Fitted, and thresholds set and
measured, on the texts of predictors.py; one threshold for all layers. "reads" is the share of the MLP's bytes that a
token takes, a half of all units run. Prints one table last and writes JSON, after every variant.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from predictor_data import (
    GRADIENT_WINDOWS,
    Text,
    arguments,
    begin,
    dense_text,
    model_and_texts,
    rms_gradients,
    spread,
)
from torch import Tensor, nn
from up_approximations import Moments, few_bits, low_rank, moments

from dejavu_compile.bench import write
from dejavu_compile.evaluate import Evaluation, Tally, log_probabilities, predicted
from dejavu_compile.predictors import rank_for_budget, threshold_for_density
from dejavu_compile.shapes import linears, mlps

DENSITIES = (0.3, 0.4, 0.45, 0.5, 0.6)
SHOWN = (0.3, 0.45, 0.5)
CHUNK = 8192
STEPS, BATCH_TOKENS = 500, 512


@dataclass(frozen=True, slots=True)
class Variant:
    """What a score knows."""

    name: str
    up: str = "low rank"  # nothing; exact; few bits; descent: low rank, fitted to what units add
    budget: float = 0.05  # of the MLP's bytes, for a low rank
    bits: float | None = 4  # None: not rounded
    ahead: int = 0  # layers
    # Its sensitivity; column: its norm; both: in each layer's unit of the loss; gate: s; relative: s over up's rms
    weight: str = "hidden"
    missed: str = "at gates"  # weighted by a^2; plain; nothing
    rotated: bool = True
    compensated: bool = True
    gate_bits: float | None = None  # the gate is approximated too, and read where units run


VARIANTS = (
    Variant("gate", up="nothing", weight="gate"),
    Variant("exact", up="exact"),
    Variant("2 bits", up="few bits", bits=2),
    Variant("2 bits, gate's weight", up="few bits", bits=2, weight="relative"),
    Variant("gate in 4 bits, up in 2", up="few bits", bits=2, gate_bits=4),
    Variant("rank, int4"),
    Variant("1 bit", up="few bits", bits=1),
    Variant("gate in 2 bits, up in 2", up="few bits", bits=2, gate_bits=2),
    Variant("2 bits, nothing missed", up="few bits", bits=2, missed="nothing"),
    Variant("2 bits, not compensated", up="few bits", bits=2, compensated=False),
    Variant("rank, int4, ahead", ahead=1),
    Variant("2 bits, ahead", up="few bits", bits=2, ahead=1),
    Variant("2 bits, column norm", up="few bits", bits=2, weight="column"),
    Variant("2 bits, both", up="few bits", bits=2, weight="both"),
    Variant("rank, not rounded", bits=None),
    Variant("rank, int4, by descent", up="descent"),
    Variant("rank, int4, 2.5 %", budget=0.025),
    Variant("rank, int4, nothing missed", missed="nothing"),
    Variant("rank, int4, not rotated", rotated=False),
    Variant("3 values", up="few bits", bits=1.6),
    Variant("gate in 3 bits, up in 1", up="few bits", bits=1, gate_bits=3),
    Variant("gate in 3 bits, up in 2", up="few bits", bits=2, gate_bits=3),
    Variant("gate in 4 bits, up in 3", up="few bits", bits=3, gate_bits=4),
    Variant("gate in 4 bits, up in 4", up="few bits", bits=4, gate_bits=4),
    Variant("rank, int4, ahead, 2.5 %", ahead=1, budget=0.025),
    Variant("1 bit, ahead", up="few bits", bits=1, ahead=1),
    Variant("rank, int4, plain rms", missed="plain"),
    Variant("rank, int4, column norm", weight="column"),
    Variant("gate, column norm", up="nothing", weight="column"),
    Variant("exact, column norm", up="exact", weight="column"),
    Variant("exact, both", up="exact", weight="both"),
)


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """y = matrix x + bias."""

    matrix: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix, self.bias)


@dataclass(frozen=True, slots=True, eq=False)
class Scorer:
    """|a| sqrt(up(x)^2 + missed^2) weight, [tokens, units]; `gate` where a is approximated too."""

    up: Linear | None
    missed: Tensor
    weight: Tensor
    gate: Linear | None = None

    def __call__(self, x: Tensor, source: Tensor, activated: Tensor) -> Tensor:
        if self.gate is not None:
            activated = F.silu(self.gate(x))
        if self.up is None:
            return activated.abs() * self.weight
        return activated.abs() * (self.up(source).square() + self.missed**2).sqrt() * self.weight


@dataclass(slots=True)
class Study:
    """A model, the inputs of its MLPs on the text to fit on, [tokens, width], and the two texts that it is run on."""

    model: nn.Module
    inputs: list[Tensor]
    choice: Text
    held_out: Text
    weights: dict[str, list[Tensor]]  # by Variant.weight
    known: dict[tuple[int, int], Moments]

    def source_of(self, layer: int, variant: Variant) -> int:
        """The layer whose input an approximation reads; the first has none before it."""
        return max(layer - variant.ahead, 0)

    def moments(self, layer: int, source: int) -> Moments:
        """Of `up` and of what it is approximated from."""
        if (layer, source) not in self.known:
            up = F.linear(self.inputs[layer], mlps(self.model)[layer].into[1])
            self.known[layer, source] = moments(self.inputs[source], up)
        return self.known[layer, source]


def sensitivities(model: nn.Module, rows: Tensor, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """rms of d log p / d a_u and of d log p / d (a_u up_u), by layer; next tokens drawn from the prediction."""
    modules, values = linears(model), []
    handles = [
        h
        for part in mlps(model)
        for h in (
            part.act.register_forward_hook(lambda m, a, out: values.append(out.requires_grad_())),
            modules[id(part.out)].register_forward_pre_hook(
                lambda m, args: values.append(args[0])
            ),
        )
    ]
    roots = rms_gradients(model, rows, values, seed)
    for handle in handles:
        handle.remove()
    return roots[0::2], roots[1::2]


@torch.no_grad()
def inputs_of(model: nn.Module, rows: Tensor) -> list[Tensor]:
    """What each MLP reads, [tokens, width]."""
    modules, found = linears(model), [[] for _ in mlps(model)]
    handles = [
        modules[id(part.into[0])].register_forward_pre_hook(
            lambda m, args, to=to: to.append(args[0].flatten(0, -2))
        )
        for part, to in zip(mlps(model), found, strict=True)
    ]
    for batch in rows.split(4):
        model.model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return [torch.cat(of) for of in found]


def prepare(path: Path, fit_windows: int, choice: int, held_out: int) -> Study:
    """Everything that the variants share; the texts of predictor_data.py."""
    model, learn, rest, test = model_and_texts(path, fit_windows, choice, held_out)
    gate, hidden = sensitivities(model, spread(learn, GRADIENT_WINDOWS), seed=0)
    column = [part.out.detach().norm(dim=0) for part in mlps(model)]
    both = [c * (h.norm() / c.norm()) for c, h in zip(column, hidden, strict=True)]
    weights = {"gate": gate, "hidden": hidden, "column": column, "both": both}
    texts, inputs = (dense_text(model, part) for part in (rest, test)), inputs_of(model, learn)
    weights["relative"] = [
        s / rms(part.into[1], x) for s, part, x in zip(gate, mlps(model), inputs, strict=True)
    ]
    return Study(model, inputs, *texts, weights, {})


def rms(projection: Tensor, inputs: Tensor) -> Tensor:
    """Of each of its outputs."""
    total = sum(F.linear(x, projection).square().sum(0) for x in inputs.split(CHUNK))
    return (total / len(inputs)).sqrt()


def descended(study: Study, layer: int, rank: int, bits: float, weight: Tensor) -> Tensor:
    """`low_rank`, then Adam on weighted cross entropy of "runs", the score being the logarithm of what a unit adds.

    As the library fits predictors, squared: with m = (a up w)^2 in units of its mean, m softplus(-s) + softplus(s).
    """
    part, inputs = mlps(study.model)[layer], study.inputs[layer]
    of = study.moments(layer, layer)
    up, down = (m.float() for m in low_rank(of, rank, None, weight))
    turn = torch.linalg.qr(torch.randn(rank, rank, generator=torch.Generator().manual_seed(0))).Q
    up, down, log_missed = up @ turn, turn.T @ down, torch.full((len(up),), -1.0)
    params = [t.contiguous().requires_grad_() for t in (up, down, log_missed)]
    rates = [up.std().item() * 0.02, down.std().item() * 0.02, 0.02]
    optimizer = torch.optim.Adam(
        [{"params": [p], "lr": r} for p, r in zip(params, rates, strict=True)]
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    generator = torch.Generator().manual_seed(0)

    def stored(matrix: Tensor) -> Tensor:
        step = matrix.detach().abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
        return matrix + ((matrix / step).round() * step - matrix).detach()

    for _ in range(STEPS):
        x = inputs[torch.randint(len(inputs), (BATCH_TOKENS,), generator=generator)]
        activated = F.silu(F.linear(x, part.into[0])) * weight
        target = (activated * F.linear(x, part.into[1])).square()
        unit = target.mean()
        matrix = stored(params[0]) @ stored(params[1])
        bias = of.mean_y.float() - matrix @ of.mean_x.float()
        expected = F.linear(x, matrix, bias).square() + params[2].exp().square()
        score = (activated.square() * expected / unit + 1e-8).log()
        loss = (target / unit * F.softplus(-score) + F.softplus(score)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return (stored(params[0]) @ stored(params[1])).detach()


def fit(study: Study, variant: Variant, layer: int) -> tuple[Scorer, float]:
    """The scorer of a layer, and the bytes of its approximations but for a few numbers a unit."""
    part = mlps(study.model)[layer]
    gate, up = part.into
    units, width = up.shape
    weight = study.weights[variant.weight][layer]
    if variant.up == "nothing":
        return Scorer(None, weight, weight), 0.0
    source = study.source_of(layer, variant)
    of, bits = study.moments(layer, source), variant.bits
    scale = rms_of_gates(study, layer) * weight
    num_bytes = units * width * (bits or 0) / 8
    if variant.up == "exact":
        matrix, num_bytes = up.double(), 0.0
    elif variant.up == "few bits":
        whole = up.double() if source == layer else of.regression
        matrix = few_bits(of, whole, bits, variant.compensated)
    else:
        rank = rank_for_budget(units * width * 6, width, units, 4, variant.budget)
        num_bytes = rank * (units + width) / 2
        if variant.up == "descent":
            matrix = descended(study, layer, rank, bits, weight).double()
        else:
            factors = low_rank(of, rank, bits, scale, variant.rotated)
            matrix = factors[0] @ factors[1]
    approximate = Linear(matrix.float(), of.bias(matrix).float())
    rough = None
    if variant.gate_bits:
        own = study.moments(layer, layer)
        matrix = few_bits(own, gate.double(), variant.gate_bits)
        rough = Linear(matrix.float(), (gate.double() @ own.mean_x - matrix @ own.mean_x).float())
        num_bytes += units * width * variant.gate_bits / 8
    missed = rms_missed(study, layer, source, approximate, variant.missed)
    return Scorer(approximate, missed, weight, rough), num_bytes


def chunks(study: Study, *layers: int) -> Any:
    """Inputs of these layers, some tokens at a time."""
    return zip(*(study.inputs[layer].split(CHUNK) for layer in layers), strict=True)


def rms_of_gates(study: Study, layer: int) -> Tensor:
    """sqrt(E[a_u^2])."""
    gate = mlps(study.model)[layer].into[0]
    total = sum(F.silu(F.linear(x, gate)).square().sum(0) for (x,) in chunks(study, layer))
    return (total / len(study.inputs[layer])).sqrt()


def rms_missed(study: Study, layer: int, source: int, up: Linear, how: str) -> Tensor:
    """What the approximation misses of each unit: sqrt(E[a^2 (up - U)^2] / E[a^2]), or without a."""
    gate, exact = mlps(study.model)[layer].into
    lost, whole = torch.zeros(len(gate)), torch.zeros(len(gate))
    if how == "nothing":
        return lost
    for x, seen in chunks(study, layer, source):
        energy = F.silu(F.linear(x, gate)).square()
        if how == "plain":
            energy = torch.ones_like(energy)
        lost += (energy * (F.linear(x, exact) - up(seen)).square()).sum(0)
        whole += energy.sum(0)
    return (lost / whole.clamp(min=1e-20)).sqrt()


@dataclass(slots=True)
class Run:
    """What ran of a text, and what that lost; scores by layer, of every fourth token."""

    quality: Evaluation
    counts: Counter[str]
    scores: list[Tensor]

    @property
    def density(self) -> float:
        """Share of all units that ran."""
        return self.counts["ran"] / self.counts["units"]


@torch.no_grad()
def run(
    study: Study, text: Text, variant: Variant, scorers: list[Scorer], threshold: float
) -> Run:
    """The eager model with each token's selection applied, by hooks, against dense."""
    modules, counts, tally = linears(study.model), Counter(), Tally()
    inputs, gates = {}, {}
    scores: list[list[Tensor]] = [[] for _ in scorers]

    def remember(layer: int) -> Callable[..., None]:
        return lambda module, args: inputs.__setitem__(layer, args[0])

    def remember_gate(layer: int) -> Callable[..., None]:
        return lambda module, args, out: gates.__setitem__(layer, out)

    def keep_selected(layer: int) -> Callable[..., tuple]:
        def keep(module: nn.Module, args: tuple) -> tuple:
            source = inputs[study.source_of(layer, variant)]
            score = scorers[layer](inputs[layer], source, gates[layer])
            scores[layer].append(score.flatten(0, -2)[::4])
            runs = score > threshold
            counts.update(ran=runs.sum().item(), units=runs.numel())
            return (args[0] * runs,)

        return keep

    handles = []
    for layer, part in enumerate(mlps(study.model)):
        first, last = modules[id(part.into[0])], modules[id(part.out)]
        handles.append(first.register_forward_pre_hook(remember(layer)))
        handles.append(part.act.register_forward_hook(remember_gate(layer)))
        handles.append(last.register_forward_pre_hook(keep_selected(layer)))
    for batch, dense in text:
        keep, target = predicted(batch)
        tally.add(dense, log_probabilities(study.model(**batch, use_cache=False), keep), target)
    for handle in handles:
        handle.remove()
    return Run(tally.result(), counts, [torch.cat(s) for s in scores])


def measure(study: Study, variant: Variant) -> dict[str, Any]:
    """Fit one variant and run it at every density: thresholds from a dense, then a sparse model."""
    fitted = [fit(study, variant, layer) for layer in range(len(study.inputs))]
    scorers, num_bytes = [scorer for scorer, _ in fitted], sum(b for _, b in fitted)
    share = num_bytes / sum(part.into[0].numel() * 6 for part in mlps(study.model))
    whole = run(study, study.choice, variant, scorers, -1.0)
    rows = []
    for density in DENSITIES:
        threshold = threshold_for_density(torch.cat(whole.scores), density)
        choice = run(study, study.choice, variant, scorers, threshold)
        threshold = threshold_for_density(torch.cat(choice.scores), density)
        test = run(study, study.held_out, variant, scorers, threshold)
        rows.append(
            {
                "density": density, "measured_density": test.density,
                "choice_density": choice.density, "choice_kl": choice.quality.kl,
                **test.quality.to_dict(),
            }
        )  # fmt: skip
    return {**asdict(variant), "share_of_bytes": share, "rows": rows}


def at(result: dict[str, Any], density: float, key: str = "kl") -> float:
    """KL, or the increase of perplexity, at a density that was asked for, of those that ran: log-linear, linear."""
    points = [(row["measured_density"], row[key]) for row in result["rows"]]
    logarithmic = key == "kl"
    right = next((i for i in range(1, len(points)) if points[i][0] >= density), -1)
    (x0, y0), (x1, y1) = points[right - 1], points[right]
    if logarithmic:
        y0, y1 = math.log(y0), math.log(y1)
    value = y0 + (y1 - y0) * (density - x0) / (x1 - x0)
    return math.exp(value) if logarithmic else value


def reads(result: dict[str, Any], density: float) -> float:
    """Share of the MLP's bytes that a token takes at a density."""
    gate = 0.0 if result["gate_bits"] else 1 / 3
    return result["share_of_bytes"] + gate + (1 - gate) * density


def density_for(result: dict[str, Any], share: float) -> float:
    """The density at which so many of the MLP's bytes are read."""
    gate = 0.0 if result["gate_bits"] else 1 / 3
    return (share - gate - result["share_of_bytes"]) / (1 - gate)


def table(results: list[dict[str, Any]]) -> str:
    """One row a variant, least divergence at 45 % first; then at the bytes that `gate` reads at 45 %."""
    equal = 1 / 3 + 2 / 3 * 0.45
    head = ["variant", "bytes"]
    head += [c for d in SHOWN for c in (f"KL at {d:.0%}", "perplexity")]
    head += ["density at equal bytes", "KL", "perplexity"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for result in sorted(results, key=lambda r: at(r, 0.45)):
        cells = [result["name"], f"{result['share_of_bytes']:.1%}"]
        for density in SHOWN:
            cells += [
                f"{at(result, density):.4f}",
                f"{at(result, density, 'perplexity_increase'):+.2%}",
            ]
        density = density_for(result, equal)
        cells += [f"{density:.1%}", f"{at(result, density):.4f}"]
        cells += [f"{at(result, density, 'perplexity_increase'):+.2%}"]
        if result["up"] == "exact":  # it can't be had
            cells[-3:] = ["", "", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, run, write JSON after every variant."""
    args = arguments(__doc__.splitlines()[0], "llama-python-8m").parse_args()
    results = begin(args, "gate-scores", table)
    if results is None:
        return
    study = prepare(args.model, *args.windows)
    chosen = [v for v in VARIANTS if not args.only or v.name in args.only]
    for variant in (v for v in chosen if v.name not in {r["name"] for r in results}):
        results.append(measure(study, variant))
        write(args.out, {"model": args.model.name, "windows": args.windows, "variants": results})
        shown = ", ".join(
            f"{d:.0%}: {at(results[-1], d):.4f} {at(results[-1], d, 'perplexity_increase'):+.2%}"
            for d in (0.4, *SHOWN)
        )
        print(f"{variant.name:<28} {results[-1]['share_of_bytes']:.1%} bytes, {shown}", flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
