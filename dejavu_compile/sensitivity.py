"""How much a model's prediction depends on what each unit adds to a token: units of all layers compare.

    F_h = (d log p / d g_h)^2                    g_h = 1 multiplies what unit h adds to one token
    s_u = sqrt(E[(d log p / d a_u)^2])           a_u is the activated gate of neuron u

Its mean is Fisher information: to second order, half of it is the divergence of the model's prediction when the unit
is left out there; for a set of units, half of (the sum of their d log p / d g_h)^2. Next tokens are drawn from the
model's own prediction, as the Fisher information is defined. (Fisher pruning: Theis et al. 2018, section 3)

One draw is a noisy estimate. c_h^2 E[F_h] / E[c_h^2], with c_h the norm of what the head adds (its contribution), has
less noise, and doesn't know that some tokens depend on a head more than others. The mean of the two is what a
predictor is best fitted to: perplexity of a small Llama with 67 % of its heads +15 %, with the second alone +20 %.

Of a gate nothing is predicted: its value is there. To leave neuron u out takes a_u to zero, and costs about (a_u s_u)^2, so
|a_u| s_u is what a threshold should ask about, and one threshold does for all layers. By |a_u| alone (CATS) a small Llama
with half of its neurons loses 11.9 % of perplexity, by |a_u| s_u 5.4 %.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import fx, nn

from dejavu_compile.passes.find_sites import find_sites
from dejavu_compile.passes.normalize import normalize
from dejavu_compile.passes.site import Policy, Site, SiteKind

from ._compat import guard_identity, names_in, recompile_limit
from .artifact import SiteRecord
from .batches import Batch, call_kwargs, counted, logits_of
from .collect import RECORDED_GRAPHS, Recording
from .evaluate import predicted
from .predictors import DENSITY_GRID
from .progress import Progress
from .workdir import Memory, Store, Tensors

log = logging.getLogger(__name__)

MAX_TOKENS = 98_304  # fewer overfit: a third of them cost a small Llama as much as no gradients
GATE_TOKENS = 32_768  # for a mean over tokens
TINY = 1e-20
# To choose from: those of a curve, and between any two one more
DENSITIES = tuple(sorted((*DENSITY_GRID, *(sum(pair) / 2 for pair in pairwise(DENSITY_GRID)))))


@dataclass(slots=True)
class _Pass:
    """One forward pass, by site: what is differentiated by, what its projections read, and what `gate` would threshold."""

    opened: dict[str, torch.Tensor] = field(default_factory=dict)
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    carriers: dict[str, torch.Tensor] = field(default_factory=dict)


class _Gated(fx.Interpreter):
    """Runs a normalised graph, with gates of one on the units of some sites, or zeros added to their carriers."""

    def __init__(self, gm: fx.GraphModule, sites: dict[str, Site], gates: "_Gates") -> None:
        super().__init__(gm)
        self._gates = gates
        self._hidden = {site.hidden: (name, site) for name, site in sites.items()}
        self._inputs = _by_node((site.input, name) for name, site in sites.items())
        self._carriers = _by_node(
            (site.gate.node, name) for name, site in sites.items() if site.gate is not None
        )

    def run_node(self, node: fx.Node) -> Any:
        """Run one node."""
        value, seen = super().run_node(node), self._gates.seen
        for name in self._inputs.get(node, ()):
            seen.inputs[name] = value.detach()
        for name in self._carriers.get(node, ()):
            seen.carriers[name] = value.detach()
            if self._gates.at_carriers:
                seen.opened[name] = torch.zeros_like(value).requires_grad_()
                value = value + seen.opened[name]
        if node not in self._hidden or self._gates.at_carriers:
            return value
        name, site = self._hidden[node]
        units = value.unflatten(-1, (site.units, site.width))
        gate = torch.ones_like(units[..., :1]).requires_grad_()
        seen.opened[name] = gate
        return (units * gate).flatten(-2)


def _by_node(pairs: Iterable[tuple[fx.Node, str]]) -> dict[fx.Node, list[str]]:
    names = defaultdict(list)
    for node, name in pairs:
        names[node].append(name)
    return dict(names)


class _Gates:
    """A `torch.compile` backend that gates every site of some kinds; `seen` is the last call.

    `at_carriers`: zeros are added to what `gate` would threshold, instead.
    """

    def __init__(
        self, model: nn.Module, kinds: Collection[SiteKind], *, at_carriers: bool = False
    ) -> None:
        self.model, self.kinds, self.seen = model, kinds, _Pass()
        self.at_carriers = at_carriers
        self._run = torch.compile(model.forward, backend=self)

    def __call__(
        self, gm: fx.GraphModule, example_inputs: Sequence[Any], **_: Any
    ) -> Callable[..., Any]:
        """Find the sites of a captured graph; the result opens gates for them at each call."""
        normalize(gm, example_inputs)
        names, sites = names_in(self.model, gm, example_inputs), {}
        for site in find_sites(gm).sites:
            if site.kind in self.kinds:
                sites[names.get(site.name, site.name)] = site
                guard_identity(site.output.weight)  # layers that are alike may be one graph
        return _Gated(gm, sites, self).run

    def gradients(self, batch: Batch, uniform: torch.Tensor) -> dict[str, torch.Tensor]:
        """d log p / d g (or d a, at carriers) of the tokens that count, by site, [tokens, units] fp32.

        `uniform` [predicted tokens, 1] in [0, 1) draws the next tokens.
        """
        self.seen = _Pass()
        keep, _ = predicted(batch)
        logits = logits_of(self._run(**call_kwargs(self.model, batch)))[:, :-1]
        loss = _log_probability(logits.flatten(0, 1)[keep].float(), uniform.to(logits.device))
        gradients = torch.autograd.grad(loss, list(self.seen.opened.values()))
        if not self.at_carriers:
            gradients = [gradient.squeeze(-1) for gradient in gradients]
        return {
            name: _rows(gradient.float(), batch)
            for name, gradient in zip(self.seen.opened, gradients, strict=True)
        }


def _rows(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Those of the tokens that count, [tokens, width]."""
    return values.detach().flatten(0, -2)[counted(batch).flatten()]


def _draws(batches: Sequence[Batch], seed: int) -> Iterator[torch.Tensor]:
    """What draws each batch's next tokens.

    On the CPU, so that a seed means the same on every device; and for every batch, also for one that a run before
    has done, so that it means the same for those after it.
    """
    generator = torch.Generator().manual_seed(seed)
    for batch in batches:
        yield torch.rand(int(predicted(batch)[0].sum()), 1, generator=generator)


def _measured(
    stage: str, batches: Sequence[Batch], measure: Callable[[Batch, torch.Tensor], Tensors], *, seed: int,
    progress: Progress, store: Store | None,
) -> list[Tensors]:  # fmt: skip
    """What `measure` gives for each batch and its draws, once for a calibration."""
    store, shards = store or Memory(), []
    with torch.enable_grad(), recompile_limit(RECORDED_GRAPHS):
        for number, (batch, uniform) in enumerate(
            zip(batches, _draws(batches, seed), strict=True)
        ):
            shards.append(store.once(f"{stage}-{number:05}", partial(measure, batch, uniform)))
            progress(stage, number + 1, len(batches))
    return shards


def _first(batches: Sequence[Batch], tokens: int) -> Sequence[Batch]:
    """As many batches as hold so many tokens."""
    return batches[: -(-tokens // batches[0]["input_ids"].numel())]


def head_costs(
    model: nn.Module,
    batches: Sequence[Batch],
    recordings: Sequence[Recording],
    *,
    seed: int,
    progress: Progress,
    store: Store | None = None,
) -> list[torch.Tensor]:
    """What leaving each head out costs at the first tokens that were recorded, [tokens, units] fp32, mean 1.

    Of 98,304 tokens, a forward and a backward pass. Where the model can't be differentiated, or memory doesn't
    suffice, squared contributions in proportion to their mean in each layer, with a warning.
    """
    contributions = [r.stacked("hidden")[:].float().square() for r in recordings]
    try:
        gradients = _squared_gradients(model, batches, seed, progress, store)
    except RuntimeError as error:  # out of memory too
        log.warning(
            "heads of different layers are compared by their contribution alone: no gradients (%s)",
            str(error).split("\n", 1)[0] or type(error).__name__,
        )
        return [c / c.mean().clamp(min=TINY) for c in contributions]
    costs = []
    for record, contribution in zip(recordings, contributions, strict=True):
        fisher = gradients[record.name][: len(contribution)].to(contribution.device)
        estimate = contribution[: len(fisher)]
        estimate = estimate * (fisher.mean(0) / estimate.mean(0).clamp(min=TINY))
        costs.append((fisher + estimate) / 2)
    mean = sum(c.mean() for c in costs).item() / len(costs)
    return [c / max(mean, TINY) for c in costs]


def _squared_gradients(
    model: nn.Module, batches: Sequence[Batch], seed: int, progress: Progress, store: Store | None
) -> dict[str, torch.Tensor]:
    """F_h of heads, of the tokens that count, by site, [tokens, units] fp32."""
    gates = _Gates(model, (SiteKind.ATTENTION,))

    def squares(batch: Batch, uniform: torch.Tensor) -> Tensors:
        return {name: g.square() for name, g in gates.gradients(batch, uniform).items()}

    chosen = _first(batches, MAX_TOKENS)
    shards = _measured("sensitivity", chosen, squares, seed=seed, progress=progress, store=store)
    return {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}


def gate_sensitivities(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    seed: int,
    progress: Progress,
    store: Store | None = None,
) -> dict[str, torch.Tensor]:
    """s_u of every gate, by site, [units] fp32 with mean 1 over all of them; of the first 32,768 tokens.

    Empty, with a warning, where the model can't be differentiated or memory doesn't suffice.
    """
    gates = _Gates(model, (SiteKind.MLP,), at_carriers=True)

    def squares(batch: Batch, uniform: torch.Tensor) -> Tensors:
        return {name: g.square().sum(0) for name, g in gates.gradients(batch, uniform).items()}

    chosen = _first(batches, GATE_TOKENS)
    try:
        shards = _measured("gates", chosen, squares, seed=seed, progress=progress, store=store)
    except RuntimeError as error:  # out of memory too
        log.warning(
            "gates are compared by their magnitude alone: no gradients (%s)",
            str(error).split("\n", 1)[0] or type(error).__name__,
        )
        return {}
    roots = {name: sum(shard[name] for shard in shards).sqrt() for name in shards[0]}
    mean = torch.cat([root.cpu() for root in roots.values()]).mean().item()
    return {name: root / max(mean, TINY) for name, root in roots.items()}


@dataclass(frozen=True, slots=True)
class Skipping:
    """What a site does when asked for a density: the share of units that run, and nats a token that skipping costs."""

    asked: float
    density: float
    loss: float


def skipping_costs(
    model: nn.Module,
    batches: Sequence[Batch],
    records: Sequence[SiteRecord],
    *,
    seed: int,
    progress: Progress,
    store: Store,
) -> list[list[Skipping]]:
    """For each record, with a predictor or a gate, what each of DENSITIES would do if only it skipped any units.

    The loss is a second order estimate of the divergence of the model's prediction, a forward and a backward pass
    for all records and densities. What is skipped at different tokens is taken not to add up: true of neurons (gates of
    a random decoder: 3 % off), while heads of that decoder cost up to 1.8 times as much. Raises RuntimeError where the
    model can't be differentiated.
    """
    gates = _Gates(model, {record.kind for record in records})

    def skipped(batch: Batch, uniform: torch.Tensor) -> Tensors:
        gradients = gates.gradients(batch, uniform)
        return {
            str(i): _skipped(record, gradients[record.name], _scores(record, gates.seen, batch))
            for i, record in enumerate(records)
        }

    shards = _measured("skipping", batches, skipped, seed=seed, progress=progress, store=store)
    tokens = sum(int(counted(batch).sum()) for batch in batches)
    totals = [sum(shard[str(i)] for shard in shards) / tokens for i in range(len(records))]
    return [
        [Skipping(asked, *row) for asked, row in zip(DENSITIES, total.tolist(), strict=True)]
        for total in totals
    ]


def _scores(record: SiteRecord, seen: _Pass, batch: Batch) -> torch.Tensor:
    """What the record's threshold is compared with, [tokens, units]."""
    if record.policy is Policy.GATE:
        magnitude = _rows(seen.carriers[record.name], batch).float().abs()
        return magnitude if record.sensitivity is None else magnitude * record.sensitivity
    if record.policy is Policy.SKETCH:
        return record.sketch.score(_rows(seen.inputs[record.name], batch))
    return record.predictor.score(_rows(seen.inputs[record.source], batch))


def _skipped(record: SiteRecord, gradient: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
    """For each of DENSITIES, share of units that run and nats, summed over the tokens, [densities, 2]."""
    rows = []
    for density in DENSITIES:
        skipped = score <= record.curve.at(density)
        nats = (gradient * skipped).sum(1).double().square().sum() / 2
        runs = len(score) - skipped.count_nonzero().double() / score.shape[1]
        rows.append(torch.stack((runs, nats)))
    return torch.stack(rows)


def _log_probability(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Of tokens drawn from the prediction itself, summed."""
    log_probabilities = logits.log_softmax(-1)
    with torch.no_grad():
        cumulative = log_probabilities.exp().cumsum(-1)
        drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:])
    return log_probabilities.gather(1, drawn.clamp(max=logits.shape[1] - 1)).sum()
