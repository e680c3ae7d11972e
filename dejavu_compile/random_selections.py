"""Predictors, thresholds and sketches of real size that select known random units of a model with random weights."""

import weakref
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from dejavu_compile.kernels.nibbles import pack
from dejavu_compile.passes.site import Policy, PredictorWeights, SketchWeights

from .attachments import Attachment, attach, attached, fingerprint, make_unit_major
from .decode_step import DecodeStep, Kept, oracle_logits
from .errors import OptionError
from .predictors import rank_and_bits
from .shapes import Part, attentions, linears, mlps


def attach_random_predictors(
    model: nn.Module,
    density: float | None,
    head_density: float | None = None,
    budget: float = 0.05,
) -> list[Kept]:
    """Predictors of the real byte size that select a fixed random share of units, in all layers but the first.

    Their scores are the bias: the matrices are read in full, and their product, bounded, changes nothing.
    A density of None leaves that kind of site dense. Returns what stays of each part.
    """
    kept = []
    for parts, share, make in (
        (mlps(model), density, _mlp_predictor),
        (attentions(model), head_density, _head_predictor),
    ):
        for number, part in enumerate(parts if share is not None else []):
            if number > 0 or make is _mlp_predictor:  # the first MLP may run by its exact zeros
                make_unit_major(part.out, 1, produces_units=False)
            if number == 0:
                continue
            generator = torch.Generator().manual_seed(number)
            order = torch.randperm(part.units, generator=generator)
            picked = order[: round(share * part.units)].sort().values
            predictor = make(part, budget, number)
            predictor.bias.fill_(-1e6)[picked.to(part.out.device)] = 1e6
            attach(
                part.out,
                Attachment(Policy.PREDICT, share, fingerprint(part.out), predictor=predictor,
                           source=weakref.ref(parts[number - 1].out), lookahead=1),
            )  # fmt: skip
            units = torch.zeros(part.units, dtype=torch.bool).index_fill(0, picked, True)
            kept.append(Kept(part, units.repeat_interleave(part.out.shape[1] // part.units)))
    return kept


def attach_per_sequence(
    model: nn.Module,
    density: float | None,
    head_density: float | None,
    length: int,
    batch: int,
    others: Sequence[Kept] = (),
    full: Container[int] = (),
    budget: float = 0.05,
) -> list[Kept]:
    """Predictors that select a random share of the units for each sequence of a batch, in all layers but the first.

    Heads run for the sequences that select them, an MLP's neurons for all as soon as one does. A density of None leaves
    that kind of site as it is; `others`: what is attached already. Solved for the sources of one eager step in which the
    same units run: score above zero for those that do, below for the rest. Later steps have sources near to these.
    `full`: the ids of weights out of parts that get a predictor, but that the plan runs in full.
    """
    modules = linears(model)
    kinds = ((mlps(model), density, False), (attentions(model), head_density, True))
    wanted: list[
        tuple[Part, Part, torch.Tensor]
    ] = []  # the part, the one before it, [batch, units]
    kept, heads = [], set()
    for parts, share, each in kinds:
        for number, part in enumerate(parts[1:] if share is not None else [], 1):
            order = torch.rand(batch, part.units, generator=torch.Generator().manual_seed(number))
            units = order.argsort().argsort() < round(share * part.units)
            wanted.append((part, parts[number - 1], units.to(part.out.device)))
            mask = units.repeat_interleave(part.out.shape[1] // part.units, dim=1)
            kept.append(Kept(part, mask[:, None] if each else mask.any(0)))
            heads |= {id(part.out)} if each else set()
    sources: dict[int, torch.Tensor] = {}

    def keep(part: Part, inputs: torch.Tensor) -> None:
        by_token = inputs.reshape(
            batch, -1, inputs.shape[-1]
        )  # some models run all tokens in one row
        sources[id(part.out)] = by_token[
            :, -1
        ].float()  # the step's, which comes after the prompt's

    handles = [
        modules[id(part.into[0])].register_forward_pre_hook(
            lambda module, args, part=part: keep(part, args[0])
        )
        for _, part, _ in wanted
    ]
    running = [one for one in (*others, *kept) if id(one.part.out) not in full]
    oracle_logits(model, running, length, batch)
    for handle in handles:
        handle.remove()
    for number, (part, before, units) in enumerate(wanted):
        make_unit_major(part.out, 1, produces_units=False)
        by_sequence = torch.linalg.pinv(sources[id(before.out)])  # [source width, batch]
        if id(part.out) in heads:
            up = (by_sequence @ (2.0 * units - 1)).T
            bias = torch.zeros(part.units, device=up.device)
            predictor = PredictorWeights(None, up.to(part.out.dtype).contiguous(), bias)
        else:
            predictor = _by_sequence(part, by_sequence, units, budget, number)
        share = head_density if id(part.out) in heads else density
        attach(
            part.out,
            Attachment(Policy.PREDICT, share, fingerprint(part.out), predictor=predictor,
                       source=weakref.ref(before.out), lookahead=1),
        )  # fmt: skip
    return kept


@contextmanager
def the_other_units(model: nn.Module) -> Iterator[None]:
    """Meanwhile MLPs with random predictors run the units that these don't select, in graphs that are compiled already too."""
    predictors = [a.predictor for part in mlps(model) if (a := attached(part.out)) is not None]
    biases = [predictor.bias for predictor in predictors if predictor is not None]
    for bias in biases:
        bias.neg_()
    try:
        yield
    finally:
        for bias in biases:
            bias.neg_()


def claim_density(model: nn.Module, density: float) -> None:
    """Let what is attached to MLPs say that this share of the units runs: what the plan goes by.

    With a share of nothing it skips weights at any batch that the kernels take, also where that doesn't pay.
    """
    for part in mlps(model):
        attachment = attached(part.out)
        if attachment is not None:
            attach(part.out, replace(attachment, density=density))


GATE_PASSES = (
    1.0  # before the activation: SiLU and GELU of a negative gate stay below what they make of it
)
GATE_CLEAR = 2.0  # on either side of it; gates of random weights spread by 1.3


def attach_gates(model: nn.Module, density: float, length: int, batch: int = 1) -> list[Kept]:
    """Thresholds that this share of the units passes in a decode step, others for each sequence, in all layers with a
    plain gate.

    Random gates lie on both sides of any threshold, and near it rounding decides which units run. So the gates'
    weights are changed, in place, by what makes the gates of the first step clear: well below for units that don't run,
    well above for the others. The steps that are timed move away from the first, by what each leaves in the caches, and
    still select the same share.
    """
    parts = [part for part in mlps(model) if part.act is not None]
    step = DecodeStep(model, model.forward, length, batch)
    modules = linears(model)
    thresholds = []

    def clear(number: int, weight: nn.Parameter, inputs: torch.Tensor) -> None:
        source = inputs[:, -1].float()
        generator = torch.Generator().manual_seed(number)
        order = torch.rand(batch, weight.shape[0], generator=generator).argsort().argsort()
        runs = (order < round(density * weight.shape[0])).to(weight.device)
        gates = source @ weight.float().T
        thresholds.append(parts[number].act(gates.new_tensor(GATE_PASSES)).item())
        away = gates.abs() + GATE_CLEAR
        wanted = torch.where(runs, GATE_PASSES + away, GATE_PASSES - away)
        weight += (torch.linalg.pinv(source) @ (wanted - gates)).T.to(weight.dtype)

    handles = [
        modules[id(part.into[0])].register_forward_pre_hook(
            lambda module, args, number=number: clear(number, module.weight, args[0])
        )
        for number, part in enumerate(parts)
    ]
    step.with_prompt()
    for handle in handles:
        handle.remove()
    kept = []
    for part, threshold in zip(parts, thresholds, strict=True):
        for weight, produces in ((part.into[1], True), (part.out, False)):
            make_unit_major(weight, 1, produces_units=produces)
        attach(
            part.out,
            Attachment(Policy.GATE, density, fingerprint(part.out), threshold=threshold),
        )
        kept.append(Kept(part, threshold=threshold))
    return kept


def attach_random_sketches(model: nn.Module, density: float) -> list[Kept]:
    """Sketches of the real byte size that select a fixed random share of the units, in all layers of gated MLPs.

    Both are read in full, and their products count nothing: a gate is act(1), the other factor the root of a floor of 1
    or 0.
    """
    kept = []
    for number, part in enumerate(mlps(model)):
        for weight, produces in (*((w, True) for w in part.into), (part.out, False)):
            make_unit_major(weight, 1, produces_units=produces)
        (width, units), device = part.out.shape, part.out.device
        generator = torch.Generator().manual_seed(number)
        picked = torch.randperm(units, generator=generator)[: round(density * units)]
        runs = torch.zeros(units, dtype=torch.bool).index_fill(0, picked, True)
        codes = (
            torch.randint(0, 256, (units, width // per_byte), generator=generator)
            for per_byte in (2, 4)
        )
        numbers = torch.zeros(5, units)
        numbers[1], numbers[4] = 1, runs
        sketch = SketchWeights(*(c.to(device, torch.uint8) for c in codes), numbers.to(device))
        attach(
            part.out,
            Attachment(
                Policy.SKETCH, density, fingerprint(part.out), threshold=0.1, sketch=sketch
            ),
        )
        kept.append(Kept(part, runs))
    return kept


def _matrices(part: Part, budget: float, seed: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Random whole numbers [rank, width] and [units, rank] of the rank that the byte budget sets, and their bits."""
    generator = torch.Generator(part.out.device).manual_seed(seed)
    width = part.out.shape[0]
    rank, bits = rank_and_bits(part.num_bytes, width, part.units, budget)
    down, up = (
        torch.randint(-7, 8, shape, generator=generator, dtype=torch.int8, device=part.out.device)
        for shape in ((rank, width), (part.units, rank))
    )
    return down, up, bits


def _stored(down: torch.Tensor, up: torch.Tensor, bits: int) -> PredictorWeights:
    """As calibration stores them."""
    bias = torch.zeros(up.shape[0], device=up.device)
    if bits == 4:
        down, up = pack(down), pack(up)
    return PredictorWeights(down, up, bias)


def _mlp_predictor(part: Part, budget: float, seed: int) -> PredictorWeights:
    """Of random numbers: read in full, whatever its scores."""
    return _stored(*_matrices(part, budget, seed))


def _by_sequence(
    part: Part, by_sequence: torch.Tensor, units: torch.Tensor, budget: float, seed: int
) -> PredictorWeights:
    """Scores whose sign is that of `units` [batch, units] for the sources that `by_sequence` tells apart.

    The first rows of `down` say which sequence it is; the others are zeros, which are read like any.
    """
    down, up, bits = _matrices(part, budget, seed)
    batch = len(units)
    if batch > len(down):
        raise OptionError(
            "a predictor of this size can't tell so many sequences apart",
            found=f"{batch} sequences, rank {len(down)}",
            expected=f"at most {len(down)}",
            fix="a smaller batch, or a wider shape",
        )
    largest = 7 if bits == 4 else 127
    down.zero_()
    down[:batch] = (by_sequence.T * (largest / by_sequence.abs().amax())).round().to(torch.int8)
    up[:, :batch] = (2 * units.T.to(torch.int8) - 1) * 7
    return _stored(down, up, bits)


def _head_predictor(part: Part, budget: float, seed: int) -> PredictorWeights:
    """Of full rank, in the model's dtype: heads are few."""
    generator = torch.Generator().manual_seed(seed)
    like = {"device": part.out.device, "dtype": part.out.dtype}
    up = torch.randn(part.units, part.out.shape[0], generator=generator).to(**like)
    return PredictorWeights(None, up, torch.empty(part.units, device=part.out.device))
