"""Measures one point of a curve: a program that is compiled, checked against its oracle, and timed."""

import gc
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

import dejavu_compile as dv
from dejavu_compile.bench import copy_bandwidth, measure
from dejavu_compile.decode_step import DecodeStep, Kept, Reference, compared_with
from dejavu_compile.growth import AUTO, DENSE, FORCED, Point
from dejavu_compile.plan import KERNEL_TOKENS
from dejavu_compile.random_selections import (
    attach_gates,
    attach_per_sequence,
    attach_random_predictors,
    claim_density,
)
from dejavu_compile.shapes import build, in_float32, mlps, row_major
from dejavu_compile.step_bytes import capture_step, total

SPARSE, DENSE_MLPS = FORCED
OPTIONS: dict[str, dict[str, Any]] = {
    AUTO: {},
    SPARSE: {"dejavu.max_tokens": KERNEL_TOKENS},
    DENSE_MLPS: {"dejavu.max_tokens": 0},
}


@dataclass(frozen=True, slots=True)
class Place:
    """What is measured: the model's layers, slots of the cache, sequences, density of the MLPs."""

    layers: int
    length: int
    batch: int
    density: float


def is_gated(model: nn.Module) -> bool:
    """Whether some of its MLPs can be thresholded at their gates."""
    return any(part.act is not None for part in mlps(model))


class Bench:
    """Measures points. One model at a time, which is built once, and each program once."""

    def __init__(
        self, shape: str, dtype: torch.dtype, longest: int, modes: list[str], repeats: int
    ) -> None:
        self.shape, self.dtype, self.longest = shape, dtype, longest
        self.modes, self.repeats = modes, repeats
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.head_density: float | None = None
        self.layers, self.model, self.wide = 0, nn.Module(), None
        self.known: dict[tuple[Any, ...], Point] = {}

    def take(self, layers: int) -> nn.Module:
        """The model of so many layers: built, unless it is the last one."""
        if layers != self.layers:
            self.model, self.wide = nn.Module(), None
            gc.collect()
            self.layers = layers
            self.model = build(self.shape, self.device, self.dtype, layers, self.longest)
            self.wide = in_float32(self.model, self.shape, self.longest)
        return self.model

    def attach(self, place: Place, full: frozenset[int] = frozenset()) -> list[Kept]:
        """Selections for this step. `full`: weights out of parts that the plan runs in full nonetheless."""
        model, heads = self.model, self.head_density
        length, batch, density = place.length, place.batch, place.density
        dv.detach(model)
        if is_gated(model):
            kept = attach_gates(model, density, length, batch)
            if heads is not None:
                kept += attach_per_sequence(model, None, heads, length, batch, kept, full)
        elif batch == 1:
            kept = attach_random_predictors(model, density, heads)
        else:
            kept = attach_per_sequence(model, density, heads, length, batch, full=full)
        return kept

    def dense(self, place: Place) -> Point:
        """The best of Inductor's modes."""
        key = (DENSE, place.layers, place.length, place.batch)
        if key not in self.known:
            model = self.take(place.layers)
            dv.detach(model)
            row_major(model)
            reference = compared_with(model, self.wide, [], place.length, place.batch)
            step = DecodeStep(model, model.forward, place.length, place.batch)
            read = total(capture_step(step, model.forward, backend="inductor").reads())
            points = []
            for mode in self.modes:
                how = {"backend": "inductor", "mode": None if mode == "default" else mode}
                point = self._timed(DENSE, place, reference, read, how)
                points.append(replace(point, detail=mode))
            self.known[key] = min(points, key=lambda p: p.us if p.us is not None else float("inf"))
        return self.known[key]

    def sparse(self, place: Place, provider: str = AUTO) -> Point:
        """dejavu with selections attached; `provider` says who chooses what runs sparse."""
        key = (provider, place)
        if key not in self.known:
            try:
                self.known[key] = self._sparse(place, provider)
            except torch.OutOfMemoryError as error:
                # gates are set in one pass over the whole prompt
                failure = f"FAILED: {str(error).splitlines()[0]}"
                self.known[key] = Point("", 0, provider, None, None, failure=failure)
        return self.known[key]

    def other(self, place: Place) -> Point | None:
        """What the plan might have chosen for the MLPs instead, if anything."""
        chosen = self.sparse(place).detail
        if "mlp gate" in chosen or "mlp predict" in chosen:
            return self.sparse(place, DENSE_MLPS)
        return self.sparse(place, SPARSE) if place.batch <= KERNEL_TOKENS else None

    def _sparse(self, place: Place, provider: str) -> Point:
        model = self.take(place.layers)
        options = dict(OPTIONS[provider])
        if self.device == "cuda":
            options["triton.cudagraphs"] = True
        how = {"backend": "dejavu", "options": options}
        kept = self.attach(place)
        if provider == SPARSE:
            claim_density(model, 0.0)
        step = DecodeStep(model, model.forward, place.length, place.batch)
        captured = capture_step(step, model.forward, **how)
        full = frozenset({id(k.part.out) for k in kept} - captured.sparse)
        if full and place.batch > 1:
            # What runs in full changes the sources that the other predictors were solved for.
            kept = self.attach(place, full)
            if provider == SPARSE:
                claim_density(model, 0.0)
        kept = [k for k in kept if id(k.part.out) not in full]
        reference = compared_with(model, self.wide, kept, place.length, place.batch)
        read = total(captured.reads(reference.oracle.shares))
        point = self._timed(provider, place, reference, read, how)
        chosen = Counter(
            f"{s['kind']} {s['policy']}" + " cache" * (s["execution"] == "cache")
            for s in captured.sites
        )
        return replace(point, detail=", ".join(f"{n} {what}" for what, n in chosen.items()))

    def _timed(
        self, provider: str, place: Place, reference: Reference, read: int | None, how: dict[str, Any]
    ) -> Point:  # fmt: skip
        """One compiled program; it has no time unless it matched."""
        row = measure(
            self.model, provider, place.length, self.repeats, reference.oracle.logits, place.batch, **how
        )  # fmt: skip
        matched = row["error"] < reference.tolerance  # a NaN doesn't
        failure = "" if matched else f"FAILED: off by {row['error']:.2g}"
        if row["recompiles"] or row["cudagraph_skips"]:
            failure += (
                f" {row['recompiles']} recompiles, {row['cudagraph_skips']} CUDA graphs skipped"
            )
        floor_us = 1e6 * read / copy_bandwidth() if self.device == "cuda" and read else None
        return Point(
            "", 0, provider, row["p50"] if matched else None, read, floor_us, p20=row["p20"],
            p80=row["p80"], error=row["error"], tolerance=reference.tolerance, failure=failure,
        )  # fmt: skip
