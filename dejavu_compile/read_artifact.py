"""An artifact from its folder: what it says is checked part by part before a site is made of it, and all of it before it is attached."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from dejavu_compile.kernels.activations import REFERENCE
from dejavu_compile.kernels.nibbles import columns
from dejavu_compile.passes.site import Policy, SiteKind

from .artifact import (
    CONFIG,
    READABLE,
    TENSORS,
    Calibration,
    SiteRecord,
    WeightLayout,
    WeightRecord,
    attach_calibration,
    is_number,
)
from .batches import check_model
from .errors import ArtifactError
from .evaluate import Evaluation
from .predictors import Predictor, SiteMetrics, ThresholdCurve
from .sketches import PARTS, Sketch


def _from_json_float(value: float | None) -> float:
    return -math.inf if value is None else value


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


def _is_within(value: object, least: float, most: float = math.inf) -> bool:
    """Finite, and within these bounds."""
    return is_number(value) and math.isfinite(value) and least <= value <= most


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and _is_within(value, least)


def _is_curve(curve: Any) -> bool:
    densities, thresholds = curve["densities"], curve["thresholds"]
    return (
        isinstance(densities, list)
        and isinstance(thresholds, list)
        and len(densities) == len(thresholds) > 0
        and all(_is_within(density, 0, 1) for density in densities)
        and densities == sorted(set(densities))
        and all(t is None or _is_within(t, -math.inf) for t in thresholds)
    )


def _is_metrics(metrics: Any) -> bool:
    """None, or what was measured; recall and the like are for reading only."""
    return metrics is None or _is_within(metrics["density"], 0, 1)


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
        "density": (_is_within(config["density"], 0, 1), "a number from 0 to 1"),
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
