"""What an artifact says is checked before a site is made of it, and all of it before anything is attached."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import texts, tiny

import dejavu_compile as dv
from dejavu_compile import attachments
from dejavu_compile.artifact import CONFIG, TENSORS
from dejavu_compile.kernels.select import select_cpu


def fresh():
    return tiny("opt", layers=3)


@pytest.fixture(scope="module")
def with_heads():
    """OPT: MLPs and heads, all but the first of each predicted."""
    return dv.calibrate(
        fresh(), texts(), policy="predict", density=0.5, head_density=0.8, progress=False
    )


@pytest.fixture(scope="module")
def sketched():
    """Llama, by sketches."""
    return dv.calibrate(tiny("llama"), texts(), policy="sketch", density=0.5, progress=False)


MLP = "model.decoder.layers.1.fc2.weight"
HEADS = "model.decoder.layers.1.self_attn.out_proj.weight"
SKETCH = "model.layers.1.mlp.down_proj.weight"


def site_of(config, name):
    return next(site for site in config["sites"] if site["name"] == name)


def tensor(part, change, name=MLP):
    """Corrupts one tensor."""

    def corrupt(config, tensors):
        tensors[f"{name}.{part}"] = change(tensors[f"{name}.{part}"]).contiguous()

    return corrupt


def value(key, new, name=MLP):
    """Corrupts one value of a site, given or made of the old one."""

    def corrupt(config, tensors):
        site = site_of(config, name)
        site[key] = new(site[key]) if callable(new) else new

    return corrupt


def layout(key, new, name=MLP):
    """Corrupts every layout of a site."""

    def corrupt(config, tensors):
        for one in site_of(config, name)["layouts"]:
            one[key] = new(one[key]) if callable(new) else new

    return corrupt


def all_rows(count, *parts, name=MLP):
    """Another number of rows for all of a predictor, which then fits itself."""

    def corrupt(config, tensors):
        for part in parts:
            tensors[f"{name}.{part}"] = torch.cat([tensors[f"{name}.{part}"]] * 2)[:count]

    return corrupt


def of_other_units(config, tensors):
    """A predictor of as many units as the output weight has rows, not columns."""
    all_rows(128, "up", "bias", "scale")(config, tensors)
    site_of(config, MLP)["units"] = 128


def without_known_weights(then):
    """As before format 5."""

    def corrupt(config, tensors):
        for site in config["sites"]:
            del site["inputs"]
        then(config, tensors)

    return corrupt


def twice(config, tensors):
    config["sites"] *= 2


CORRUPTIONS = {
    "up-more-rows": (tensor("up", lambda t: torch.cat([t, t])), "predictor"),
    "up-fewer-rows": (tensor("up", lambda t: t[:100]), "predictor"),
    "up-narrower": (tensor("up", lambda t: t[:, :8]), "predictor"),
    "up-1d": (tensor("up", torch.flatten), "predictor"),
    "up-0d": (tensor("up", lambda t: t[0, 0]), "predictor"),
    "all-more-rows": (all_rows(512, "up", "bias", "scale"), "predictor"),
    "down-fewer-rows": (tensor("down", lambda t: t[:4]), "predictor"),
    "down-1d": (tensor("down", torch.flatten), "predictor"),
    "down-int32": (tensor("down", torch.Tensor.int), "dtypes"),
    "bias-short": (tensor("bias", lambda t: t[:10]), "predictor"),
    "bias-2d": (tensor("bias", lambda t: t[None]), "predictor"),
    "bias-fp64": (tensor("bias", torch.Tensor.double), "fp32"),
    "bias-ints": (tensor("bias", torch.Tensor.int), "dtypes"),
    "scale-short": (tensor("scale", lambda t: t[:10]), "predictor"),
    "scale-negative": (tensor("scale", torch.neg), "positive"),
    "heads-up-more-rows": (tensor("up", lambda t: torch.cat([t, t]), HEADS), "predictor"),
    "heads-up-1d": (tensor("up", torch.flatten, HEADS), "predictor"),
    "heads-up-int8": (tensor("up", lambda t: t.to(torch.int8), HEADS), "dtypes"),
    "heads-all-more-rows": (all_rows(8, "up", "bias", "scale", name=HEADS), "predictor"),
    "rank-other": (value("rank", lambda rank: rank + 3), "rank"),
    "rank-0": (value("rank", 0), "rank"),
    "rank-negative": (value("rank", -1), "rank"),
    "source-unknown": (value("source", "nope"), "source"),
    "source-none": (value("source", None), "source"),
    "source-itself": (value("source", MLP), "source"),
    "source-later": (value("source", MLP.replace("1", "2")), "source"),
    "lookahead-negative": (value("lookahead", -3), "lookahead"),
    "units-double": (value("units", 512), "predictor"),
    "units-0": (value("units", 0), "units"),
    "units-of-the-rows": (of_other_units, "fit"),
    "heads-units-1": (value("units", 1, HEADS), "predictor"),
    "density-nan": (value("density", float("nan")), "density"),
    "density-negative": (value("density", -1), "density"),
    "density-7": (value("density", 7.0), "density"),
    "density-string": (value("density", "0.5"), "density"),
    "density-true": (value("density", True), "density"),
    "metrics-nan": (value("metrics", lambda m: {**m, "density": float("nan")}), "metrics"),
    "curve-empty": (value("curve", {"densities": [], "thresholds": []}), "curve"),
    "curve-uneven": (value("curve", lambda c: {**c, "thresholds": c["thresholds"][:1]}), "curve"),
    "curve-falling": (value("curve", lambda c: {**c, "densities": c["densities"][::-1]}), "curve"),
    "threshold-nan": (value("curve", {"densities": [0.5], "thresholds": [float("nan")]}), "curve"),
    "threshold-inf": (value("curve", {"densities": [0.5], "thresholds": [float("inf")]}), "curve"),
    "policy-gate": (value("policy", "gate"), "rank"),
    "policy-sketch": (value("policy", "sketch"), "rank"),
    "heads-gate": (value("policy", "gate", HEADS), "policy"),
    "heads-exact": (value("policy", "exact", HEADS), "policy"),
    "heads-sketch": (value("policy", "sketch", HEADS), "policy"),
    "kind-swapped": (value("kind", "attention"), "predictor"),
    "heads-kind-swapped": (value("kind", "mlp", HEADS), "lacks"),
    "kind-unknown": (value("kind", "magic"), "magic"),
    "twice": (twice, "name"),
    "sites-dict": (lambda config, tensors: config.update(sites={}), "sites"),
    "sites-null": (lambda config, tensors: config.update(sites=None), "sites"),
    "site-null": (lambda config, tensors: config.update(sites=[None]), "incomplete"),
    "layout-unknown": (layout("name", "nope"), "layouts"),
    "layout-unknown-before": (without_known_weights(layout("name", "nope")), "layouts"),
    "layout-of-an-embedding": (layout("name", "model.decoder.embed_tokens.weight"), "layouts"),
    "layout-contracted-5": (layout("contracted", 5), "layouts"),
    "layout-contracted-float": (layout("contracted", 1.0), "layouts"),
    "layout-contracted-other": (layout("contracted", 0), "fit"),
    "layout-swapped": (layout("produces_units", lambda old: not old), "layouts"),
    "layout-of-a-vector": (
        lambda config, tensors: site_of(config, MLP)["layouts"][0].update(name=MLP.replace("fc2.weight", "fc1.bias")),
        "fc1.bias",
    ),
    "inputs-incomplete": (value("inputs", [{"name": "nope"}]), "fingerprint"),
    "inputs-unknown": (
        lambda config, tensors: site_of(config, MLP)["inputs"].append({"name": "nope", "fingerprint": ""}),
        "no weight nope",
    ),
}  # fmt: skip

SKETCH_CORRUPTIONS = {
    "gate-fewer-rows": tensor("sketch.gate", lambda t: t[:9], SKETCH),
    "up-narrower": tensor("sketch.up", lambda t: t[:, :8], SKETCH),
    "up-1d": tensor("sketch.up", torch.flatten, SKETCH),
    "numbers-fp16": tensor("sketch.numbers", torch.Tensor.half, SKETCH),
    "numbers-ints": tensor("sketch.numbers", torch.Tensor.int, SKETCH),
    "activation": value("sketch", "magic", SKETCH),
    "none": value("sketch", None, SKETCH),
    "policy-gate": value("policy", "gate", SKETCH),
    "policy-predict": value("policy", "predict", SKETCH),
    "kind": value("kind", "attention", SKETCH),
    "sensitivity": value("sensitivity", True, SKETCH),
}


def assert_corrupted_is_refused(calibration, corrupt, model, folder, *words):
    calibration.save_pretrained(folder)
    tensors = load_file(folder / TENSORS)
    config = json.loads((folder / CONFIG).read_text())
    corrupt(config, tensors)
    (folder / CONFIG).write_text(json.dumps(config))
    save_file(tensors, folder / TENSORS)
    strides = [p.stride() for p in model.parameters()]
    with pytest.raises(dv.ArtifactError) as caught:
        dv.load(model, folder)
    for word in words:
        assert word in str(caught.value)
    assert not any(map(attachments.attached, model.parameters()))
    assert [p.stride() for p in model.parameters()] == strides


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_contents_that_cannot_be_are_refused(with_heads, tmp_path, name):
    corrupt, word = CORRUPTIONS[name]
    assert_corrupted_is_refused(with_heads, corrupt, fresh(), tmp_path, word)


@pytest.mark.parametrize("name", SKETCH_CORRUPTIONS)
def test_sketches_that_cannot_be_are_refused(sketched, tmp_path, name):
    assert_corrupted_is_refused(
        sketched, SKETCH_CORRUPTIONS[name], tiny("llama"), tmp_path, SKETCH
    )


def test_uncorrupted_contents_load(with_heads, sketched, tmp_path):
    for name, calibration, model in (
        ("opt", with_heads, fresh()),
        ("llama", sketched, tiny("llama")),
    ):
        calibration.save_pretrained(tmp_path / name)
        assert dv.load(model, tmp_path / name).to_dict() == calibration.to_dict()
        found = [p for p in model.parameters() if attachments.attached(p) is not None]
        assert len(found) == len(calibration.sites)


@pytest.mark.parametrize("wrong", ["down", "up", "bias", "source", "1d"])
def test_the_cpu_kernel_reads_nothing_out_of_bounds(wrong):
    parts = {
        "source": torch.randn(1, 64), "down": torch.randn(16, 64), "up": torch.randn(96, 16), "bias": torch.randn(96),
    }  # fmt: skip
    index, count = select_cpu(**parts)
    assert len(index) == 96
    assert 0 < count < 96
    if wrong == "1d":
        parts["up"] = parts["up"].flatten()
    else:
        parts[wrong] = parts[wrong][..., :8]
    with pytest.raises((ValueError, RuntimeError)):
        select_cpu(**parts)


def test_weights_of_heads_are_known(with_heads):
    heads = [site for site in with_heads.sites if site.kind == "attention"]
    assert len(heads) == 3
    for site in heads:
        names = {known.name.split("self_attn.")[-1] for known in site.inputs}
        assert names == {f"{p}_proj.{part}" for p in "qkv" for part in ("weight", "bias")}
