import dataclasses
import importlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import text, texts, tiny

import dejavu_compile as dv
from dejavu_compile import attachments
from dejavu_compile.artifact import CONFIG, TENSORS

UNITS = 256


@pytest.fixture(scope="module")
def calibrated():
    """A calibrated OPT of three layers: the first exact, the others predicted."""
    model = tiny("opt", layers=3)
    return model, dv.calibrate(model, texts(), density=0.5, progress=False)


@pytest.fixture
def folder(calibrated, tmp_path):
    calibrated[1].save_pretrained(tmp_path / "artifact")
    return tmp_path / "artifact"


def fresh(**changes):
    return tiny("opt", layers=3, **changes)


def attached_to(model):
    return {
        name: found
        for name, p in model.named_parameters()
        if (found := attachments.attached(p)) is not None
    }


def edit(folder, change):
    path = folder / CONFIG
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def assert_refused(model, folder, error, *words):
    with pytest.raises(error) as caught:
        dv.load(model, folder)
    assert type(caught.value) is error
    for word in words:
        assert word in str(caught.value)
    assert attached_to(model) == {}


def test_round_trip_attaches_the_same(calibrated, folder):
    model, calibration = calibrated
    other = fresh()
    loaded = dv.load(other, folder)
    assert loaded.to_dict() == calibration.to_dict()
    assert str(loaded) == str(calibration)
    first, second = attached_to(model), attached_to(other)
    assert [a.policy for a in first.values()] == ["exact", "predict", "predict"]
    assert first.keys() == second.keys()
    parameters = {id(p): name for m in (model, other) for name, p in m.named_parameters()}
    for name, a in first.items():
        b = second[name]
        for field in ("policy", "density", "fingerprint", "threshold", "lookahead"):
            assert getattr(a, field) == getattr(b, field)
        if a.predictor is None:
            assert b.predictor is None
            continue
        for part in ("down", "up", "bias"):
            assert torch.equal(getattr(a.predictor, part), getattr(b.predictor, part))
        assert parameters[id(a.source())] == parameters[id(b.source())]
        assert b.source() in set(other.parameters())


def test_folder_holds_json_and_safetensors_and_no_pickle(folder):
    assert {path.name for path in folder.iterdir()} == {CONFIG, TENSORS}
    json.loads((folder / CONFIG).read_text())
    assert load_file(folder / TENSORS)
    for path in folder.iterdir():
        content = path.read_bytes()
        assert not content.startswith((b"\x80", b"PK"))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated_tensors_are_refused(folder, share):
    content = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(content[: int(len(content) * share)])
    assert_refused(fresh(), folder, dv.ArtifactError, TENSORS)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_truncated_json_is_refused(folder, share):
    content = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(content[: int(len(content) * share)])
    assert_refused(fresh(), folder, dv.ArtifactError, CONFIG)


@pytest.mark.parametrize("file", [CONFIG, TENSORS])
def test_missing_file_is_refused_by_name(folder, file):
    (folder / file).unlink()
    assert_refused(fresh(), folder, dv.ArtifactError, file)


@pytest.fixture(scope="module")
def calibrated_in_int8():
    """As version 2 had it."""
    with pytest.MonkeyPatch.context() as patch:
        # the function `calibrate` of the package hides the module
        patch.setattr(importlib.import_module("dejavu_compile.calibrate"), "LEAST_BITS", 8)
        return dv.calibrate(fresh(), texts(), density=0.5, progress=False)


def test_predictors_are_in_four_bits_and_version_2_had_them_in_eight(
    calibrated, calibrated_in_int8, tmp_path
):
    ids, logits, ranks = text(3, batch=1, length=1), {}, {}
    for number, calibration in ((3, calibrated[1]), (2, calibrated_in_int8)):
        folder, model = tmp_path / str(number), fresh()
        calibration.save_pretrained(folder)
        edit(folder, lambda config, number=number: config.update(format_version=number))
        loaded = dv.load(model, folder)
        assert loaded.to_dict() == calibration.to_dict()
        predictors = [a.predictor for a in attached_to(model).values() if a.predictor is not None]
        assert {p.down.dtype for p in predictors} == {torch.uint8 if number == 3 else torch.int8}
        assert {p.source_width for p in predictors} == {model.config.hidden_size}
        ranks[number] = {p.down.shape[0] for p in predictors}
        model.compile(backend="dejavu_eager")
        with torch.no_grad():
            logits[number] = model(ids, use_cache=False).logits
    assert (ranks[3], ranks[2]) == ({32}, {16})
    assert not torch.equal(logits[3], logits[2])


@pytest.mark.parametrize("version", [1, 99, 0, None, "1"])
def test_other_format_version_is_refused(folder, version):
    edit(folder, lambda config: config.update(format_version=version))
    assert_refused(fresh(), folder, dv.ArtifactError, f"format version {version}")


@pytest.mark.parametrize("key", ["sites", "quality", "seed", "model_class", "data_hash"])
def test_missing_key_is_refused_by_name(folder, key):
    edit(folder, lambda config: config.pop(key))
    assert_refused(fresh(), folder, dv.ArtifactError, key)


@pytest.mark.parametrize("key", ["units", "rank", "curve", "layouts", "policy", "source"])
def test_missing_key_of_a_site_is_refused_by_name(folder, key):
    edit(folder, lambda config: config["sites"][1].pop(key))
    assert_refused(fresh(), folder, dv.ArtifactError, key)


def test_unknown_policy_in_the_file_is_refused(folder):
    edit(folder, lambda config: config["sites"][1].update(policy="magic"))
    assert_refused(fresh(), folder, dv.ArtifactError, "magic")


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("part", ["bias", "scale"])
def test_nan_in_a_predictor_is_refused(folder, part, value):
    tensors = load_file(folder / TENSORS)
    name = next(name for name in tensors if name.endswith(f".{part}"))
    tensors[name][3] = value
    save_file(tensors, folder / TENSORS)
    assert_refused(fresh(), folder, dv.ArtifactError, "NaN", name.removesuffix(f".{part}"))


def test_missing_predictor_is_refused(folder):
    tensors = load_file(folder / TENSORS)
    name = next(name for name in tensors if name.endswith(".up"))
    del tensors[name]
    save_file(tensors, folder / TENSORS)
    assert_refused(fresh(), folder, dv.ArtifactError, name)


def test_model_without_the_weight_is_refused(folder):
    assert_refused(tiny("llama"), folder, dv.ArtifactMismatchError, "LlamaForCausalLM", "fc2")


def test_model_with_fewer_layers_is_refused(folder):
    assert_refused(tiny("opt", layers=2), folder, dv.ArtifactMismatchError, "layers.2")


def test_model_of_another_width_is_refused(folder):
    assert_refused(fresh(units=320), folder, dv.ArtifactMismatchError, "256 units", "320")


def test_weights_changed_before_loading_are_refused(folder):
    model = fresh()
    with torch.no_grad():
        model.model.decoder.layers[1].fc2.weight.mul_(1.01)
    assert_refused(model, folder, dv.ArtifactMismatchError, "fingerprint", "layers.1.fc2.weight")


def test_training_mode_is_refused(folder):
    assert_refused(fresh().train(), folder, dv.ModelStateError, "eval")


def test_weights_changed_after_loading_fail_at_compile_time(folder):
    model = fresh()
    dv.load(model, folder)
    with torch.no_grad():
        model.model.decoder.layers[1].fc2.weight.mul_(1.01)
        model.compile(backend="dejavu_eager")
        with pytest.raises(Exception, match=r"layers\.1\.fc2\.weight changed after calibration"):
            model(torch.tensor([[5]]), use_cache=False)


def test_detach_restores_the_dense_logits(folder):
    model = fresh()
    dv.load(model, folder)
    ids = text(3, batch=1, length=1)
    with torch.no_grad():
        dense = model.forward(ids, use_cache=False).logits
        model.compile(backend="dejavu_eager")
        sparse = model(ids, use_cache=False).logits
        assert (sparse - dense).abs().max() > 1e-4 * dense.abs().max()
        assert dv.detach(model) == 3
        assert attached_to(model) == {}
        again = model(ids, use_cache=False).logits
        assert (again - dense).abs().max() <= 1e-5 * dense.abs().max()
        assert dv.detach(model) == 0


def test_two_models_in_one_process_are_independent(folder):
    one, two = fresh(), fresh()
    dv.load(one, folder)
    assert attached_to(two) == {}
    ids = text(3, batch=1, length=1)
    with torch.no_grad():
        dense = two.forward(ids, use_cache=False).logits
        one.compile(backend="dejavu_eager")
        two.compile(backend="dejavu_eager")
        sparse = one(ids, use_cache=False).logits
        lossless = two(ids, use_cache=False).logits
    assert (lossless - dense).abs().max() <= 1e-5 * dense.abs().max()
    assert (sparse - dense).abs().max() > 1e-4 * dense.abs().max()


def test_other_density_moves_thresholds_only(calibrated):
    _, calibration = calibrated
    lower = calibration.at_density(0.2)
    for before, after in zip(calibration.sites, lower.sites, strict=True):
        if before.policy == "predict":
            assert after.threshold > before.threshold
            assert after.predictor is before.predictor
        else:
            assert after is before
    assert dataclasses.replace(lower, sites=(), quality=None) is not None


@pytest.fixture(scope="module")
def gated():
    """A calibrated Llama, by gates."""
    model = tiny("llama")
    return model, dv.calibrate(model, texts(), policy="gate", density=0.5, progress=False)


@pytest.mark.parametrize("attached", ["fitted", "loaded"])
@torch.no_grad()
def test_gates_run_by_magnitude_times_sensitivity(gated, tmp_path, attached):
    model, calibration = gated
    assert len({site.threshold for site in calibration.sites}) == 1
    if attached == "loaded":
        calibration.save_pretrained(tmp_path)
        model = tiny("llama")
        calibration = dv.load(model, tmp_path)
    else:
        calibration.attach(model)
    ids = text(9, batch=1, length=12)
    got = torch.compile(model.forward, backend="dejavu_eager", options={"dejavu.execution": "masked"})(ids).logits  # fmt: skip
    handles, ran = [], []
    for layer, site in zip(model.model.layers, calibration.sites, strict=True):

        def keep(module, args, out, site=site):
            runs = out.abs() * site.sensitivity > site.threshold
            ran.append(runs.float().mean().item())
            return out * runs

        handles.append(layer.mlp.act_fn.register_forward_hook(keep))
    want = model(ids).logits
    for handle in handles:
        handle.remove()
    assert 0.3 < sum(ran) / len(ran) < 0.7
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("value", [float("nan"), -1.0], ids=["nan", "negative"])
def test_a_useless_sensitivity_is_refused(gated, tmp_path, value):
    gated[1].save_pretrained(tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    name = gated[1].sites[0].name
    tensors[f"{name}.sensitivity"][3] = value
    save_file(tensors, tmp_path / TENSORS)
    assert_refused(tiny("llama"), tmp_path, dv.ArtifactError, name, "sensitivity")


def test_a_missing_sensitivity_is_refused(gated, tmp_path):
    gated[1].save_pretrained(tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    name = gated[1].sites[0].name
    del tensors[f"{name}.sensitivity"]
    save_file(tensors, tmp_path / TENSORS)
    assert_refused(tiny("llama"), tmp_path, dv.ArtifactError, name, "sensitivity", "256 units")


@pytest.mark.parametrize("version", [2, 3, 4])
def test_an_artifact_of_a_format_before_loads_and_knows_no_other_weights(folder, version):
    def before(config):
        config["format_version"] = version
        for site in config["sites"]:
            del site["inputs"]
            for key in ["sensitivity", "sketch"][version - 2 :]:
                del site[key]

    edit(folder, before)
    model = fresh()
    with torch.no_grad():
        model.model.decoder.layers[1].fc1.weight.mul_(1.01)
    assert len(dv.load(model, folder).sites) == 3
    assert not any(attachment.inputs for attachment in attached_to(model).values())


# --- the site's other weights ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fc1.weight", "fc1.bias"])
def test_other_weights_of_a_site_are_checked_when_it_is_loaded(folder, name):
    model = fresh()
    with torch.no_grad():
        model.get_parameter(f"model.decoder.layers.1.{name}").add_(0.01)
    assert_refused(
        model, folder, dv.ArtifactMismatchError, f"layers.1.{name}", "found", "expected", "fix"
    )


def test_other_weights_changed_after_loading_fail_at_compile_time(folder):
    model = fresh()
    dv.load(model, folder)
    with torch.no_grad():
        model.model.decoder.layers[1].fc1.weight.mul_(-1)
        model.compile(backend="dejavu_eager")
        with pytest.raises(Exception, match=r"layers\.1\.fc1\.weight changed after calibration"):
            model(torch.tensor([[5]]), use_cache=False)


@pytest.mark.parametrize("calibrated_first", [True, False])
@torch.no_grad()
def test_a_model_that_shares_output_weights_runs_as_itself(folder, prepared, calibrated_first):
    model, other = fresh(), fresh()
    layers = zip(model.model.decoder.layers, other.model.decoder.layers, strict=True)
    for mine, theirs in layers:
        theirs.fc1.weight.mul_(-1.3)
        theirs.fc2.weight = mine.fc2.weight
    dv.load(model, folder)
    ids = text(3, batch=1, length=1)
    for each in (model, other):
        each.compile(backend="dejavu_eager")
    order = (model, other) if calibrated_first else (other, model)
    found = {each: each(ids, use_cache=False).logits for each in order * 2}
    dense = {each: each.forward(ids, use_cache=False).logits for each in order}
    assert (found[other] - dense[other]).abs().max() <= 1e-5 * dense[other].abs().max()
    assert (found[model] - dense[model]).abs().max() > 1e-4 * dense[model].abs().max()
    plans = [s for p in prepared if not p.plan.num_sparse for s in p.plan.sites]
    reasons = {s.reason for s in plans if s.site.kind == "mlp"}
    assert len(reasons) == 3
    assert all("fc1.weight" in reason and "dv.calibrate" in reason for reason in reasons)


@pytest.mark.parametrize(
    ("name", "policy", "expected"),
    [
        ("gpt2", "dense", {"c_fc.weight", "c_fc.bias"}),
        ("llama", "gate", {"gate_proj.weight", "up_proj.weight"}),
        ("phi3", "gate", {"gate_up_proj.weight"}),
    ],
)
def test_every_weight_between_input_and_units_is_known_once(name, policy, expected):
    model = tiny(name)
    calibration = dv.calibrate(model, texts(), policy=policy, density=0.5, progress=False)
    assert len(calibration.sites) == 2
    for site in calibration.sites:
        names = [known.name.split("mlp.")[-1] for known in site.inputs]
        assert sorted(names) == sorted(expected)
        assert len({known.name for known in site.inputs}) == len(expected)
        attached = attachments.attached(model.get_parameter(site.name))
        weights = [known.weight() for known in attached.inputs]
        assert all(w is model.get_parameter(k.name) for w, k in zip(weights, site.inputs, strict=True))  # fmt: skip


def narrower(predictor):
    """A predictor of fewer units than its site has."""
    return dataclasses.replace(
        predictor, up=predictor.up[:64], bias=predictor.bias[:64], scale=predictor.scale[:64]
    )


@torch.no_grad()
def test_what_selects_other_units_than_a_site_has_never_runs(calibrated, prepared):
    model = fresh()
    sites = [
        site if site.predictor is None else dataclasses.replace(site, predictor=narrower(site.predictor))
        for site in calibrated[1].sites
    ]  # fmt: skip
    calibrated[1].with_sites(sites).attach(model)
    model.compile(backend="dejavu_eager")
    model(text(3, batch=1, length=1), use_cache=False)
    mlps = [plan for plan in prepared[0].plan.sites if plan.site.kind == "mlp"]
    reasons = [plan.reason for plan in mlps if plan.decision.policy == "dense"]
    assert len(reasons) == 2
    assert all("256 units here" in reason and "64" in reason for reason in reasons)
