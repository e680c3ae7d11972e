"""Record what each site does on real text, through the same graph that is rewritten later."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from dejavu_compile.passes.find_sites import find_sites, resolve
from dejavu_compile.passes.normalize import normalize
from dejavu_compile.passes.site import Site, SiteKind

from ._compat import guard_identity, names_in, recompile_limit, unset_fake_temporarily
from .batches import Batch, call_kwargs, counted
from .errors import CalibrationError

# Bytes of recorded activations to hold at most: tokens are cut to fit, evenly over all sites.
MEMORY_BUDGET = 4 << 30
RECORDED_GRAPHS = 512  # of one function: more than any decoder has layers


@dataclass(slots=True)
class Recording:
    """One site's tokens: `source` is the input of its projections, `hidden` that of its output projection.

    For attention `hidden` holds, per head, the norm of its contribution after the output projection.

    `carrier` is what `gate` would threshold; empty where that is `hidden` itself. `hidden`, the widest, is
    at most 2 bytes a value: it weighs labels, and what is zero stays zero.
    """

    site: Site
    weight: torch.Tensor
    names: dict[str, str]  # from those in the graph to those in the model
    source: list[torch.Tensor] = field(default_factory=list)
    hidden: list[torch.Tensor] = field(default_factory=list)
    carrier: list[torch.Tensor] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Of the output projection's weight, in the model."""
        return self.names.get(self.site.name, self.site.name)

    def stacked(self, which: str) -> torch.Tensor:
        """All recorded tokens of one value, [tokens, width]; kept as one, not beside its pieces."""
        values = getattr(self, which)
        if len(values) > 1:
            values[:] = [torch.cat(values)]
        return values[0]


def _after(
    first: Callable[[torch.Tensor], torch.Tensor], then: Callable[[torch.Tensor], None]
) -> Callable[[torch.Tensor], None]:
    return lambda value: then(first(value))


class _Recorder(fx.Interpreter):
    """Runs a normalised graph eagerly and hands over the values that were asked for."""

    def __init__(
        self, gm: fx.GraphModule, wanted: dict[fx.Node, Callable[[torch.Tensor], None]]
    ) -> None:
        super().__init__(gm)
        self._wanted = wanted

    def run_node(self, node: fx.Node) -> Any:
        """Run one node."""
        value = super().run_node(node)
        if node in self._wanted:
            self._wanted[node](value)
        return value


class Contributions:
    """Norm of what each unit adds to a site's output: hidden [..., in_features] -> [..., units] fp32.

    |h_u| ||W_u|| for a neuron, ||W_h y_h|| for a head. (Deja Vu, section 3)
    """

    def __init__(self, site: Site, weight: torch.Tensor) -> None:
        columns = weight.detach() if site.output.contracted == 1 else weight.detach().t()
        self._shape = (site.units, site.width)
        if site.width == 1:
            self._norm, self._gram = columns.float().norm(dim=0), None
        else:
            by_head = columns.float().unflatten(1, self._shape).movedim(1, 0)
            # ||W y||^2 = y^T (W^T W) y, which needs no output as wide as the model for each head
            self._norm, self._gram = None, by_head.mT @ by_head  # [heads, width, width]

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """The norms of some tokens."""
        hidden = hidden.detach().float()
        if self._gram is None:
            return hidden.abs() * self._norm
        y = hidden.unflatten(-1, self._shape)
        squared = (torch.einsum("...hw,hwv->...hv", y, self._gram) * y).sum(-1)
        return squared.clamp(min=0).sqrt()


class Collector:
    """A `torch.compile` backend that records sites in graph order, keyed by their output weight."""

    def __init__(self, model: nn.Module, kinds: Collection[SiteKind] = tuple(SiteKind)) -> None:
        self.model, self.kinds = model, kinds
        self.recordings: dict[int, Recording] = {}
        self.keep: torch.Tensor | None = None  # mask over this batch's tokens

    def __call__(
        self, gm: fx.GraphModule, example_inputs: Sequence[Any], **_: Any
    ) -> Callable[..., Any]:
        """Find the sites of a captured graph; the result records them at each call."""
        normalize(gm, example_inputs)
        inputs = dict(
            zip((n for n in gm.graph.nodes if n.op == "placeholder"), example_inputs, strict=True)
        )
        names = names_in(self.model, gm, example_inputs)
        wanted: dict[fx.Node, list[Callable[[torch.Tensor], None]]] = {}
        for site in (s for s in find_sites(gm).sites if s.kind in self.kinds):
            with unset_fake_temporarily():
                weight = resolve(gm, site.output.weight, inputs)
            record = self.recordings.setdefault(id(weight), Recording(site, weight, names))
            guard_identity(site.output.weight)  # layers that are alike may be one graph
            wanted.setdefault(site.input, []).append(self._into(record.source))
            take = self._into(record.hidden, torch.bfloat16)
            if site.kind is SiteKind.ATTENTION:
                with unset_fake_temporarily():
                    norms = Contributions(site, weight)
                take = _after(norms, take)
            wanted.setdefault(site.hidden, []).append(take)
            if site.gate is not None and site.gate.node is not site.hidden:
                wanted.setdefault(site.gate.node, []).append(self._into(record.carrier))

        def hand_over(takers: list) -> Callable[[torch.Tensor], None]:
            return lambda value: [take(value) for take in takers] and None

        recorder = _Recorder(gm, {node: hand_over(takers) for node, takers in wanted.items()})

        def run(*args: Any) -> Any:
            # Placeholders that are attributes of the module are looked up by the interpreter itself.
            return recorder.run(*args)

        return run

    def _into(
        self, values: list[torch.Tensor], narrowed: torch.dtype | None = None
    ) -> Callable[[torch.Tensor], None]:
        """Append the batch's tokens to `values`; what is wider than `narrowed` is stored in it."""

        def take(value: torch.Tensor) -> None:
            rows = value.detach().reshape(-1, value.shape[-1])[
                self.keep
            ]  # a copy: indexed by a mask
            if narrowed is not None and rows.element_size() > narrowed.itemsize:
                rows = rows.to(narrowed)
            values.append(rows)

        return take


def collect(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    max_tokens: int,
    progress: Callable[[str, int, int], None],
    kinds: Collection[SiteKind] = tuple(SiteKind),
) -> list[Recording]:
    """Run `batches` and record every site of these kinds, in graph order, until `max_tokens` tokens a site.

    Raises CalibrationError if the model has no site, or a site with NaN or inf (named).
    """
    collector = Collector(model, kinds)
    run = torch.compile(model.forward, backend=collector)
    tokens = 0
    with torch.no_grad(), recompile_limit(RECORDED_GRAPHS):
        for number, batch in enumerate(batches):
            collector.keep = counted(batch).flatten()
            run(**call_kwargs(model, batch))
            tokens += int(collector.keep.sum())
            progress("collect", number + 1, len(batches))
            if not collector.recordings:
                raise CalibrationError(
                    f"no site was found in {type(model).__name__}",
                    expected="an MLP whose hidden units a projection contracts",
                    fix="dv.explain(model, input_ids) says why each projection stays dense",
                )
            per_token = sum(
                sum(
                    v[0].shape[1] * v[0].element_size()
                    for v in (r.source, r.hidden, r.carrier)
                    if v
                )
                for r in collector.recordings.values()
            )
            if tokens >= min(max_tokens, MEMORY_BUDGET // per_token):
                progress("collect", len(batches), len(batches))
                break
    for record in collector.recordings.values():
        values = (*record.source, *record.hidden, *record.carrier)
        if not all(value.isfinite().all() for value in values):
            raise CalibrationError(
                f"{record.name} sees NaN or inf on the calibration text",
                fix="check that the dense model is sound on it, e.g. in a wider dtype",
            )
    return list(collector.recordings.values())
