"""Record what each site does on real text, through the same graph that is rewritten later."""

import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from dejavu_compile.passes.find_sites import find_sites, resolve
from dejavu_compile.passes.glu import as_glu
from dejavu_compile.passes.normalize import normalize
from dejavu_compile.passes.site import Leaf, Site, SiteKind

from ._compat import guard_identity, names_in, recompile_limit, unset_fake_temporarily
from .batches import Batch, call_kwargs, counted
from .errors import CalibrationError
from .sketches import Projections
from .workdir import Memory, Rows, Store, Tensors

log = logging.getLogger(__name__)

# Bytes of recorded activations to hold in memory at most: tokens are cut to fit, evenly over all sites.
MEMORY_BUDGET = 4 << 30  # of a CPU's
GPU_SHARE = 3  # one part in so many of what a model leaves of its GPU
VALUES = ("source", "hidden", "carrier")
RECORDED_GRAPHS = 512  # of one function: more than any decoder has layers


def memory_budget(model: nn.Module) -> int:
    """Bytes for recorded activations. By what a GPU has, not by what is free on it: the same call uses the same text."""
    devices = {p.device for p in model.parameters()}
    if any(device.type != "cuda" for device in devices):
        return MEMORY_BUDGET
    total = sum(torch.cuda.get_device_properties(device).total_memory for device in devices)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return (total - weights) // GPU_SHARE


@dataclass(slots=True)
class Recording:
    """One site's tokens: `source` is the input of its projections, `hidden` that of its output projection.

    For attention `hidden` holds, per head, the norm of its contribution after the output projection.

    `pair`: its two projections, of a gated MLP of which a sketch can be made.

    `carrier` is what `gate` would threshold; empty where that is `hidden` itself. `hidden`, the widest, is
    at most 2 bytes a value: it weighs labels, and what is zero stays zero.
    """

    site: Site
    weight: torch.Tensor
    names: dict[str, str]  # from those in the graph to those in the model
    source: list[torch.Tensor] = field(default_factory=list)
    hidden: list[torch.Tensor] = field(default_factory=list)
    carrier: list[torch.Tensor] = field(default_factory=list)
    on_disk: bool = False
    pair: Projections | None = None

    @property
    def name(self) -> str:
        """Of the output projection's weight, in the model."""
        return self.names.get(self.site.name, self.site.name)

    @property
    def bytes_per_token(self) -> int:
        """Of the values that are recorded."""
        return sum(
            v[0].shape[1] * v[0].element_size()
            for v in (self.source, self.hidden, self.carrier)
            if v
        )

    def add(self, shard: Tensors) -> None:
        """Take this site's values of a batch."""
        for which in VALUES:
            if (value := shard.get(f"{self.name}.{which}")) is not None:
                getattr(self, which).append(value)

    def stacked(self, which: str) -> torch.Tensor | Rows:
        """All recorded tokens of one value, [tokens, width].

        In memory they are kept as one from then on, not beside their pieces; on disk they stay there.
        """
        values = getattr(self, which)
        if self.on_disk:
            return Rows(values, self.weight.device)
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
    """A `torch.compile` backend that records sites in graph order, keyed by their output weight.

    Values go to `device` as soon as they are there; by default they stay on the model's.
    """

    def __init__(
        self,
        model: nn.Module,
        kinds: Collection[SiteKind] = tuple(SiteKind),
        device: torch.device | None = None,
    ) -> None:
        self.model, self.kinds = model, kinds
        self.recordings: dict[int, Recording] = {}
        self._device = device
        self._forward = torch.compile(model.forward, backend=self)
        self._at_once: int | None = None  # sequences, once memory didn't suffice for a batch
        # Of the last call, by "<site>.<value>", and by site
        self._keep: torch.Tensor | None = None  # mask over its tokens
        self._values: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._finite: dict[str, list[torch.Tensor]] = defaultdict(list)

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
                pair = _pair(gm, site, inputs)
            new = Recording(site, weight, names, pair=pair)
            record = self.recordings.setdefault(id(weight), new)
            guard_identity(site.output.weight)  # layers that are alike may be one graph
            wanted.setdefault(site.input, []).append(partial(self._take, record, "source"))
            take = partial(self._take, record, "hidden", narrowed=torch.bfloat16)
            if site.kind is SiteKind.ATTENTION:
                with unset_fake_temporarily():
                    norms = Contributions(site, weight)
                take = _after(norms, take)
            wanted.setdefault(site.hidden, []).append(take)
            if site.gate is not None and site.gate.node is not site.hidden:
                wanted.setdefault(site.gate.node, []).append(
                    partial(self._take, record, "carrier")
                )

        def hand_over(takers: list) -> Callable[[torch.Tensor], None]:
            return lambda value: [take(value) for take in takers] and None

        recorder = _Recorder(gm, {node: hand_over(takers) for node, takers in wanted.items()})

        def run(*args: Any) -> Any:
            # Placeholders that are attributes of the module are looked up by the interpreter itself.
            return recorder.run(*args)

        return run

    def _take(
        self,
        record: Recording,
        which: str,
        value: torch.Tensor,
        narrowed: torch.dtype | None = None,
    ) -> None:
        """Keep the call's tokens; what is wider than `narrowed` is stored in it."""
        rows = value.detach().reshape(-1, value.shape[-1])[self._keep]  # a copy: indexed by a mask
        if narrowed is not None and rows.element_size() > narrowed.itemsize:
            rows = rows.to(narrowed)
        self._finite[record.name].append(rows.isfinite().all())
        self._values[f"{record.name}.{which}"].append(
            rows if self._device is None else rows.to(self._device)
        )

    def record(self, batch: Batch) -> Tensors:
        """What each site did on a batch, by "<site>.source", ".hidden", ".carrier", each [tokens, width].

        Where memory doesn't suffice for it, the batch runs in parts of half as many sequences, and so on; so do
        those after it. Raises CalibrationError where one sequence is too much, where there is no site, and for
        NaN or inf.
        """
        sequences = len(batch["input_ids"])
        at_once = min(self._at_once or sequences, sequences)
        while (values := self._tried(batch, at_once)) is None:
            torch.cuda.empty_cache()  # only now: until it was handled, the error held the tensors
            if at_once == 1:
                raise CalibrationError(
                    "out of memory while recording activations",
                    found=f"too little for one sequence of {batch['input_ids'].shape[1]} tokens",
                    expected="room for one sequence, and for what is recorded of it",
                    fix="shorter sequences; and dv.calibrate(..., workdir=PATH) records to disk",
                )
            at_once = self._at_once = at_once // 2
            log.warning("out of memory: recording %d sequences at once from here on", at_once)
        return values

    def _tried(self, batch: Batch, at_once: int) -> Tensors | None:
        """`record` in parts of so many sequences; None when out of memory."""
        try:
            parts = [self._run(part) for part in _parts(batch, at_once)]
            return {key: _joined([v for part in parts for v in part[key]]) for key in parts[0]}
        except torch.OutOfMemoryError:
            self._values.clear()
            return None

    def _run(self, batch: Batch) -> dict[str, list[torch.Tensor]]:
        """One forward pass: values in the order in which they came."""
        self._values, self._finite = defaultdict(list), defaultdict(list)
        self._keep = counted(batch).flatten()
        self._forward(**call_kwargs(self.model, batch))
        if not self.recordings:
            raise CalibrationError(
                f"no site was found in {type(self.model).__name__}",
                expected="an MLP whose hidden units a projection contracts",
                fix="dv.explain(model, input_ids) says why each projection stays dense",
            )
        for record in self.recordings.values():
            if not all(self._finite[record.name]):
                raise CalibrationError(
                    f"{record.name} sees NaN or inf on the calibration text",
                    fix="check that the dense model is sound on it, e.g. in a wider dtype",
                )
        return self._values


def _pair(gm: fx.GraphModule, site: Site, inputs: dict[fx.Node, Any]) -> Projections | None:
    """What a sketch of the site is of, as views; None where there can be none."""
    glu = as_glu(site)
    if glu is None:
        return None

    def rows(leaf: Leaf) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight = resolve(gm, leaf.projection.weight, inputs).detach()
        if leaf.projection.contracted == 0:
            weight = weight.t()
        some = slice(leaf.offset, leaf.offset + leaf.step * (site.units - 1) + 1, leaf.step)
        bias = leaf.projection.bias
        return weight[some], None if bias is None else resolve(gm, bias, inputs).detach()[some]

    gate, up = rows(glu.gate), rows(glu.up)
    return Projections(gate[0], up[0], gate[1], up[1], glu.activation)


def _joined(values: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(values) if len(values) > 1 else values[0]


def _parts(batch: Batch, sequences: int) -> Iterator[Batch]:
    """So many sequences of a batch at a time; what has no row for each goes with every part."""
    total = len(batch["input_ids"])
    if sequences >= total:
        yield batch
        return
    for start in range(0, total, sequences):
        rows = slice(start, start + sequences)
        yield {k: v[rows] if v.shape[:1] == (total,) else v for k, v in batch.items()}


def collect(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    max_tokens: int,
    progress: Callable[[str, int, int], None],
    kinds: Collection[SiteKind] = tuple(SiteKind),
    store: Store | None = None,
) -> list[Recording]:
    """Run `batches` and record every site of these kinds, in graph order, until `max_tokens` tokens a site.

    Each batch's values go to `store`, by default memory, which holds `memory_budget` bytes: fewer tokens, with a
    warning. Raises CalibrationError if the model has no site, or a site with NaN or inf (named), or for too
    little memory; DiskFullError.
    """
    store = store or Memory()
    collector = Collector(model, kinds, torch.device("cpu") if store.on_disk else None)
    recordings, tokens = collector.recordings, 0
    with torch.no_grad(), recompile_limit(RECORDED_GRAPHS):
        for number, batch in enumerate(batches):
            shard = store.once(f"collect-{number:05}", partial(collector.record, batch))
            if not recordings:
                collector.record(batch)  # the shard was there: the sites are in a graph only
            for record in recordings.values():
                record.on_disk = store.on_disk
                record.add(shard)
            tokens += int(counted(batch).sum())
            progress("collect", number + 1, len(batches))
            limit = max_tokens
            if not store.on_disk:
                limit = min(
                    limit,
                    memory_budget(model) // sum(r.bytes_per_token for r in recordings.values()),
                )
            if tokens >= limit:
                progress("collect", len(batches), len(batches))
                if tokens < max_tokens and number + 1 < len(batches):
                    log.warning(
                        "memory holds activations of %d tokens: %d of %d batches; workdir=PATH takes all",
                        tokens, number + 1, len(batches),
                    )  # fmt: skip
                break
    return list(recordings.values())
