"""How much a model's prediction depends on what each head adds to a token: heads of all layers compare.

    F_h = (d log p / d g_h)^2          g_h = 1 multiplies what head h adds to one token

Its mean is Fisher information: to second order, half of it is the divergence of the model's prediction when the head
is left out there. Next tokens are drawn from the model's own prediction, as the Fisher information is defined.
(Fisher pruning: Theis et al. 2018, section 3)

One draw is a noisy estimate. c_h^2 E[F_h] / E[c_h^2], with c_h the norm of what the head adds (its contribution), has
less noise, and doesn't know that some tokens depend on a head more than others. The mean of the two is what a
predictor is best fitted to: perplexity of a small Llama with 67 % of its heads +15 %, with the second alone +20 %.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from dejavu_compile.passes.find_sites import find_sites
from dejavu_compile.passes.normalize import normalize
from dejavu_compile.passes.site import Site, SiteKind

from ._compat import guard_identity, names_in, recompile_limit
from .batches import Batch, call_kwargs, counted, logits_of
from .collect import RECORDED_GRAPHS, Recording
from .evaluate import predicted
from .progress import Progress
from .workdir import Memory, Store, Tensors

log = logging.getLogger(__name__)

MAX_TOKENS = 98_304  # fewer overfit: a third of them cost a small Llama as much as no gradients
TINY = 1e-20


class _Gated(fx.Interpreter):
    """Runs a normalised graph, with gates of one on the heads of some sites."""

    def __init__(
        self, gm: fx.GraphModule, sites: dict[fx.Node, tuple[str, Site]], opened: dict
    ) -> None:
        super().__init__(gm)
        self._sites, self._opened = sites, opened

    def run_node(self, node: fx.Node) -> Any:
        """Run one node."""
        value = super().run_node(node)
        if node not in self._sites:
            return value
        name, site = self._sites[node]
        heads = value.unflatten(-1, (site.units, site.width))
        gate = torch.ones_like(heads[..., :1]).requires_grad_()
        self._opened[name] = gate
        return (heads * gate).flatten(-2)


class _Gates:
    """A `torch.compile` backend that gates every attention site; `opened` holds the last call's gates by site."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.opened = model, {}

    def __call__(
        self, gm: fx.GraphModule, example_inputs: Sequence[Any], **_: Any
    ) -> Callable[..., Any]:
        """Find the sites of a captured graph; the result opens gates for them at each call."""
        normalize(gm, example_inputs)
        names, sites = names_in(self.model, gm, example_inputs), {}
        for site in find_sites(gm).sites:
            if site.kind is SiteKind.ATTENTION:
                sites[site.hidden] = names.get(site.name, site.name), site
                guard_identity(site.output.weight)  # layers that are alike may be one graph
        return _Gated(gm, sites, self.opened).run


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
        gradients = _squared_gradients(model, batches, seed, progress, store or Memory())
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
    model: nn.Module, batches: Sequence[Batch], seed: int, progress: Progress, store: Store
) -> dict[str, torch.Tensor]:
    """F_h of the tokens that count, by site, [tokens, units] fp32."""
    gates = _Gates(model)
    run = torch.compile(model.forward, backend=gates)
    squares: dict[str, list[torch.Tensor]] = defaultdict(list)
    chosen = batches[: -(-MAX_TOKENS // batches[0]["input_ids"].numel())]
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad(), recompile_limit(RECORDED_GRAPHS):
        for number, batch in enumerate(chosen):
            # On the CPU, so that a seed means the same on every device; and for every batch, also for one that a
            # run before has done, so that it means the same for those after it
            uniform = torch.rand(int(predicted(batch)[0].sum()), 1, generator=generator)
            shard = store.once(
                f"sensitivity-{number:05}", partial(_batch_squares, gates, run, batch, uniform)
            )
            for name, rows in shard.items():
                squares[name].append(rows)
            progress("sensitivity", number + 1, len(chosen))
    return {name: torch.cat(rows) for name, rows in squares.items()}


def _batch_squares(
    gates: _Gates, run: Callable[..., Any], batch: Batch, uniform: torch.Tensor
) -> Tensors:
    """F_h of one batch; `uniform` [predicted tokens, 1] in [0, 1) draws the next tokens."""
    gates.opened.clear()
    keep, _ = predicted(batch)
    logits = logits_of(run(**call_kwargs(gates.model, batch)))[:, :-1].flatten(0, 1)[keep]
    loss = _log_probability(logits.float(), uniform.to(logits.device))
    gradients = torch.autograd.grad(loss, list(gates.opened.values()))
    tokens = counted(batch).flatten()
    squares = {}
    for name, gradient in zip(gates.opened, gradients, strict=True):
        rows = gradient.detach().float().squeeze(-1).flatten(0, -2)
        squares[name] = rows[tokens].square()
    return squares


def _log_probability(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Of tokens drawn from the prediction itself, summed."""
    log_probabilities = logits.log_softmax(-1)
    with torch.no_grad():
        cumulative = log_probabilities.exp().cumsum(-1)
        drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:])
    return log_probabilities.gather(1, drawn.clamp(max=logits.shape[1] - 1)).sum()
