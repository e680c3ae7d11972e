"""The line that explains a curve is found, and what is slower is said."""

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dejavu_compile.growth import (  # fmt: skip
    AUTO,
    DENSE,
    FORCED,
    Point,
    better_choices,
    fit_time,
    fits,
    slower_than_dense,
    table,
)
from dejavu_compile.plots import plot_curves

SEEDS = st.integers(0, 2**32 - 1)


def a_line(seed):
    """A fixed time of up to 1 ms, a bandwidth of 10 GB/s to 10 TB/s, bytes of which they are about as long."""
    draw = random.Random(seed)
    fixed, bandwidth = draw.uniform(1, 1000), 10 ** draw.uniform(10, 13)
    unit = fixed * 1e-6 * bandwidth
    read = [unit * draw.uniform(0.1, 10) for _ in range(draw.randint(3, 12))]
    read[:2] = [unit * 0.1, unit * 10]
    return draw, fixed, bandwidth, read


@given(SEEDS)
def test_a_line_is_found_exactly(seed):
    _, fixed, bandwidth, read = a_line(seed)
    fit = fit_time([(b, fixed + 1e6 * b / bandwidth) for b in read])
    assert fit.fixed_us == pytest.approx(fixed, rel=1e-6)
    assert fit.bandwidth == pytest.approx(bandwidth, rel=1e-6)
    assert fit.deviation < 1e-9
    assert fit.points == len(read)


@given(SEEDS)
def test_the_deviation_is_that_of_the_worst_point(seed):
    draw, fixed, bandwidth, read = a_line(seed)
    measured = [(b, (fixed + 1e6 * b / bandwidth) * draw.uniform(0.9, 1.1)) for b in read]
    fit = fit_time(measured)
    line = [fit.fixed_us + 1e6 * b / (fit.bandwidth or math.inf) for b, _ in measured]
    off = [abs(got / us - 1) for got, (_, us) in zip(line, measured, strict=True)]
    assert fit.deviation == pytest.approx(max(off))
    # no line near it is better by the measure that is made least
    least = sum(x**2 for x in off)
    for a, b in ((0.01, 0), (-0.01, 0), (0, 0.01), (0, -0.01)):
        other = [
            fit.fixed_us + a * fixed + 1e6 * (1 + b) * read / (fit.bandwidth or math.inf)
            for read, _ in measured
        ]
        assert sum((got / us - 1) ** 2 for got, (_, us) in zip(other, measured, strict=True)) >= least  # fmt: skip


def test_what_does_not_grow_with_bytes_has_no_bandwidth():
    assert fit_time([(5e9, 100.0), (5e9, 110.0), (5e9, 100.0)]).bandwidth is None
    falling = fit_time([(1e9, 300.0), (2e9, 200.0), (3e9, 100.0)])
    assert falling.bandwidth is None
    assert 100 < falling.fixed_us < 300
    assert falling.deviation > 0.3
    assert fit_time([(1e9, 300.0), (2e9, 200.0)]) is None, "two points are on any line"


def curve(name, dense, auto, other=None):
    points = []
    for x, times in enumerate(zip(dense, auto, other or [None] * len(auto), strict=True), 1):
        for provider, us in zip((DENSE, AUTO, FORCED[1]), times, strict=True):
            if us is not None:
                points.append(Point(name, x, provider, us, round(us * 1e6)))
    return points


def test_a_point_slower_than_dense_is_flagged():
    points = curve("density", [100.0, 100.0, 100.0], [50.0, 102.0, 110.0])
    assert slower_than_dense(points) == {"density": [(3, 1.1)]}
    assert "SLOWER than dense at 3: 1.10 times" in table(points)
    failed = [replace(p, us=None, failure="FAILED: off by 1") if p.provider == DENSE else p for p in points]  # fmt: skip
    assert slower_than_dense(failed) == {}
    assert "FAILED" in table(failed)
    assert DENSE not in fits(failed)["density"]


def test_a_wrong_choice_of_the_plan_is_flagged():
    points = curve("batch", [100.0] * 3, [60.0, 80.0, 90.0], [90.0, 79.0, 60.0])
    assert better_choices(points) == {"batch": [(3, 1.5)]}
    assert "the plan's other choice is faster at 3" in table(points)


def test_the_picture_has_a_panel_a_curve(tmp_path):
    points = curve("batch", [1e3] * 3, [6e2, 8e2, 1.2e3]) + curve("kv", [1e3] * 3, [6e2] * 3)
    plot_curves(points, "toy", tmp_path / "curves.png")
    picture = (tmp_path / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    width = int.from_bytes(picture[16:20], "big")
    plot_curves(points[:6], "toy", tmp_path / "curves.png")
    alone = (tmp_path / "curves.png").read_bytes()
    assert width == pytest.approx(2 * int.from_bytes(alone[16:20], "big"), rel=0.01)
