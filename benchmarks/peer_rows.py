"""Two implementations of one case, measured alike: each against its oracle first, then in one CUDA graph over layers."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from ops import graph_us
from torch import Tensor

from dejavu_compile.bench import copy_bandwidth, time_us
from dejavu_compile.decode_step import TOLERANCE

# Bytes that one round over the layers reads at least, and how many layers at most: so many that the graph's own start, some 10 us,
# doesn't count, as in a step, and none is left in an L2 cache (H100: 50 MB)
READ, MOST_LAYERS = 2e9, 32
TURNS = 3  # that count, after one that doesn't


@dataclass(frozen=True, slots=True)
class Side:
    """What it runs for layer i; what it has to give for layer 0, in fp32; the weights or keys and values that it reads."""

    run: Callable[[int], Tensor]
    expected: Tensor
    num_bytes: float


@dataclass(frozen=True, slots=True)
class Case:
    """Ours and theirs, of one shape."""

    what: str
    shape: str
    density: float
    dtype: torch.dtype
    layers: int
    ours: Side
    theirs: Side
    note: str = ""


@dataclass(frozen=True, slots=True)
class Measured:
    """Of one side. `us` is None where the result was wrong or there was none; then `failed` says why."""

    us: float | None = None
    error: float | None = None  # relative to its oracle, in the 2-norm
    num_bytes: float = 0.0
    timed: str = ""
    failed: str = ""

    @property
    def share(self) -> float | None:
        """Of the bandwidth of a copy."""
        if self.us is None or not torch.cuda.is_available():
            return None
        return 1e6 * self.num_bytes / copy_bandwidth() / self.us


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    what: str
    shape: str = ""
    density: float = 1.0
    dtype: str = ""
    ours: Measured = Measured()
    theirs: Measured = Measured()
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """Their time over ours, where both were right."""
        if self.ours.us is None or self.theirs.us is None:
            return None
        return self.theirs.us / self.ours.us

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        row = asdict(self) | {"ratio": self.ratio}
        for side in ("ours", "theirs"):
            row[side]["share_of_copy"] = getattr(self, side).share
        return row


def layers_for(num_bytes: float) -> int:
    """Layers that read `READ` together, of which each reads `num_bytes`; two at least."""
    return max(2, min(MOST_LAYERS, math.ceil(READ / num_bytes)))


def one_line(error: BaseException) -> str:
    """Its type and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def error_of(got: Tensor, expected: Tensor) -> float:
    """Relative, in the 2-norm; infinite for another shape."""
    if got.numel() != expected.numel():
        return math.inf
    expected = expected.double().flatten()
    return ((got.double().flatten() - expected).norm() / expected.norm()).item()


def judged(us: float, error: float, tolerance: float, num_bytes: float, timed: str) -> Measured:
    """A time counts only where the result is right; NaN isn't."""
    if error <= tolerance:
        return Measured(us, error, num_bytes, timed)
    failed = f"wrong result: error {error:.1e} of at most {tolerance:.1e}"
    return Measured(None, error, num_bytes, failed=failed)


def measured(side: Side, layers: int, tolerance: float) -> Measured:
    """Checked, then timed. What fails is in the result and goes no further."""
    try:
        error = error_of(side.run(0), side.expected)
        if not error <= tolerance:
            return judged(0.0, error, tolerance, side.num_bytes, "")
        us, timed = layer_us(side.run, layers)
        # Once more: what autotuning or capture leaves behind must not change a result.
        error = max(error, error_of(side.run(0), side.expected))
        return judged(us, error, tolerance, side.num_bytes, timed)
    except Exception as error:
        return Measured(num_bytes=side.num_bytes, failed=one_line(error))


def layer_us(run: Callable[[int], Any], layers: int) -> tuple[float, str]:
    """Median time of one layer, and how it was taken: queued between events where no graph can be captured."""

    def every_layer() -> None:
        for i in range(layers):
            run(i)

    if not torch.cuda.is_available():
        return time_us(every_layer, 2, warmup=1)["p50"] / layers, "CPU"
    try:
        return graph_us(run, layers), "CUDA graph"
    except RuntimeError as error:
        torch.cuda.synchronize()
        us = time_us(every_layer, 20)["p50"] / layers
        return us, f"queued events, no CUDA graph ({one_line(error)})"


def compare(case: Case) -> Row:
    """Both sides of a case, in turns: what runs first finds a GPU that hasn't got up to speed, and takes a tenth longer."""
    tolerance = TOLERANCE[case.dtype]
    turns = [
        [measured(side, case.layers, tolerance) for side in (case.ours, case.theirs)]
        for _ in range(1 + TURNS)
    ]
    ours, theirs = map(middle, zip(*turns[1:], strict=True))
    dtype = str(case.dtype).removeprefix("torch.")
    return Row(case.what, case.shape, case.density, dtype, ours, theirs, case.note)


def middle(turns: Sequence[Measured]) -> Measured:
    """Of one side the turn of the median time, or the first that failed."""
    failed = [turn for turn in turns if turn.us is None]
    return failed[0] if failed else sorted(turns, key=lambda turn: turn.us)[len(turns) // 2]


def table(rows: Iterable[Row]) -> str:
    """The rows as text; what failed and what to know of a row below it."""
    lines = [
        f"{'what':<40}{'shape':<30}{'density':>8}{'dtype':>10}{'ours us':>11}{'theirs us':>11}"
        f"{'ratio':>7}{'MB ours':>10}{'MB theirs':>10}{'of copy':>13}{'error ours':>12}{'theirs':>9}"
    ]
    noted = ""
    for row in rows:
        sides = row.ours, row.theirs
        us, mb, share, error = (
            [_shown(getattr(side, name), form, scale) for side in sides]
            for name, form, scale in (
                ("us", ".2f", 1), ("num_bytes", ".2f", 1e-6), ("share", ".0%", 1), ("error", ".1e", 1)
            )
        )  # fmt: skip
        lines.append(
            f"{row.what:<40}{row.shape:<30}{row.density:>8.3f}{row.dtype:>10}{us[0]:>11}{us[1]:>11}"
            f"{_shown(row.ratio, '.2f'):>7}{mb[0]:>10}{mb[1]:>10}{share[0] + ' / ' + share[1]:>13}"
            f"{error[0]:>12}{error[1]:>9}"
        )
        for name, side in (("ours", row.ours), ("theirs", row.theirs)):
            if side.failed:
                lines.append(f"    FAILED, {name}: {side.failed}")
            elif side.timed not in ("", "CUDA graph"):
                lines.append(f"    {name}: {side.timed}")
        if row.note not in ("", noted):
            lines.append(f"    {row.note}")
        noted = row.note
    return "\n".join(lines)


def _shown(value: float | None, form: str, scale: float = 1.0) -> str:
    """A number, or a dash for none."""
    return "-" if value is None else format(value * scale, form)
