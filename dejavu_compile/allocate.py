"""Give each site its own policy and density: the fewest bytes within a budget of perplexity.

options of a site (bytes, loss) -> the steps of all sites, best first -> how far the budget allows, by bisection

Bytes are the cost model's. Losses are estimates, made one site at a time (`sensitivity.skipping_costs`): they say in
which order density is worth giving up, and nothing else. How far to go is measured, on the whole.
"""

import dataclasses
import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from dejavu_compile.passes.site import Policy

from .artifact import THRESHOLDED, Calibration, SiteRecord, attach_calibration, predictor_weights
from .batches import Batch
from .collect import Recording
from .cost import cost_of
from .errors import CalibrationError
from .evaluate import Evaluation, compare, masked
from .predictors import DENSITY_GRID, HELD_OUT
from .progress import Progress
from .sensitivity import Skipping, skipping_costs
from .workdir import Store, Tensors

log = logging.getLogger(__name__)

# Candidates to bisect over: a whole evaluation for each doubling
MAX_CANDIDATES = 63
MAX_TOKENS = 32_768  # to estimate losses on


@dataclass(frozen=True, slots=True)
class Option:
    """One way to run a site: the bytes that it reads a step, and the nats a token that it loses, by an estimate."""

    record: SiteRecord
    bytes: float
    loss: float


def _options(
    recording: Recording,
    ways: Sequence[SiteRecord],
    costs: Mapping[tuple[str, Policy], Sequence[Skipping]],
) -> list[Option]:
    """A site's options: each of its ways, at each density that was tried; `costs` by name and policy."""
    options = []
    for record in ways:
        if record.policy in THRESHOLDED:
            options += [
                Option(
                    record.at_density(cost.asked),
                    _bytes(recording, record, cost.density),
                    cost.loss,
                )
                for cost in costs[record.name, record.policy]
            ]
        else:
            options.append(Option(record, _bytes(recording, record, record.density), 0.0))
    return options


def _bytes(recording: Recording, record: SiteRecord, density: float) -> float:
    """What the site reads a step of one token; dense where that is less, as it would run."""
    selector = predictor_weights(record, recording.weight) or record.sketch
    cost = cost_of(recording.site, recording.site.gate, selector.num_bytes if selector else 0)
    return min(cost.bytes(record.policy, density), cost.bytes(Policy.DENSE, 1.0))


def bytes_read(calibration: Calibration, recordings: Sequence[Recording]) -> tuple[float, float]:
    """What its sites read a step of one token, and what they would dense."""
    read = dense = 0.0
    for recording, record in zip(recordings, calibration.sites, strict=True):
        density = record.metrics.density if record.metrics is not None else record.density
        read += _bytes(recording, record, density)
        dense += _bytes(recording, dataclasses.replace(record, policy=Policy.DENSE), 1.0)
    return read, dense


def frontier(sites: Sequence[Sequence[Option]]) -> list[tuple[Option, ...]]:
    """Choices of an option for each site, from the least loss to the fewest bytes.

    Each has the least loss of all choices that read no more. They are the corners of the lower convex hull of all
    choices' (bytes, loss), where the sum over sites is least if each site's is: the site that loses least for a byte
    gives up next.
    """
    hulls = [_hull(options) for options in sites]
    steps = sorted(
        (
            (_slope(before, after), number, after)
            for number, hull in enumerate(hulls)
            for before, after in itertools.pairwise(hull)
        ),
        key=lambda step: step[:2],
    )
    choice = [hull[0] for hull in hulls]
    choices = [tuple(choice)]
    for _, number, option in steps:
        choice[number] = option
        choices.append(tuple(choice))
    return choices


def _slope(before: Option, after: Option) -> float:
    """Nats for each byte that is saved."""
    return (after.loss - before.loss) / (before.bytes - after.bytes)


def _hull(options: Sequence[Option]) -> list[Option]:
    """From the least loss on, those that lose least for each byte; the slopes ascend."""
    hull = [min(options, key=lambda option: (option.loss, option.bytes))]
    while cheaper := [option for option in options if option.bytes < hull[-1].bytes]:
        hull.append(min(cheaper, key=lambda option: (_slope(hull[-1], option), option.bytes)))
    return hull


def candidates(calibration: Calibration, choices: Sequence[Sequence[Option]]) -> list[Calibration]:
    """What to measure, sparsest first: the choices but the lossless one, at most MAX_CANDIDATES, evenly spread."""
    sparse = choices[:0:-1]
    count = min(len(sparse), MAX_CANDIDATES)
    spread = torch.linspace(0, len(sparse) - 1, count).long().tolist()
    return [calibration.with_sites(option.record for option in sparse[i]) for i in spread]


def allocations(
    model: nn.Module, calibration: Calibration, recordings: Sequence[Recording],
    ways: Sequence[Sequence[SiteRecord]], learnt: Sequence[Batch], *, seed: int, progress: Progress, store: Store,
) -> list[Calibration]:  # fmt: skip
    """What to measure, sparsest first; `ways` to run each site, one of them without approximation.

    Losses are estimated on the last of the batches that were `learnt` from, which no predictor was fitted on. Where the
    model can't be differentiated, MLPs at one density of all, with a warning.
    """
    thresholded = [record for site in ways for record in site if record.policy in THRESHOLDED]
    batches = _last(learnt)
    try:
        costs = skipping_costs(
            model, batches, thresholded, seed=seed, progress=progress, store=store
        )
    except RuntimeError as error:  # out of memory too
        log.warning(
            "all MLPs get one density, heads stay dense: no gradients (%s)",
            str(error).split("\n", 1)[0] or type(error).__name__,
        )
        return [calibration.at_density(density) for density in DENSITY_GRID]
    by_way = {(r.name, r.policy): cost for r, cost in zip(thresholded, costs, strict=True)}
    options = [
        _options(recording, site, by_way) for recording, site in zip(recordings, ways, strict=True)
    ]
    return candidates(calibration, frontier(options))


def _last(batches: Sequence[Batch]) -> Sequence[Batch]:
    """The held-out share of the batches, as many as make MAX_TOKENS."""
    held_out = max(1, round(len(batches) * HELD_OUT))
    wanted = math.ceil(MAX_TOKENS / batches[-1]["input_ids"].numel())
    return batches[-min(held_out, wanted) :]


def search(
    model: nn.Module, candidates: Sequence[Calibration], judge: list[Batch], budget: float,
    progress: Progress, store: Store,
) -> Calibration:  # fmt: skip
    """The sparsest of the candidates that keeps the budget on the text of `judge`."""
    sparse = masked(model)

    def measured(candidate: Calibration) -> Evaluation:
        attach_calibration(model, candidate)
        return compare(model, judge, sparse)

    def judged(number: int) -> Calibration:
        found = quality(store, f"budget-{number:02}", partial(measured, candidates[number]))
        return candidates[number].with_quality(found)

    return within_budget(judged, len(candidates), budget, partial(progress, "budget"))


def quality(store: Store, name: str, measured: Callable[[], Evaluation]) -> Evaluation:
    """What `measured` gives, once for a calibration."""

    def make() -> Tensors:
        return {"figures": torch.tensor(dataclasses.astuple(measured()), dtype=torch.float64)}

    tokens, *figures = store.once(f"quality-{name}", make)["figures"].tolist()
    return Evaluation(int(tokens), *figures)


def within_budget(
    judge: Callable[[int], Calibration],
    count: int,
    budget: float,
    progress: Callable[[int, int], None],
) -> Calibration:
    """The first of `count` candidates, sparsest first, that keeps the budget, by bisection.

    `judge` measures one. Perplexity falls with density but for noise; what is chosen was itself measured,
    never inferred. Raises CalibrationError if even the last one misses.
    """
    low, high = 0, count  # the answer is among low to high - 1, or nowhere
    best, missed = None, []
    step, steps = 0, math.ceil(math.log2(count + 1))
    while low < high:
        middle = (low + high) // 2
        candidate = judge(middle)
        step += 1
        progress(min(step, steps), steps)
        log.info(
            "density %.2f, heads %.2f: %s",
            candidate.density, candidate.head_density, candidate.quality,
        )  # fmt: skip
        if candidate.quality.perplexity_increase_at_most <= budget:
            best, high = candidate, middle
        else:
            missed.append(candidate)
            low = middle + 1
    if best is None:
        raise _out_of_budget(missed, budget)
    return best


def _out_of_budget(missed: Sequence[Calibration], budget: float) -> CalibrationError:
    """What came nearest, and the sites that would have to stay dense."""
    nearest = min(missed, key=lambda candidate: candidate.quality.perplexity_increase_at_most)
    sparse = [s for s in nearest.sites if s.policy in THRESHOLDED and s.density < 1]
    names = ", ".join(s.name for s in sparse[:3])
    more = f" and {len(sparse) - 3} more" if len(sparse) > 3 else ""
    return CalibrationError(
        f"no density keeps perplexity within {budget:.2%} of dense: {names}{more} would have to stay dense",
        found=f"{nearest.quality.perplexity_increase:+.2%} at best "
        f"(at most {nearest.quality.perplexity_increase_at_most:+.2%}, with 95 % confidence), with "
        f"{max((s.density for s in sparse), default=1.0):.0%} of their units",
        expected=f"at most {budget:+.2%}, with 95 % confidence",
        fix="raise max_ppl_increase, calibrate on more text, or give density=",
    )
