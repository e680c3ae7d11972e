"""What calibration learnt: attached to a model's weights, saved to a folder, loaded again.

A folder holds `predictors.safetensors` and `dejavu_config.json`; no pickle. Loading checks every site
against the model and refuses a mismatch. (design: "artifact")
"""

import dataclasses
import json
import math
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from dejavu_compile.kernels.activations import REFERENCE
from dejavu_compile.passes.site import Policy, PredictorWeights, SiteKind, SketchWeights

from . import attachments
from .attachments import Attachment, fingerprint
from .batches import check_model
from .errors import ArtifactError, ArtifactMismatchError
from .evaluate import Evaluation
from .predictors import Predictor, SiteMetrics, ThresholdCurve
from .sketches import PARTS, Sketch
from .workdir import replacing

FORMAT_VERSION = 4
# 2 had neither sensitivities of gates nor predictors of MLPs in int4, 3 no predictors in int4; neither had sketches.
READABLE = (2, 3, 4)
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


@dataclass(frozen=True, slots=True, eq=False)
class SiteRecord:
    """One site of an artifact. `source` names the site whose input the predictor reads.

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
        }  # fmt: skip


def _json_float(value: float) -> float | None:
    """JSON has no infinity: None stands for -inf, a threshold that everything passes."""
    return value if math.isfinite(value) else None


def _from_json_float(value: float | None) -> float:
    return -math.inf if value is None else value


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

        What isn't given stays. Attach it with `.attach(model)`.
        """
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


def _weights(model: nn.Module, calibration: Calibration) -> dict[str, torch.Tensor]:
    """The model's output-projection weights by name, checked against the records."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = {}
    for site in calibration.sites:
        weight = parameters.get(site.name)
        if weight is None:
            raise ArtifactMismatchError(
                f"{type(model).__name__} has no weight {site.name}",
                found=f"a {type(model).__name__} without it",
                expected=f"a {calibration.model_class}",
                fix="load it on the model that was calibrated, or calibrate this one",
            )
        if not any(
            size % site.units == 0 if site.kind is SiteKind.ATTENTION else size == site.units
            for size in weight.shape
        ):
            raise ArtifactMismatchError(
                f"the artifact's {site.name} doesn't fit this model",
                found=f"{site.units} units (from the artifact)",
                expected=f"a weight of shape {tuple(weight.shape)} (from the model)",
                fix="calibrate again with dv.calibrate(model, batches)",
            )
        found[site.name] = weight
    return found


def _check_fingerprints(weights: dict[str, torch.Tensor], calibration: Calibration) -> None:
    for site in calibration.sites:
        actual = fingerprint(weights[site.name])
        if actual != site.fingerprint:
            raise ArtifactMismatchError(
                f"the artifact was made for other weights of {site.name}",
                found=f"fingerprint {actual} (in the model)",
                expected=f"fingerprint {site.fingerprint} (in the artifact)",
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


def attach_calibration(model: nn.Module, calibration: Calibration) -> None:
    """Attach every site's record to its weight, and lay its weights out for gathering.

    Raises ArtifactMismatchError where the model is another, or has other weights.
    """
    weights = _weights(model, calibration)
    _check_fingerprints(weights, calibration)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for site in calibration.sites:
        weight = weights[site.name]
        for layout in site.layouts:
            attachments.make_unit_major(
                parameters[layout.name], layout.contracted, produces_units=layout.produces_units
            )
        sparse = site.policy in THRESHOLDED
        attachments.attach(
            weight,
            Attachment(
                policy=site.policy,
                density=site.metrics.density if site.metrics is not None else site.density,
                fingerprint=site.fingerprint,
                threshold=site.threshold if sparse else 0.0,
                sensitivity=None
                if site.sensitivity is None
                else site.sensitivity.to(weight.device),
                predictor=predictor_weights(site, weight),
                source=weakref.ref(weights[site.source]) if site.source is not None else None,
                lookahead=site.lookahead,
                sketch=sketch_weights(site, weight.device),
            ),
        )


def detach(model: nn.Module) -> int:
    """Remove everything attached to `model`; it compiles lossless again. Returns how many sites had some."""
    return sum(attachments.detach(p) for p in model.parameters())


# --- loading ---------------------------------------------------------------------------------------


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(
            f"{folder} is not an artifact", found=f"no {CONFIG}", expected=f"{CONFIG} and {TENSORS}",
            fix="save one with calibration.save_pretrained(path)",
        ) from None  # fmt: skip
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} is not readable JSON", found=str(error)) from None
    version = config.get("format_version") if isinstance(config, dict) else None
    if version not in READABLE:
        raise ArtifactError(
            f"{path} has a format that this version can't read", found=f"format version {version}",
            expected=f"format version {' or '.join(map(str, READABLE))}",
            fix="update dejavu_compile, or calibrate again",
        )  # fmt: skip
    return config


def _sensitivity_from(
    config: dict[str, Any], tensors: dict[str, torch.Tensor], path: Path
) -> torch.Tensor | None:
    """What the threshold of a gate is in units of, where it is one."""
    name = config["name"]
    if not config.get("sensitivity"):  # format version 2 has none
        return None
    found = tensors.get(f"{name}.sensitivity")
    if found is None or found.shape != (config["units"],):
        raise ArtifactError(
            f"{path} lacks the sensitivity of {name}",
            found="none" if found is None else f"shape {tuple(found.shape)}",
            expected=f"{name}.sensitivity of {config['units']} units",
            fix="save or copy the artifact again",
        )
    if not (found.isfinite() & (found >= 0)).all():
        raise ArtifactError(
            f"the sensitivity of {name} in {path} holds NaN, inf or negative values",
            fix="calibrate again",
        )
    return found


def _sketch_from(
    config: dict[str, Any], tensors: dict[str, torch.Tensor], path: Path
) -> Sketch | None:
    """The sketch of a gated MLP, where it has one."""
    name, activation = config["name"], config.get("sketch")
    if activation is None:  # format versions before 4 have none
        return None
    if activation not in REFERENCE:
        raise ArtifactError(
            f"the sketch of {name} in {path} has an unknown activation",
            found=activation, expected=f"one of {', '.join(REFERENCE)}", fix="update dejavu_compile",
        )  # fmt: skip
    found = [tensors.get(f"{name}.sketch.{part}") for part in PARTS]
    shapes = [None if t is None else tuple(t.shape) for t in found]
    units = config["units"]
    columns = shapes[1][1] if shapes[1] is not None and len(shapes[1]) == 2 else 0
    expected = [(units, 2 * columns), (units, columns), (5, units)]
    bytes_ = all(t is not None and t.dtype is torch.uint8 for t in found[:2])
    if shapes != expected or not columns or not bytes_:
        raise ArtifactError(
            f"{path} lacks the sketch of {name}", found=f"shapes {shapes}",
            expected=f"uint8 gate and up, numbers of {units} units: {expected}",
            fix="save or copy the artifact again",
        )  # fmt: skip
    if not found[2].isfinite().all() or not (found[2][4] >= 0).all():
        raise ArtifactError(
            f"the sketch of {name} in {path} holds NaN, inf or negative squares",
            fix="calibrate again",
        )
    return Sketch(*found, activation)


def _site_from(config: dict[str, Any], tensors: dict[str, torch.Tensor], path: Path) -> SiteRecord:
    name = config["name"]
    predictor = None
    if config["rank"]:
        parts = {}
        full_rank = SiteKind(config["kind"]) is SiteKind.ATTENTION
        for part in ("down", "up", "bias", "scale"):
            tensor = tensors.get(f"{name}.{part}")
            if part == "down" and full_rank:
                parts[part] = None
                continue
            if tensor is None:
                raise ArtifactError(
                    f"{path} lacks the predictor of {name}", expected=f"{name}.{part}"
                )
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise ArtifactError(
                    f"the predictor of {name} in {path} holds NaN or inf", fix="calibrate again"
                )
            parts[part] = tensor
        predictor = Predictor(**parts)
    sensitivity = _sensitivity_from(config, tensors, path)
    curve = config["curve"]
    metrics = config["metrics"]
    return SiteRecord(
        kind=SiteKind(config["kind"]), name=name, layer=config["layer"], units=config["units"], policy=Policy(config["policy"]),
        num_weights=config["num_weights"],
        fingerprint=config["fingerprint"], density=config["density"], source=config["source"],
        lookahead=config["lookahead"], predictor=predictor, sensitivity=sensitivity,
        sketch=_sketch_from(config, tensors, path),
        metrics=SiteMetrics(**metrics) if metrics else None,
        layouts=tuple(WeightLayout(**layout) for layout in config["layouts"]),
        curve=ThresholdCurve(tuple(curve["densities"]),
                             tuple(_from_json_float(t) for t in curve["thresholds"])),
    )  # fmt: skip


def read(path: str | Path) -> Calibration:
    """Read an artifact folder without a model. Raises ArtifactError if it can't be read."""
    folder = Path(path)
    config = _read_config(folder)
    try:
        tensors = load_file(folder / TENSORS)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"{folder / TENSORS} can't be read",
            found=str(error),
            fix="save or copy the artifact again",
        ) from None
    try:
        sites = tuple(_site_from(site, tensors, folder / TENSORS) for site in config["sites"])
        quality = config["quality"]
        if quality is not None:
            quality = {"margin": 0.0, **quality}  # artifacts of before have none
            quality = Evaluation(
                **{f.name: quality[f.name] for f in dataclasses.fields(Evaluation)}
            )
        return Calibration(
            sites, config["model_class"], config["seed"], config["data_hash"], quality
        )
    except ArtifactError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{folder / CONFIG} is incomplete", found=f"no usable {error}", fix="calibrate again"
        ) from None


def load(model: nn.Module, path: str | Path) -> Calibration:
    """Read an artifact folder and attach it to `model`.

    Raises ArtifactError (unreadable, truncated, newer format, NaN), ArtifactMismatchError (another model
    or other weights) and ModelStateError (training mode, offloaded).
    """
    check_model(model, "load an artifact onto")
    calibration = read(path)
    attach_calibration(model, calibration)
    return calibration
