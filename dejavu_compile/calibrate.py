"""Fit predictors and thresholds for a model on text, and attach them to its weights.

collect -> costs of leaving heads out -> fit (all layers together) -> thresholds on held-out tokens
        -> a policy and a density for each site, to a quality budget

What each stage makes stays in memory, or goes to a folder, from which an interrupted run goes on.
"""

import dataclasses
import hashlib
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from numbers import Integral
from pathlib import Path

import torch
from torch import nn

from dejavu_compile.passes.find_sites import layer_of
from dejavu_compile.passes.site import Policy, SiteKind

from ._compat import qualified_name
from .allocate import allocations, quality, search
from .artifact import (
    THRESHOLDED,
    Calibration,
    SiteRecord,
    WeightLayout,
    WeightRecord,
    attach_calibration,
    check_densities,
    is_number,
    named_weights,
)
from .attachments import fingerprint, model_fingerprint
from .batches import Batch, check_batches, check_model
from .collect import Recording, collect
from .errors import OptionError
from .evaluate import compare, masked
from .plan import gathered_layouts, input_weights
from .predictors import (
    HELD_OUT,
    Predictor,
    SiteExamples,
    ThresholdCurve,
    chunks,
    fit_predictors,
    measure,
    rank_and_bits,
    shared_threshold_curve,
    thinned_for,
    threshold_curve,
)
from .progress import Bars, Progress
from .sensitivity import gate_sensitivities, head_costs
from .sketches import PARTS, Sketch, fit_sketch
from .workdir import Memory, Rows, Store, Tensors, Workdir

log = logging.getLogger(__name__)

PREDICTOR_BUDGET = 0.05
LEAST_BITS = 4  # of a predictor's weight; 8 keeps those of MLPs in int8
MAX_TOKENS = 200_000
# What a head that matters as much as the mean weighs in the loss, where leaving any out weighs 1
HEAD_WEIGHT = 4.0
FIT_STEPS = 500
NO_CURVE = ThresholdCurve((1.0,), (-math.inf,))


def _output_norms(record: Recording) -> torch.Tensor:
    """Norm of each unit's column of the output projection, [units] fp32; recorded with a head's norm."""
    if record.site.kind is SiteKind.ATTENTION:
        return torch.ones(record.site.units, device=record.weight.device)
    weight = record.weight.detach()
    return weight.float().norm(dim=1 - record.site.output.contracted)


def _out_columns(record: Recording) -> torch.Tensor:
    """The output weight as [output width, units]; heads are taken to add up at right angles."""
    if record.site.kind is SiteKind.ATTENTION:
        return torch.eye(record.site.units, device=record.weight.device)
    weight = record.weight.detach()
    return weight if record.site.output.contracted == 1 else weight.t()


def _choose(policy: str, record: Recording, source: Recording | None, rank: int) -> Policy:
    """The policy of one site: `auto` prefers what skips most of the site's bytes."""
    site = record.site
    can_predict = source is not None and rank > 0
    fallback = Policy.EXACT if site.exact is not None else Policy.DENSE
    if policy == "dense":
        return Policy.DENSE
    if policy == "exact":
        return fallback
    if site.kind is SiteKind.ATTENTION:
        return Policy.PREDICT if can_predict else Policy.DENSE
    if policy == "sketch":
        return Policy.SKETCH if record.pair is not None else fallback
    if policy == "gate":
        return Policy.GATE if site.gate is not None else Policy.DENSE
    if policy == "predict":
        return Policy.PREDICT if can_predict else fallback
    # Without exact zeros a low-rank guess of |activation| was worse than the gate itself, and a sketch of both projections
    # reads less than the gate and loses a fifth of what that does (SwiGLU decoders; docs/evidence.md).
    if site.exact is None and record.pair is not None:
        return Policy.SKETCH
    if site.exact is None and site.gate is not None and len(site.row_leaves) > 1:
        return Policy.GATE
    return Policy.PREDICT if can_predict else fallback


def _examples(record: Recording, source: Recording) -> SiteExamples:
    return SiteExamples(source.stacked("source"), record.stacked("hidden"), _output_norms(record))


def _to_fit(
    record: Recording, source: Recording, costs: Mapping[str, torch.Tensor]
) -> SiteExamples:
    """What the site's predictor learns: contributions of neurons, costs of heads, in one unit for all layers."""
    if record.site.kind is SiteKind.MLP:
        return _examples(record, source)
    cost = costs[record.name]
    ones = torch.ones(record.site.units, device=cost.device)
    seen = source.stacked("source").narrow(0, 0, len(cost))
    return SiteExamples(seen, cost, ones, 1 / HEAD_WEIGHT)


def _carrier(record: Recording) -> torch.Tensor | Rows:
    """What `gate` would threshold, with its sign."""
    return record.stacked("carrier" if record.carrier else "hidden")


def _rank_and_bits(record: Recording, source: Recording) -> tuple[int, int]:
    width = source.source[0].shape[1]
    # Counted at 2 bytes a weight at most, so that what is fitted in fp32 keeps its promise in bf16.
    itemsize = record.weight.element_size()
    dense_bytes = record.site.bytes_dense * min(itemsize, 2) // itemsize
    if record.site.kind is SiteKind.ATTENTION:
        # Heads are so few that a full rank fits, in the model's dtype.
        units = record.site.units
        fits = units <= width and PREDICTOR_BUDGET * dense_bytes >= 2 * units * width
        return units if fits else 0, 16
    return rank_and_bits(
        dense_bytes, width, record.site.units, PREDICTOR_BUDGET, least_bits=LEAST_BITS
    )


def _held_out(values: torch.Tensor | Rows, share: float = HELD_OUT) -> torch.Tensor | Rows:
    last = max(1, round(len(values) * share))
    return values.narrow(0, len(values) - last, last)


def _record(recording: Recording, policy: Policy, curve: ThresholdCurve) -> SiteRecord:
    site = recording.site
    layouts = () if policy is Policy.DENSE else tuple(
        WeightLayout(recording.names.get(layout.name, layout.name), layout.contracted, layout.produces_units)
        for layout in gathered_layouts(site, policy)
    )  # fmt: skip
    return SiteRecord(
        kind=site.kind, name=recording.name, layer=layer_of(recording.name, site.layer), units=site.units, policy=policy,
        num_weights=site.bytes_dense // recording.weight.element_size(),
        fingerprint=fingerprint(recording.weight), curve=curve, layouts=layouts,
    )  # fmt: skip


def _with_inputs(
    record: SiteRecord, recording: Recording, weights: Mapping[str, torch.Tensor]
) -> SiteRecord:
    """The record with the model's other weights of the site; without any where one isn't the model's own."""
    found = [qualified_name(node) for node in input_weights(recording.site)]
    names = dict.fromkeys(recording.names.get(name, name) for name in found)
    if not all(name in weights for name in names):
        return record
    inputs = tuple(WeightRecord(name, fingerprint(weights[name])) for name in names)
    return dataclasses.replace(record, inputs=inputs)


def _fit(
    jobs: Sequence[tuple[Recording, Recording, int, int]],
    costs: Mapping[str, torch.Tensor],
    lookahead: int,
    seed: int,
    progress: Progress,
    store: Store,
) -> list[SiteRecord]:
    """Predictors for (site, source site, rank, bits), all trained together. `costs` of heads, by site."""
    if not jobs:
        return []
    parts = [field.name for field in dataclasses.fields(Predictor)]

    def fit() -> Tensors:
        fitted = fit_predictors(
            [_to_fit(record, source, costs).split(HELD_OUT)[0] for record, source, *_ in jobs],
            [rank for *_, rank, _ in jobs],
            seed=seed,
            steps=FIT_STEPS,
            progress=progress,
        )
        return {f"{i}.{part}": getattr(p, part) for i, p in enumerate(fitted) for part in parts}

    stored = store.once("predictors", fit)
    fitted = [
        Predictor(*(stored[f"{i}.{part}"].to(record.weight.device) for part in parts))
        for i, (record, *_) in enumerate(jobs)
    ]
    kinds = [record.site.kind for record, *_ in jobs]
    fitted = [
        predictor.quantized(bits) if kind is SiteKind.MLP else predictor.full_rank()
        for predictor, kind, (*_, bits) in zip(fitted, kinds, jobs, strict=True)
    ]
    # One threshold for all sites of a kind: scores are in one unit, so each gets the density that it needs.
    curves = {
        kind: shared_threshold_curve(
            predictor.score(thinned_for(_held_out(source.stacked("source")), record.site.units))
            for predictor, (record, source, *_), other in zip(fitted, jobs, kinds, strict=True)
            if other is kind
        )
        for kind in set(kinds)
    }
    records = []
    for (record, source, *_), predictor, kind in zip(jobs, fitted, kinds, strict=True):
        records.append(
            dataclasses.replace(
                _record(record, Policy.PREDICT, curves[kind]),
                predictor=predictor,
                source=source.name,
                lookahead=lookahead,
            )
        )
    return records


def _measured(
    record: SiteRecord, recording: Recording, source: Recording | None, share: float
) -> SiteRecord:
    """`record` with what its threshold does on the last `share` of the recorded tokens."""
    weight = _out_columns(recording)
    if record.policy is Policy.PREDICT:
        _, held_out = _examples(recording, source).split(share)
        metrics = measure(record.predictor, record.threshold, held_out, weight)
        return record.with_metrics(metrics)
    if record.policy is Policy.SKETCH:
        _, held_out = _examples(recording, recording).split(share)
        return record.with_metrics(measure(record.sketch, record.threshold, held_out, weight))
    if record.policy is Policy.GATE:
        # The same bookkeeping with the carrier's magnitude for a score.
        hidden = recording.stacked("hidden")
        examples = SiteExamples(_carrier(recording), hidden, _output_norms(recording))
        _, held_out = examples.split(share)
        score = _Magnitude(record.sensitivity)
        return record.with_metrics(measure(score, record.threshold, held_out, weight))
    if record.policy is Policy.EXACT:
        return record.with_exact_density(
            _nonzero_share(_held_out(recording.stacked("hidden"), share))
        )
    return record


def _nonzero_share(values: torch.Tensor | Rows) -> float:
    nonzero = sum(int(values[rows].count_nonzero()) for rows in chunks(len(values)))
    return nonzero / values.numel()


class _Magnitude(Predictor):
    """A score that is given: the gate's own magnitude, times its sensitivity where it has one."""

    def __init__(self, sensitivity: torch.Tensor | None) -> None:
        empty = torch.empty(0)
        super().__init__(
            empty, empty, empty, torch.ones(1) if sensitivity is None else sensitivity
        )

    def score(self, source: torch.Tensor) -> torch.Tensor:
        """That of the source itself, [tokens, units]."""
        return source.float().abs() * self.scale.to(source.device)


def _data_hash(batches: Sequence[Batch]) -> str:
    """Of every tensor of the batches, with its name, shape and dtype."""
    digest = hashlib.sha256()
    for batch in batches:
        for key, value in sorted(batch.items()):
            digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _store(
    workdir: str | Path | None, model: nn.Module, batches: Sequence[Batch], options: Mapping[str, object]
) -> Store:  # fmt: skip
    """Memory, or a folder for this calibration only. Raises WorkdirError."""
    if workdir is None:
        return Memory()
    manifest = {
        "model": f"{type(model).__name__} {model_fingerprint(model)}",
        "batches": _data_hash(batches),
        **options,
        "least bits": LEAST_BITS,
        "device": next(model.parameters()).device.type,
        "torch": str(torch.__version__),
    }
    return Workdir(workdir, manifest)


def learn_and_judge(batches: list[Batch]) -> tuple[list[Batch], list[Batch]]:
    """The batches to learn from, and a sixth, to measure quality on, both in their order; one batch is both.

    That sixth is spread evenly over all, the middle of each part: documents differ more in what they lose than windows
    do, and the end of a text holds few of them.
    """
    if len(batches) == 1:
        log.warning(
            "calibrating on a single batch: quality is measured on the text that was learnt from"
        )
        return batches, batches
    parts = max(1, len(batches) // 6)
    judged = {(2 * part + 1) * len(batches) // (2 * parts) for part in range(parts)}
    return (
        [batch for number, batch in enumerate(batches) if number not in judged],
        [batches[number] for number in sorted(judged)],
    )


def alternatives(
    calibration: Calibration, recordings: Sequence[Recording], policy: str
) -> list[list[SiteRecord]]:
    """Ways to run each site: without approximation, and with a threshold where there is one.

    For `auto` gates need no fit, so where nothing can be predicted, in the first layer, one is tried.
    """
    ways = []
    for record, recording in zip(calibration.sites, recordings, strict=True):
        ways.append([dataclasses.replace(_lossless(recording), inputs=record.inputs)])
        if record.policy in THRESHOLDED:
            ways[-1].append(record)
        elif policy == "auto" and recording.site.gate is not None:
            ways[-1].append(dataclasses.replace(_gated(recording), inputs=record.inputs))
    return ways


def _lossless(recording: Recording) -> SiteRecord:
    """Its exact zeros skipped where it has some."""
    policy = Policy.EXACT if recording.site.exact is not None else Policy.DENSE
    return _measured(_record(recording, policy, NO_CURVE), recording, None, HELD_OUT)


def _gated(recording: Recording) -> SiteRecord:
    """The site with a threshold of its own for its gate."""
    return _record(recording, Policy.GATE, threshold_curve(_magnitudes(recording)))


def _magnitudes(recording: Recording) -> torch.Tensor:
    """Of the gates of held-out tokens, [tokens, units]."""
    return thinned_for(_held_out(_carrier(recording)), recording.site.units).abs()


def _gates(
    recordings: Sequence[Recording], sensitivities: Mapping[str, torch.Tensor]
) -> list[SiteRecord]:
    """Sites with one threshold for all their gates, times sensitivities; without these each has its own."""
    if not sensitivities or not recordings:
        return [_gated(recording) for recording in recordings]
    scales = [sensitivities[r.name].to(r.weight.device) for r in recordings]
    curve = shared_threshold_curve(
        _magnitudes(r).float() * scale for r, scale in zip(recordings, scales, strict=True)
    )
    return [
        dataclasses.replace(_record(recording, Policy.GATE, curve), sensitivity=scale)
        for recording, scale in zip(recordings, scales, strict=True)
    ]


def _sketches(
    recordings: Sequence[Recording], sensitivities: Mapping[str, torch.Tensor], progress: Progress, store: Store
) -> list[SiteRecord]:  # fmt: skip
    """Sites with one threshold for all their sketches; without sensitivities each has its own."""
    found = []
    for number, recording in enumerate(recordings):
        learn = recording.stacked("source")
        learn = learn.narrow(0, 0, len(learn) - len(_held_out(learn)))

        def make(recording: Recording = recording, learn: torch.Tensor | Rows = learn) -> Tensors:
            sensitivity = sensitivities.get(recording.name)
            if sensitivity is not None:
                sensitivity = sensitivity.to(recording.weight.device)
            sketch = fit_sketch(recording.pair, learn, sensitivity, _output_norms(recording))
            return {part: getattr(sketch, part) for part in PARTS}

        parts = store.once(f"sketch-{number:05}", make)
        parts = [parts[part].to(recording.weight.device) for part in PARTS]
        found.append(Sketch(*parts, recording.pair.activation))
        progress("sketch", number + 1, len(recordings))
    scores = [
        sketch.score(thinned_for(_held_out(r.stacked("source")), r.site.units))
        for sketch, r in zip(found, recordings, strict=True)
    ]
    curves = [threshold_curve(score) for score in scores]
    if sensitivities and scores:
        curves = [shared_threshold_curve(scores)] * len(scores)
    return [
        dataclasses.replace(_record(recording, Policy.SKETCH, curve), sketch=sketch)
        for recording, curve, sketch in zip(recordings, curves, found, strict=True)
    ]


def fit(
    model: nn.Module, learn: Sequence[Batch], policy: str, *, heads: bool, lookahead: int, seed: int,
    progress: Progress, store: Store,
) -> tuple[Calibration, list[Recording]]:  # fmt: skip
    """Predictors and thresholds of every site, of attention too where `heads`, all at density 1; and what was seen."""
    kinds = tuple(SiteKind) if heads else (SiteKind.MLP,)
    recordings = collect(
        model, learn, max_tokens=MAX_TOKENS, progress=progress, kinds=kinds, store=store
    )
    records = _records(model, learn, recordings, policy, lookahead, seed, progress, store)
    weights = named_weights(model)
    records = [_with_inputs(*pair, weights) for pair in zip(records, recordings, strict=True)]
    calibration = Calibration(tuple(records), type(model).__name__, seed, _data_hash(learn))
    return calibration.at_density(1.0, head_density=1.0), recordings


def calibrate(
    model: nn.Module,
    batches: Iterable[torch.Tensor | Mapping[str, torch.Tensor]],
    *,
    policy: str = "auto",
    max_ppl_increase: float = 0.01,
    density: float | None = None,
    lookahead: int = 1,
    seed: int = 0,
    progress: bool = True,
    head_density: float | None = None,
    workdir: str | Path | None = None,
) -> Calibration:
    """Fit predictors and thresholds for every site of `model`, and attach them.

    batches: iterable of `input_ids` [B, T], or of dicts of model inputs, in reading order; a sixth of the batches, spread
    evenly, is kept for measuring quality where there are at least two. policy: "auto", "predict", "sketch", "gate",
    "exact" or "dense". density: the share of MLP units to keep, in (0, 1], and `head_density` that of attention
    heads (1 if only the other is given); with neither, each site gets a policy and a density so that the fewest bytes
    are read while perplexity stays within `max_ppl_increase` of dense, with 95 % confidence: little text for
    measuring costs density. lookahead: how many layers before its site a predictor reads its source, at least 1.
    workdir: a folder for what is recorded, so that it needn't fit in memory; the same call goes on from there after
    it was interrupted, with the same result, and the folder can be deleted afterwards. Without one memory limits how
    much of the text is used.

    The result is attached: `model.compile(backend="dejavu")` uses it from the next call on.
    Raises CalibrationError, ModelStateError and OptionError with what to do; with a workdir, WorkdirError where
    it is for another calibration, and DiskFullError.
    """
    _check_options(policy, max_ppl_increase, density, head_density, lookahead)
    check_model(model, "calibrate")
    checked = check_batches(model, batches)
    learn, judge = learn_and_judge(checked)
    options = {
        "policy": policy, "max_ppl_increase": max_ppl_increase, "density": density, "head_density": head_density,
        "lookahead": lookahead, "seed": seed,
    }  # fmt: skip
    store = _store(workdir, model, [*learn, *judge], options)
    bars = Bars(progress)
    try:
        searched = density is None and head_density is None
        heads = policy in ("auto", "predict") and (searched or head_density is not None)
        calibration, recordings = fit(
            model, learn, policy, heads=heads, lookahead=lookahead, seed=seed, progress=bars, store=store
        )  # fmt: skip
        calibration = dataclasses.replace(calibration, data_hash=_data_hash(checked))
        calibration = calibration.at_density(density or 1.0, head_density=head_density or 1.0)
        if searched and any(s.policy in THRESHOLDED for s in calibration.sites):
            candidates = allocations(
                model, calibration, recordings, alternatives(calibration, recordings, policy), learn,
                seed=seed, progress=bars, store=store,
            )  # fmt: skip
            calibration = search(model, candidates, judge, max_ppl_increase, bars, store)
        calibration = remeasured(calibration, recordings)
        attach_calibration(model, calibration)
        if calibration.quality is None:
            measured = partial(compare, model, judge, masked(model))
            calibration = calibration.with_quality(quality(store, "chosen", measured))
    finally:
        bars.close()
    return calibration


def _check_options(
    policy: str,
    max_ppl_increase: float,
    density: float | None,
    head_density: float | None,
    lookahead: int,
) -> None:
    policies = ("auto", *(str(p) for p in Policy))
    if policy not in policies:
        raise OptionError(f"unknown policy {policy!r}", expected=f"one of {', '.join(policies)}")
    check_densities(density=density, head_density=head_density)
    if not is_number(max_ppl_increase) or not max_ppl_increase >= 0:  # NaN too
        raise OptionError(
            "max_ppl_increase is out of range",
            found=repr(max_ppl_increase),
            expected="a number, at least 0",
            fix="0.01 allows one per cent",
        )
    if not isinstance(lookahead, Integral) or isinstance(lookahead, bool) or lookahead < 1:
        raise OptionError(
            "lookahead is out of range",
            found=repr(lookahead),
            expected="a whole number of layers, at least 1",
            fix="1 reads the layer before",
        )


def _sources(recordings: Sequence[Recording], lookahead: int) -> list[Recording | None]:
    """The site that each site's predictor reads the input of: `lookahead` sites of its kind earlier."""
    before: dict[SiteKind, list[Recording]] = {kind: [] for kind in SiteKind}
    sources = []
    for recording in recordings:
        same = before[recording.site.kind]
        sources.append(same[-lookahead] if len(same) >= lookahead else None)
        same.append(recording)
    return sources


def _records(
    model: nn.Module, batches: Sequence[Batch], recordings: Sequence[Recording], policy: str,
    lookahead: int, seed: int, progress: Progress, store: Store,
) -> list[SiteRecord]:  # fmt: skip
    sources = _sources(recordings, lookahead)
    chosen = [
        _choose(policy, r, s, _rank_and_bits(r, s)[0] if s else 0)
        for r, s in zip(recordings, sources, strict=True)
    ]
    jobs = [i for i, c in enumerate(chosen) if c is Policy.PREDICT]
    pairs = [(recordings[i], sources[i], *_rank_and_bits(recordings[i], sources[i])) for i in jobs]
    heads = [r for r, *_ in pairs if r.site.kind is SiteKind.ATTENTION]
    costs = (
        head_costs(model, batches, heads, seed=seed, progress=progress, store=store)
        if heads
        else []
    )
    by_name = {r.name: cost for r, cost in zip(heads, costs, strict=True)}
    fitted = dict(zip(jobs, _fit(pairs, by_name, lookahead, seed, progress, store), strict=True))
    gated = [i for i, c in enumerate(chosen) if c is Policy.GATE]
    sketched = [i for i, c in enumerate(chosen) if c is Policy.SKETCH]
    if gated or sketched:
        found = gate_sensitivities(model, batches, seed=seed, progress=progress, store=store)
        records = _gates([recordings[i] for i in gated], found)
        fitted |= dict(zip(gated, records, strict=True))
        records = _sketches([recordings[i] for i in sketched], found, progress, store)
        fitted |= dict(zip(sketched, records, strict=True))
    return [
        fitted[i] if i in fitted else _record(recording, chosen[i], NO_CURVE)
        for i, recording in enumerate(recordings)
    ]


def remeasured(
    calibration: Calibration, recordings: Sequence[Recording], share: float = HELD_OUT
) -> Calibration:
    """`calibration` with density, recall, precision and output error on the last `share` of `recordings`."""
    by_name = {r.name: r for r in recordings}
    return calibration.with_sites(
        _measured(record, by_name[record.name], by_name.get(record.source), share)
        for record in calibration.sites
    )
