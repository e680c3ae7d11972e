"""How the time of a decode step grows, and whether the bytes that it reads explain it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

CURVES = ("density", "kv", "batch", "layers")
DENSE, AUTO = "dense", "auto"
FORCED = ("mlps sparse", "mlps dense")  # what the plan might have chosen instead
SLOWER = 0.03  # a difference that counts


@dataclass(frozen=True, slots=True)
class Point:
    """One step: where on a curve, by what, how long, and what it must read. us None: it failed its check.

    `detail`: Inductor's mode, or what the plan chose. `floor_us`: its bytes at the copy bandwidth, on a GPU.
    """

    curve: str
    x: float
    provider: str
    us: float | None
    bytes: int | None
    floor_us: float | None = None
    detail: str = ""
    p20: float | None = None
    p80: float | None = None
    error: float | None = None
    tolerance: float | None = None
    failure: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Fit:
    """time = fixed_us + bytes / bandwidth, and the largest relative deviation from it over `points`.

    bandwidth in bytes a second; None where the time doesn't grow with the bytes.
    """

    fixed_us: float
    bandwidth: float | None
    deviation: float
    points: int


def fit_time(measured: Sequence[tuple[float, float]]) -> Fit | None:
    """The line through (bytes, us) that is least off, in squares of relative deviations.

    None for fewer than three points: two are on any line.
    """
    if len(measured) < 3:
        return None
    read, us = torch.tensor(measured, dtype=torch.float64).T
    scale = read.abs().max().clamp(min=1.0)
    rows = torch.stack([1 / us, read / scale / us], dim=1)
    fixed, slope = 0.0, 0.0
    if (read.max() - read.min()) > 1e-6 * scale:
        ones = torch.ones(len(us), 1, dtype=torch.float64)
        fixed, slope = torch.linalg.lstsq(rows, ones).solution.flatten().tolist()
    if slope <= 0:
        fixed, slope = ((1 / us).sum() / (1 / us**2).sum()).item(), 0.0
    deviation = ((fixed + slope * read / scale) / us - 1).abs().max().item()
    bandwidth = 1e6 * scale.item() / slope if slope > 0 else None
    return Fit(fixed, bandwidth, deviation, len(us))


def _by_place(points: Iterable[Point]) -> dict[tuple[str, float], dict[str, Point]]:
    found: dict[tuple[str, float], dict[str, Point]] = {}
    for point in points:
        found.setdefault((point.curve, point.x), {})[point.provider] = point
    return found


def fits(points: Sequence[Point]) -> dict[str, dict[str, Fit]]:
    """By curve and provider."""
    found: dict[str, dict[str, Fit]] = {}
    for curve in CURVES:
        for provider in (DENSE, AUTO, *FORCED):
            measured = [
                (p.bytes, p.us) for p in points
                if (p.curve, p.provider) == (curve, provider) and p.us is not None and p.bytes is not None
            ]  # fmt: skip
            fit = fit_time(measured)
            if fit is not None:
                found.setdefault(curve, {})[provider] = fit
    return found


def _ratios(
    points: Sequence[Point], other: Callable[[dict[str, Point]], float | None]
) -> dict[str, list[tuple[float, float]]]:
    """By curve: (x, how much longer dejavu takes there than `other`), where that is more than SLOWER."""
    found: dict[str, list[tuple[float, float]]] = {}
    for (curve, x), here in _by_place(points).items():
        us, best = (here[AUTO].us if AUTO in here else None), other(here)
        if us is not None and best is not None and us > (1 + SLOWER) * best:
            found.setdefault(curve, []).append((x, us / best))
    return found


def slower_than_dense(points: Sequence[Point]) -> dict[str, list[tuple[float, float]]]:
    """Where dejavu takes longer than dense Inductor: by curve (x, times as long)."""
    return _ratios(points, lambda here: here[DENSE].us if DENSE in here else None)


def better_choices(points: Sequence[Point]) -> dict[str, list[tuple[float, float]]]:
    """Where the plan chose what takes longer than what it could have chosen: by curve (x, times as long)."""

    def best(here: dict[str, Point]) -> float | None:
        times = [here[name].us for name in FORCED if name in here and here[name].us is not None]
        return min(times, default=None)

    return _ratios(points, best)


def table(points: Sequence[Point]) -> str:
    """The curves, their fits, and what is flagged, as text."""
    lines, fitted = [], fits(points)
    slower, better = slower_than_dense(points), better_choices(points)
    for curve in CURVES:
        places = {x: here for (c, x), here in _by_place(points).items() if c == curve}
        if not places:
            continue
        lines.append(f"{curve:>10}  {'':12}{'ms':>9}{'GB':>8}{'floor':>7}{'':>8}")
        for x, here in sorted(places.items()):
            for name, point in here.items():
                lines.append(f"{x:10g}  {_line(name, point, here.get(DENSE))}")
        for name, fit in fitted.get(curve, {}).items():
            speed = (
                f"bytes at {fit.bandwidth / 1e9:.1f} GB/s" if fit.bandwidth else "nothing by bytes"
            )
            lines.append(
                f"  {name}: {fit.fixed_us:.0f} us + {speed}, off by at most "
                f"{fit.deviation:.1%} over {fit.points} points"
            )
        lines += [
            f"  SLOWER than dense at {x:g}: {r:.2f} times as long"
            for x, r in slower.get(curve, [])
        ]
        lines += [f"  the plan's other choice is faster at {x:g}: auto takes {r:.2f} times as long"
                  for x, r in better.get(curve, [])]  # fmt: skip
    return "\n".join(lines)


def _line(name: str, point: Point, dense: Point | None) -> str:
    us, read = point.us, point.bytes
    time = f"{us / 1e3:9.3f}" if us is not None else "   FAILED"
    size = f"{read / 1e9:8.3f}" if read is not None else "       ?"
    floor = f"{point.floor_us / us:7.0%}" if us and point.floor_us else "       "
    both = dense is not None and dense.us is not None and us is not None and name != DENSE
    speedup = f"{dense.us / us:7.2f}x" if both else "        "
    return f"{name:12}{time}{size}{floor}{speedup}  {point.failure or point.detail}"
