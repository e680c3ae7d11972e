"""What calibration learnt: attached to a model's weights, saved to a folder.

A folder holds `predictors.safetensors` and `dejavu_config.json`; no pickle. Attaching checks every site
against the model and refuses a mismatch; `read_artifact.py` reads a folder. (design: "artifact")
"""

import dataclasses
import json
import math
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from dejavu_compile.passes.site import Policy, PredictorWeights, SiteKind, SketchWeights

from . import attachments
from .attachments import Attachment, InputWeight, fingerprint
from .errors import ArtifactMismatchError, OptionError
from .evaluate import Evaluation
from .predictors import Predictor, SiteMetrics, ThresholdCurve
from .sketches import PARTS, Sketch
from .workdir import replacing

FORMAT_VERSION = 5
# 2 had neither sensitivities of gates nor predictors of MLPs in int4, 3 no predictors in int4; neither had sketches.
# Up to 4 only the output weight of a site was known, so that its other weights can't be checked.
READABLE = (2, 3, 4, 5)
CONFIG = "dejavu_config.json"
TENSORS = "predictors.safetensors"
# Units run by a threshold, which sets the density.
THRESHOLDED = (Policy.PREDICT, Policy.GATE, Policy.SKETCH)


@dataclass(frozen=True, slots=True)
class WeightLayout:
    """A weight whose units have to be contiguous: `contracted` is the dim that its projection sums over."""

    name: str
    contracted: int
    produces_units: bool


@dataclass(frozen=True, slots=True)
class WeightRecord:
    """A weight that a site was calibrated with."""

    name: str
    fingerprint: str


@dataclass(frozen=True, slots=True, eq=False)
class SiteRecord:
    """One site of an artifact. `source` names the site whose input the predictor reads.

    `fingerprint` is that of the output weight; `inputs` are the weights and biases that make the units of the site's
    input, none where they aren't known.

    sensitivity: [units] fp32, by which the magnitudes of a gate count (`dejavu_compile.sensitivity`); None for ones.
    """

    kind: SiteKind
    name: str
    layer: int
    units: int
    policy: Policy
    num_weights: int
    fingerprint: str
    curve: ThresholdCurve
    layouts: tuple[WeightLayout, ...] = ()
    density: float = 1.0
    predictor: Predictor | None = None
    source: str | None = None
    lookahead: int = 0
    metrics: SiteMetrics | None = None
    sensitivity: torch.Tensor | None = None
    sketch: Sketch | None = None
    inputs: tuple[WeightRecord, ...] = ()

    @property
    def threshold(self) -> float:
        """The score (of a gate: magnitude times sensitivity) above which a unit is selected, at this record's density."""
        return self.curve.at(self.density)

    @property
    def predictor_share(self) -> float:
        """Bytes of the predictor's (or sketch's) matrices as a share of the dense site's, at 2 bytes a weight."""
        matrices: tuple[torch.Tensor, ...] = ()
        if self.predictor is not None:
            matrices = self.predictor.matrices
        elif self.sketch is not None:
            matrices = self.sketch.gate, self.sketch.up
        stored = sum(t.numel() * t.element_size() for t in matrices)
        return stored / (2 * self.num_weights)

    def with_metrics(self, metrics: SiteMetrics) -> "SiteRecord":
        """The record with what was measured on held-out tokens."""
        return dataclasses.replace(self, metrics=metrics)

    def with_exact_density(self, density: float) -> "SiteRecord":
        """The share of units that the graph itself leaves nonzero."""
        return dataclasses.replace(
            self, density=density, metrics=SiteMetrics(density, 1.0, 1.0, 0.0)
        )

    def at_density(self, density: float) -> "SiteRecord":
        """The record asked to keep another share of units; only where there is a threshold to move."""
        if self.policy not in THRESHOLDED:
            return self
        return dataclasses.replace(self, density=density, metrics=None)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; predictors go to safetensors."""
        return {
            "kind": str(self.kind), "name": self.name, "layer": self.layer, "units": self.units, "policy": str(self.policy),
            "num_weights": self.num_weights,
            "fingerprint": self.fingerprint, "density": self.density, "source": self.source,
            "lookahead": self.lookahead, "threshold": _json_float(self.threshold),
            "rank": self.predictor.rank if self.predictor is not None else 0,
            "sensitivity": self.sensitivity is not None,
            "sketch": None if self.sketch is None else self.sketch.activation,
            "curve": {"densities": self.curve.densities,
                      "thresholds": [_json_float(t) for t in self.curve.thresholds]},
            "metrics": dataclasses.asdict(self.metrics) if self.metrics is not None else None,
            "layouts": [dataclasses.asdict(layout) for layout in self.layouts],
            "inputs": [dataclasses.asdict(weight) for weight in self.inputs],
        }  # fmt: skip


def is_number(value: object) -> bool:
    """Neither a bool nor a string; NaN and inf are numbers."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_densities(**densities: float | None) -> None:
    """Raise OptionError unless each is None or in (0, 1]."""
    for name, asked in densities.items():
        if asked is not None and not (is_number(asked) and 0 < asked <= 1):
            raise OptionError(
                f"{name} is out of range",
                found=repr(asked),
                expected=f"a number, 0 < {name} <= 1",
                fix=f"{name}=0.5 keeps half",
            )


def _json_float(value: float) -> float | None:
    """JSON has no infinity: None stands for -inf, a threshold that everything passes."""
    return value if math.isfinite(value) else None


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """All sites of a model, what their thresholds are, and the quality that was measured."""

    sites: tuple[SiteRecord, ...]
    model_class: str
    seed: int
    data_hash: str
    quality: Evaluation | None = None

    def _kept(self, sites: Iterable[SiteRecord]) -> float:
        """Mean share of units kept, weighted by units."""
        sites = list(sites)
        kept = sum(s.units * (s.metrics.density if s.metrics else s.density) for s in sites)
        return kept / sum(s.units for s in sites) if sites else 1.0

    @property
    def density(self) -> float:
        """Mean share of MLP units kept, layers that stay dense counted in full."""
        return self._kept(s for s in self.sites if s.kind is SiteKind.MLP)

    @property
    def head_density(self) -> float:
        """Mean share of attention heads kept, layers that stay dense counted in full."""
        return self._kept(s for s in self.sites if s.kind is SiteKind.ATTENTION)

    @property
    def thresholded_density(self) -> float:
        """Mean measured share of units kept by the MLPs that have a threshold (predict and gate)."""
        return self._kept(
            s for s in self.sites if s.kind is SiteKind.MLP and s.policy in THRESHOLDED
        )

    def at_density(
        self, density: float | None = None, *, head_density: float | None = None
    ) -> "Calibration":
        """The same predictors with thresholds for another density of MLP units, of heads, or of both.

        What isn't given stays. Attach it with `.attach(model)`. Raises OptionError for what isn't in (0, 1].
        """
        check_densities(density=density, head_density=head_density)
        asked = {SiteKind.MLP: density, SiteKind.ATTENTION: head_density}
        return dataclasses.replace(
            self,
            sites=tuple(
                s if asked[s.kind] is None else s.at_density(asked[s.kind]) for s in self.sites
            ),
            quality=None,
        )

    def with_sites(self, sites: Iterable[SiteRecord]) -> "Calibration":
        """With other records."""
        return dataclasses.replace(self, sites=tuple(sites))

    def with_quality(self, quality: Evaluation) -> "Calibration":
        """With a measured quality."""
        return dataclasses.replace(self, quality=quality)

    def attach(self, model: nn.Module) -> None:
        """Attach to `model`: graphs that were compiled with its weights compile again."""
        attach_calibration(model, self)

    def save_pretrained(self, path: str | Path) -> None:
        """Write the artifact folder: whole, or not at all. Raises DiskFullError."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{site.name}.{part}": getattr(site.predictor, part).detach().cpu().contiguous()
            for site in self.sites
            if site.predictor is not None
            for part in ("down", "up", "bias", "scale")
            if getattr(site.predictor, part) is not None
        }
        tensors |= {
            f"{site.name}.sensitivity": site.sensitivity.detach().cpu().contiguous()
            for site in self.sites
            if site.sensitivity is not None
        }
        tensors |= {
            f"{site.name}.sketch.{part}": getattr(site.sketch, part).detach().cpu().contiguous()
            for site in self.sites
            if site.sketch is not None
            for part in PARTS
        }
        with replacing(folder / TENSORS, folder / CONFIG) as (partial, config):
            save_file(tensors, partial)
            config.write_text(json.dumps(self.to_dict(), indent=1), encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "format_version": FORMAT_VERSION,
            "model_class": self.model_class,
            "seed": self.seed,
            "data_hash": self.data_hash,
            "density": self.density,
            "head_density": self.head_density,
            "quality": self.quality.to_dict() if self.quality is not None else None,
            "sites": [site.to_dict() for site in self.sites],
        }

    def __str__(self) -> str:
        head = f"{'layer':>5}  {'kind':<11}{'policy':<8}{'rank':>5}{'density':>9}{'recall':>8}{'output error':>14}"
        rows = [head]
        for s in self.sites:
            rank = s.predictor.rank if s.predictor is not None else 0
            m = s.metrics
            shown = (
                f"{m.density:>9.3f}{m.recall:>8.3f}{m.output_error:>14.4f}"
                if m is not None
                else f"{s.density:>9.3f}{'':>8}{'':>14}"
            )
            rows.append(f"{s.layer:>5}  {s.kind:<11}{s.policy:<8}{rank or '':>5}{shown}")
        rows.append(f"mean density {self.density:.3f}, of heads {self.head_density:.3f}")
        if self.quality is not None:
            rows.append(str(self.quality))
        return "\n".join(rows)


# --- attaching -------------------------------------------------------------------------------------


def named_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's parameters and buffers, by every name that they have."""
    return {
        **dict(model.named_buffers(remove_duplicate=False)),
        **dict(model.named_parameters(remove_duplicate=False)),
    }


def _check_weights(
    model: nn.Module, weights: dict[str, torch.Tensor], calibration: Calibration
) -> None:
    """The model has every weight that the records name, of a size that fits."""
    for site in calibration.sites:
        read = [w.name for w in (*site.inputs, *site.layouts)]
        for name in (site.name, *read, *([] if site.source is None else [site.source])):
            if name not in weights:
                raise ArtifactMismatchError(
                    f"{type(model).__name__} has no weight {name}",
                    found=f"a {type(model).__name__} without it",
                    expected=f"a {calibration.model_class}",
                    fix="load it on the model that was calibrated, or calibrate this one",
                )
        # How the output weight lies is known where it is gathered from; a head has several columns.
        dims = [layout.contracted for layout in site.layouts if not layout.produces_units]
        _check_size(site, site.name, weights[site.name], dims or [0, 1])
        for layout in site.layouts:
            if layout.produces_units:
                _check_size(site, layout.name, weights[layout.name], [1 - layout.contracted])


def _check_size(site: SiteRecord, name: str, weight: torch.Tensor, dims: list[int]) -> None:
    """One of these dims of a matrix has room for the site's units."""

    def fits(size: int) -> bool:
        if name != site.name:
            # Heads share the rows of keys and values; gate and up may be one matrix.
            return site.kind is SiteKind.ATTENTION or size >= site.units
        return size % site.units == 0 if site.kind is SiteKind.ATTENTION else size == site.units

    if weight.dim() != 2 or not any(fits(weight.shape[dim]) for dim in dims):
        raise ArtifactMismatchError(
            f"the artifact's {name} doesn't fit this model",
            found=f"{site.units} units (from the artifact)",
            expected=f"a weight of shape {tuple(weight.shape)} (from the model)",
            fix="calibrate again with dv.calibrate(model, batches)",
        )


def _check_fingerprints(weights: dict[str, torch.Tensor], calibration: Calibration) -> None:
    for site in calibration.sites:
        for known in (WeightRecord(site.name, site.fingerprint), *site.inputs):
            actual = fingerprint(weights[known.name])
            if actual != known.fingerprint:
                raise ArtifactMismatchError(
                    f"the artifact was made for other weights of {known.name}",
                    found=f"fingerprint {actual} (in the model)",
                    expected=f"fingerprint {known.fingerprint} (in the artifact)",
                    fix="load the checkpoint that was calibrated, or calibrate again",
                )


def predictor_weights(site: SiteRecord, weight: torch.Tensor) -> PredictorWeights | None:
    """The predictor as it runs beside the model's `weight`, with the threshold folded into its bias."""
    predictor, device = site.predictor, weight.device
    if predictor is None:
        return None
    stored = [
        m.to(device, weight.dtype if m.is_floating_point() else m.dtype).contiguous()
        for m in predictor.matrices
    ]
    return PredictorWeights(
        down=None if predictor.down is None else stored[0],
        up=stored[-1],
        bias=predictor.selector_bias(site.threshold).to(device),
    )


def sketch_weights(site: SiteRecord, device: torch.device) -> SketchWeights | None:
    """The sketch as it runs."""
    if site.sketch is None:
        return None
    return SketchWeights(*(getattr(site.sketch, part).to(device) for part in PARTS))


def _attachment(site: SiteRecord, weights: dict[str, torch.Tensor]) -> Attachment:
    """What a record says, beside the model's own weights."""
    weight = weights[site.name]
    return Attachment(
        policy=site.policy,
        density=site.metrics.density if site.metrics is not None else site.density,
        fingerprint=site.fingerprint,
        threshold=site.threshold if site.policy in THRESHOLDED else 0.0,
        sensitivity=None if site.sensitivity is None else site.sensitivity.to(weight.device),
        predictor=predictor_weights(site, weight),
        source=weakref.ref(weights[site.source]) if site.source is not None else None,
        lookahead=site.lookahead,
        sketch=sketch_weights(site, weight.device),
        inputs=tuple(
            InputWeight(known.name, weakref.ref(weights[known.name]), known.fingerprint)
            for known in site.inputs
        ),
    )


def attach_calibration(model: nn.Module, calibration: Calibration) -> None:
    """Attach every site's record to its weight, and lay its weights out for gathering: all of them, or none.

    Raises ArtifactMismatchError where the model is another, or has other weights.
    """
    weights = named_weights(model)
    _check_weights(model, weights, calibration)
    _check_fingerprints(weights, calibration)
    found = [(weights[site.name], _attachment(site, weights)) for site in calibration.sites]
    layouts = [layout for site in calibration.sites for layout in site.layouts]
    attachments.lay_out(
        ((weights[one.name], one.contracted, one.produces_units) for one in layouts),
        among=weights.values(),
    )
    for weight, attachment in found:
        attachments.attach(weight, attachment)


def detach(model: nn.Module) -> int:
    """Remove everything attached to `model`; it compiles lossless again. Returns how many sites had some."""
    return sum(attachments.detach(p) for p in model.parameters())
