"""How much a model's prediction depends on what each head adds, so that heads of different layers compare.

    s_h = sqrt(E[(d log p / d g_h)^2] / E[c_h^2])

g_h is a gate, one for each token, that multiplies what the head adds, c_h the norm of that (its contribution). The
mean square of the gradient is Fisher information: to second order, half of it is the divergence of the model's
prediction when the head is left out; s_h^2 c_h^2 is an estimate of it for each token that needs no gradient. Next
tokens are drawn from the model's own prediction, as the Fisher information is defined. (Fisher pruning: Theis et
al. 2018, section 3)
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from dejavu_compile.passes.find_sites import find_sites
from dejavu_compile.passes.normalize import normalize
from dejavu_compile.passes.site import Site, SiteKind

from ._compat import guard_identity, names_in, recompile_limit
from .batches import Batch, call_kwargs, logits_of
from .collect import RECORDED_GRAPHS, Recording
from .evaluate import predicted
from .progress import Progress

log = logging.getLogger(__name__)

MAX_TOKENS = 16_384


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


def head_sensitivities(
    model: nn.Module,
    batches: Sequence[Batch],
    recordings: Sequence[Recording],
    *,
    seed: int,
    progress: Progress,
) -> list[torch.Tensor]:
    """s_h of each recording's heads, [units] fp32; of 16,384 tokens, a forward and a backward pass.

    All ones, with a warning, where the model can't be differentiated or memory doesn't suffice.
    """
    gates = _Gates(model)
    run = torch.compile(model.forward, backend=gates)
    squares: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros(()))
    needed = max(1, -(-MAX_TOKENS // batches[0]["input_ids"].numel()))
    chosen = batches[: min(needed, len(batches))]
    generator = torch.Generator().manual_seed(seed)
    try:
        with torch.enable_grad(), recompile_limit(RECORDED_GRAPHS):
            tokens = 0
            for number, batch in enumerate(chosen):
                gates.opened.clear()
                keep, _ = predicted(batch)
                logits = logits_of(run(**call_kwargs(model, batch)))[:, :-1].flatten(0, 1)[keep]
                loss = _log_probability(logits.float(), generator)
                gradients = torch.autograd.grad(loss, list(gates.opened.values()))
                for name, gradient in zip(gates.opened, gradients, strict=True):
                    squares[name] = squares[name].to(gradient.device) + _per_head(gradient)
                tokens += int(keep.sum())
                progress("sensitivity", number + 1, len(chosen))
    except (RuntimeError, NotImplementedError) as error:
        log.warning(
            "heads of different layers are compared by their contribution alone: no gradients (%s)",
            str(error).splitlines()[0] if str(error) else type(error).__name__,
        )
        return [torch.ones(r.site.units, device=r.weight.device) for r in recordings]
    return [
        (squares[r.name] / tokens / r.stacked("hidden").float().square().mean(0).clamp(min=1e-20))
        .sqrt()
        .to(r.weight.device)
        for r in recordings
    ]  # fmt: skip


def _log_probability(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Of tokens drawn from the prediction itself, summed."""
    log_probabilities = logits.log_softmax(-1)
    # Drawn on the CPU, so that a seed means the same on every device
    uniform = torch.rand(len(logits), 1, generator=generator).to(logits.device)
    with torch.no_grad():
        cumulative = log_probabilities.exp().cumsum(-1)
        drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:])
    return log_probabilities.gather(1, drawn.clamp(max=logits.shape[1] - 1)).sum()


def _per_head(gradient: torch.Tensor) -> torch.Tensor:
    """[..., units, 1] -> [units], the sum of squares."""
    return gradient.detach().float().square().flatten(0, -3).sum(0).squeeze(-1)
