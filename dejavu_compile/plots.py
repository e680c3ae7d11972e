"""Pictures of what was measured. Needs matplotlib."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .growth import CURVES, Point, slower_than_dense

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .verify import Verification

STYLES = {"contextual": ("o", "-"), "static": ("s", "--"), "random": ("x", ":")}
COLORS = {"mlp": "tab:blue", "attention": "tab:orange", "both": "tab:green"}


def _figure(columns: int) -> tuple[Figure, list[Axes]]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "pictures need matplotlib: pip install 'dejavu-compile[bench]'"
        ) from error
    figure = Figure(figsize=(5.4 * columns, 4.6), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def plot_verification(verification: Verification, path: str | Path) -> None:
    """Density against perplexity, similarity by layer, unions by batch."""
    figure, (quality, layers, unions) = _figure(3)
    _quality(verification, quality)
    _layers(verification, layers)
    _unions(verification, unions)
    figure.savefig(path, dpi=140)


def _quality(verification: Verification, axes: Axes) -> None:
    curves = defaultdict(list)
    for row in verification.existence:
        if row.layer < 0:
            curves[row.kind, row.selector].append(
                (row.density, 100 * row.quality.perplexity_increase)
            )
    for (kind, selector), points in curves.items():
        marker, style = STYLES[selector]
        axes.plot(*zip(*sorted(points), strict=True), marker=marker, ls=style, color=COLORS[kind],
                  label=f"{kind}, {selector}")  # fmt: skip
    axes.set(xlabel="density", ylabel="perplexity increase, %", title="Two passes", xlim=(0, None))
    lowest = min((y for points in curves.values() for _, y in points), default=0.0)
    axes.set_yscale("symlog", linthresh=1.0)
    axes.set_ylim(bottom=min(-0.5, 1.5 * lowest))
    axes.axhline(0.0, color="gray", lw=0.8)
    axes.legend(fontsize=6, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16))


def _layers(verification: Verification, axes: Axes) -> None:
    for kind in ("mlp", "attention"):
        rows = [s for s in verification.similarity if s.kind == kind]
        if not rows:
            continue
        numbers = [s.layer for s in rows]
        axes.plot(numbers, [s.residual for s in rows], marker="o", color=COLORS[kind],
                  label=f"{kind}: cosine of the residual stream")  # fmt: skip
        if kind == "mlp":
            axes.plot(numbers, [s.lookahead_recall for s in rows], marker="s", ls="--", color=COLORS[kind],
                      label="mlp: units chosen by the earlier input")  # fmt: skip
            axes.axhline(rows[0].lookahead_chance, color="gray", ls=":", lw=0.8, label="by chance")
    axes.set(xlabel="layer", ylim=(None, 1.02), title="Against the layer before")
    axes.legend(fontsize=7)


def _unions(verification: Verification, axes: Axes) -> None:
    curves = defaultdict(list)
    for row in verification.unions:
        if row.kind == "mlp":
            curves[row.density].append((row.batch, row.union, row.independent))
    for number, (density, points) in enumerate(sorted(curves.items())):
        batches, union, independent = zip(*sorted(points), strict=True)
        axes.plot(batches, union, marker="o", color=f"C{number}", label=f"density {density:g}")
        axes.plot(batches, independent, ls=":", color=f"C{number}")
    axes.set(xscale="log", xlabel="tokens of different contexts", ylabel="share of units that any selects",
             title="Union over a batch, MLPs (dotted: if independent)", ylim=(0, 1.02))  # fmt: skip
    axes.set_xscale("log", base=2)
    if curves:
        axes.legend(fontsize=7)


LABELS = {
    "density": "density of the MLPs", "kv": "slots of the cache", "batch": "sequences", "layers": "layers",
}  # fmt: skip
LINES = {"dense": ("s", "tab:gray"), "auto": ("o", "tab:blue"), "mlps sparse": ("^", "tab:green"),
         "mlps dense": ("v", "tab:orange")}  # fmt: skip


def plot_curves(points: Sequence[Point], title: str, path: str | Path) -> None:
    """A panel for each curve that has points: the time of a step, what its bytes need at the copy bandwidth, where dejavu is slower."""
    curves = [curve for curve in CURVES if any(p.curve == curve for p in points)]
    figure, panels = _figure(len(curves))
    figure.suptitle(title, fontsize=10)
    slower = slower_than_dense(points)
    for curve, axes in zip(curves, panels, strict=True):
        for provider, (marker, color) in LINES.items():
            of_line = [p for p in points if (p.curve, p.provider) == (curve, provider)]
            times = sorted((p.x, p.us / 1e3) for p in of_line if p.us is not None)
            floors = sorted((p.x, p.floor_us / 1e3) for p in of_line if p.floor_us is not None)
            if times:
                axes.plot(*zip(*times, strict=True), marker=marker, color=color, label=provider)
            if floors:
                axes.plot(*zip(*floors, strict=True), ls=":", lw=0.9, color=color)
        for x, ratio in slower.get(curve, []):
            axes.axvline(x, color="tab:red", lw=0.6)
            axes.annotate(f"{ratio:.2f}x slower", (x, 0.02), xycoords=("data", "axes fraction"),
                          rotation=90, fontsize=6, color="tab:red")  # fmt: skip
        axes.set(xlabel=LABELS[curve], ylabel="ms a step (dotted: its bytes at the copy bandwidth)",
                 title=curve)  # fmt: skip
        axes.set_xscale("log", base=10 if curve == "density" else 2)
        axes.set_ylim(bottom=0)
        if axes.lines:
            axes.legend(fontsize=7)
    figure.savefig(path, dpi=140)
