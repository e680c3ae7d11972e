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
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from dejavu_compile.kernels.activations import REFERENCE
from dejavu_compile.kernels.nibbles import columns
from dejavu_compile.passes.site import Policy, PredictorWeights, SiteKind, SketchWeights

from . import attachments
from .attachments import Attachment, InputWeight, fingerprint
from .batches import check_model
from .errors import ArtifactError, ArtifactMismatchError, OptionError
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
    for layout in (layout for site in calibration.sites for layout in site.layouts):
        attachments.make_unit_major(
            weights[layout.name], layout.contracted, produces_units=layout.produces_units
        )
    for weight, attachment in found:
        attachments.attach(weight, attachment)


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
    if found.dtype is not torch.float32 or not (found.isfinite() & (found >= 0)).all():
        raise ArtifactError(
            f"the sensitivity of {name} in {path} holds NaN, inf, negative values, or isn't in fp32",
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
    packed = shapes[1][1] if shapes[1] is not None and len(shapes[1]) == 2 else 0
    expected = [(units, 2 * packed), (units, packed), (5, units)]
    stored = all(t is not None and t.dtype is torch.uint8 for t in found[:2])
    if (
        shapes != expected
        or not packed
        or packed % 4
        or not stored
        or found[2].dtype is not torch.float32
    ):
        raise ArtifactError(
            f"{path} lacks the sketch of {name}, or has another", found=f"shapes {shapes}",
            expected=f"uint8 gate and up, fp32 numbers of {units} units: {expected}",
            fix="save or copy the artifact again",
        )  # fmt: skip
    if not found[2].isfinite().all() or not (found[2][4] >= 0).all():
        raise ArtifactError(
            f"the sketch of {name} in {path} holds NaN, inf or negative squares",
            fix="calibrate again",
        )
    return Sketch(*found, activation)


def _predictor_from(
    config: dict[str, Any], tensors: dict[str, torch.Tensor], path: Path
) -> Predictor | None:
    """The predictor of a site, where it has one."""
    name, units, rank = config["name"], config["units"], config["rank"]
    if not rank:
        return None
    parts: dict[str, torch.Tensor | None] = {"down": None}
    heads = SiteKind(config["kind"]) is SiteKind.ATTENTION
    for part in ("up", "bias", "scale") if heads else ("down", "up", "bias", "scale"):
        tensor = tensors.get(f"{name}.{part}")
        if tensor is None:
            raise ArtifactError(f"{path} lacks the predictor of {name}", expected=f"{name}.{part}")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ArtifactError(
                f"the predictor of {name} in {path} holds NaN or inf", fix="calibrate again"
            )
        parts[part] = tensor
    predictor = Predictor(**parts)
    matrices = (predictor.up,) if heads else (predictor.down, predictor.up)
    shapes = [(*m.shape[:-1], columns(m)) if m.dim() == 2 else tuple(m.shape) for m in matrices]
    width = shapes[0][-1] if shapes[0] else 0
    expected = [(units, width)] if heads else [(rank, width), (units, rank)]
    shapes += [tuple(t.shape) for t in (predictor.bias, predictor.scale)]
    if shapes != [*expected, (units,), (units,)] or not width or (heads and rank != units):
        raise ArtifactError(
            f"the predictor of {name} in {path} doesn't fit its site",
            found=f"shapes {shapes}",
            expected=f"shapes {[*expected, (units,), (units,)]}, of {units} units and rank {rank}",
            fix="save or copy the artifact again",
        )
    stored = {m.dtype for m in matrices}
    integers = set() if heads else {torch.int8, torch.uint8}
    known = all(dtype.is_floating_point or dtype in integers for dtype in stored)
    # Kernels read them through bare pointers.
    if (
        len(stored) > 1
        or not known
        or {predictor.bias.dtype, predictor.scale.dtype} != {torch.float32}
    ):
        raise ArtifactError(
            f"the predictor of {name} in {path} has dtypes that can't be used",
            found=", ".join(f"{part} {t.dtype}" for part, t in parts.items() if t is not None),
            expected="matrices of one dtype, floats or (of an MLP) int8 or packed uint8; bias and scale in fp32",
            fix="save or copy the artifact again",
        )
    if not (predictor.scale > 0).all():
        raise ArtifactError(
            f"the predictor of {name} in {path} has scales that aren't positive",
            fix="calibrate again",
        )
    return predictor


def _is_number(value: object, least: float, most: float = math.inf) -> bool:
    """Finite, and within these bounds."""
    return is_number(value) and math.isfinite(value) and least <= value <= most


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and _is_number(value, least)


def _is_curve(curve: Any) -> bool:
    densities, thresholds = curve["densities"], curve["thresholds"]
    return (
        isinstance(densities, list)
        and isinstance(thresholds, list)
        and len(densities) == len(thresholds) > 0
        and all(_is_number(density, 0, 1) for density in densities)
        and densities == sorted(set(densities))
        and all(t is None or _is_number(t, -math.inf) for t in thresholds)
    )


def _is_metrics(metrics: Any) -> bool:
    """None, or what was measured; recall and the like are for reading only."""
    return metrics is None or _is_number(metrics["density"], 0, 1)


def _is_layout(layout: dict[str, Any], name: str, inputs: list[dict[str, Any]]) -> bool:
    """Names a weight of the site, on its right side."""
    named = {known["name"] for known in inputs}
    return (
        _is_whole(layout["contracted"], 0)
        and layout["contracted"] <= 1
        and isinstance(layout["name"], str)
        and isinstance(layout["produces_units"], bool)
        # Which others there are isn't known of formats before 5.
        and (not named or layout["name"] in named if layout["produces_units"] else layout["name"] == name)
    )  # fmt: skip


def _refused(config: dict[str, Any], key: str, path: Path, expected: str) -> ArtifactError:
    return ArtifactError(
        f"{key} of {config['name']} in {path.parent / CONFIG} can't be used",
        found=repr(config.get(key)),
        expected=expected,
        fix="save or copy the artifact again, or calibrate again",
    )


def _check_site(config: dict[str, Any], before: list[str], path: Path) -> None:
    """Raise ArtifactError for values that can't be; KeyError for those that are missing. `before`: sites before it."""
    name, policy, kind = config["name"], Policy(config["policy"]), SiteKind(config["kind"])
    policies = tuple(Policy) if kind is SiteKind.MLP else (Policy.DENSE, Policy.PREDICT)
    predicts, inputs, layouts = policy is Policy.PREDICT, config.get("inputs", []), config["layouts"]  # fmt: skip
    sources = before if predicts else [None]
    checks = {
        "name": (isinstance(name, str) and name not in before, "the name of a weight, once"),
        "policy": (policy in policies, f"one of {', '.join(policies)} for a site of kind {kind}"),
        "layer": (_is_whole(config["layer"], -1), "the number of a layer"),
        "units": (_is_whole(config["units"], 1), "at least 1"),
        "num_weights": (_is_whole(config["num_weights"], 1), "at least 1"),
        "fingerprint": (isinstance(config["fingerprint"], str), "a digest"),
        "density": (_is_number(config["density"], 0, 1), "a number from 0 to 1"),
        "curve": (_is_curve(config["curve"]), "ascending densities, a finite threshold (or null) for each"),
        "metrics": (_is_metrics(config["metrics"]), "null, or a density from 0 to 1 and what was measured at it"),
        "lookahead": (_is_whole(config["lookahead"], 0), "a number of layers"),
        "rank": (_is_whole(config["rank"], 0) and (config["rank"] > 0) == predicts, "above 0 if the policy is predict, else 0"),
        "source": (config["source"] in sources, "the name of a site before it if the policy is predict, else null"),
        "sensitivity": (not config.get("sensitivity") or policy is Policy.GATE, "false unless the policy is gate"),
        "sketch": ((config.get("sketch") is not None) == (policy is Policy.SKETCH), "an activation if the policy is sketch, else null"),
        "inputs": (all(isinstance(w[key], str) for w in inputs for key in ("name", "fingerprint")), "names and fingerprints"),
        "layouts": (all(_is_layout(layout, name, inputs) for layout in layouts), "weights of the site, contracted 0 or 1"),
    }  # fmt: skip
    for key, (fine, expected) in checks.items():
        if not fine:
            raise _refused(config, key, path, expected)


def _site_from(
    config: dict[str, Any], tensors: dict[str, torch.Tensor], before: list[str], path: Path
) -> SiteRecord:
    """One site, checked: what it names is looked up when it is attached. `before`: names of the sites before it."""
    _check_site(config, before, path)
    curve = config["curve"]
    metrics = config["metrics"]
    return SiteRecord(
        kind=SiteKind(config["kind"]), name=config["name"], layer=config["layer"], units=config["units"],
        policy=Policy(config["policy"]), num_weights=config["num_weights"],
        fingerprint=config["fingerprint"], density=config["density"], source=config["source"],
        lookahead=config["lookahead"], predictor=_predictor_from(config, tensors, path),
        sensitivity=_sensitivity_from(config, tensors, path),
        sketch=_sketch_from(config, tensors, path),
        metrics=SiteMetrics(**metrics) if metrics is not None else None,
        layouts=tuple(WeightLayout(**layout) for layout in config["layouts"]),
        curve=ThresholdCurve(tuple(curve["densities"]),
                             tuple(_from_json_float(t) for t in curve["thresholds"])),
        inputs=tuple(WeightRecord(**known) for known in config.get("inputs", [])),
    )  # fmt: skip


def _sites_from(
    configs: Any, tensors: dict[str, torch.Tensor], path: Path
) -> tuple[SiteRecord, ...]:
    if not isinstance(configs, list):
        raise TypeError("list of sites")
    sites: list[SiteRecord] = []
    for config in configs:
        sites.append(_site_from(config, tensors, [site.name for site in sites], path))
    return tuple(sites)


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
        sites = _sites_from(config["sites"], tensors, folder / TENSORS)
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
    except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
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
