"""Sketches of gated MLPs: what is fitted, what runs because of them, and what an artifact keeps of them."""

import dataclasses

import pytest
import torch
from kernel_cases import sketch_oracle
from safetensors.torch import load_file, save_file
from tiny import text, texts, tiny

import dejavu_compile as dv
from dejavu_compile import sensitivity
from dejavu_compile.artifact import TENSORS
from dejavu_compile.sketches import Projections, fit_sketch
from dejavu_compile.workdir import Rows

UNITS, WIDTH, TOKENS = 48, 64, 2000


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(seed=0):
    """Correlated, some channels louder than others, not about zero."""
    mix = randn(WIDTH, WIDTH, seed=7) / 8 + torch.eye(WIDTH)
    return randn(TOKENS, WIDTH, seed=seed) * torch.linspace(0.2, 3, WIDTH) @ mix + 0.3


def projections(bias=True):
    gate, up = (randn(UNITS, WIDTH, seed=s) / 8 for s in (1, 2))
    biases = [randn(UNITS, seed=s) if bias else None for s in (3, 4)]
    return Projections(gate, up, *biases, "silu")


def exact(of, x):
    """|gate| and up in float64."""
    g, u = (
        x.double() @ w.double().T + (0 if b is None else b.double())
        for w, b in ((of.gate, of.gate_bias), (of.up, of.up_bias))
    )
    return (g * g.sigmoid()).abs(), u


@pytest.mark.parametrize("bias", [True, False])
def test_scores_say_what_units_add_to_tokens_that_were_not_seen(bias):
    of, norms = projections(bias), randn(UNITS, seed=5).abs() + 0.1
    sketch = fit_sketch(of, inputs(), None, norms)
    gate, up = exact(of, inputs(seed=9))
    added = gate * up.abs() * norms
    score = sketch.score(inputs(seed=9)).double()
    best, found = (v.flatten() > v.flatten().quantile(0.6) for v in (added, score))
    alone = gate * norms > (gate * norms).flatten().quantile(0.6)
    kept = [
        (added.flatten() * mask).sum() / added.sum() for mask in (best, found, alone.flatten())
    ]
    assert kept[1] > kept[2] + 0.5 * (kept[0] - kept[2])


def test_score_is_that_of_the_op_in_float64():
    sketch = fit_sketch(projections(), inputs(), None, torch.ones(UNITS))
    x = inputs(seed=9)[:50]
    want = sketch_oracle(x, sketch.gate, sketch.up, sketch.numbers)
    assert (sketch.score(x) - want).abs().max() <= 1e-5 * want.abs().max()


def test_what_the_sketch_misses_is_what_it_says():
    of, x = projections(), inputs()
    sketch = fit_sketch(of, x, None, torch.ones(UNITS))
    up_only = sketch.numbers.clone()
    up_only[0], up_only[1], up_only[4] = 0, 1, 0  # |identity(1)| * |up|
    guess = sketch_oracle(x, sketch.gate, sketch.up, up_only, "identity")
    gate, up = exact(of, x)
    missed = (gate**2 * (guess - up.abs()) ** 2).sum(0) / (gate**2).sum(0)
    # |guess| for guess: where signs differ, less
    assert (sketch.numbers[4] >= 0.99 * missed).all()
    assert (sketch.numbers[4] <= 0.3 * (gate**2 * up**2).sum(0) / (gate**2).sum(0)).all()


def test_errors_are_made_good_where_inputs_are_correlated():
    """Less than half of the squared error of rounding each weight by itself, with the same steps."""
    of, x = projections(bias=False), inputs()
    sketch = fit_sketch(of, x, None, torch.ones(UNITS))
    step = sketch.numbers[2][:, None]
    alone = ((of.up / step - 0.5).round() + 0.5).clamp(-1.5, 1.5) * step
    centred = (x - x.mean(0)).double()
    codes = codes_of(sketch) * step
    losses = [((of.up - w).double() @ centred.T).square().sum() for w in (codes, alone)]
    assert losses[0] < 0.6 * losses[1]


def codes_of(sketch):
    columns = torch.arange(WIDTH)
    byte = sketch.up.long()[:, columns % (WIDTH // 4)]
    return (byte // 4 ** (columns // (WIDTH // 4))) % 4 - 1.5


def test_weights_are_sensitivities_over_the_other_factors_rms():
    of, x, s = projections(), inputs(), randn(UNITS, seed=5).abs() + 0.1
    one = fit_sketch(of, x, None, torch.ones(UNITS))
    other = fit_sketch(of, x, s, torch.ones(UNITS))
    weight = s / exact(of, x)[1].square().mean(0).sqrt()
    assert torch.equal(other.up, one.up) and torch.equal(other.gate, one.gate)
    assert torch.allclose(other.numbers[2:4], (one.numbers[2:4] * weight).float(), rtol=1e-4)
    assert torch.allclose(other.numbers[4], (one.numbers[4] * weight**2).float(), rtol=1e-4)


def test_from_disk_it_is_the_same():
    x = inputs()
    rows = Rows([x[:700], x[700:]], torch.device("cpu"))
    one, two = (fit_sketch(projections(), v, None, torch.ones(UNITS)) for v in (x, rows))
    assert torch.equal(one.numbers, two.numbers) and torch.equal(one.up, two.up)


def test_dead_inputs_and_rows_do_no_harm():
    of, x = projections(bias=False), inputs()
    x[:, 3] = 0
    dead = dataclasses.replace(of, up=of.up.clone(), gate=of.gate.clone())
    dead.up[5], dead.gate[6] = 0, 0
    sketch = fit_sketch(dead, x, torch.ones(UNITS), torch.ones(UNITS))
    score = sketch.score(x)
    assert score.isfinite().all()
    assert score[:, 6].max() < 1e-3 * score.max()


# --- on models -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sketched():
    model = tiny("llama")
    return model, dv.calibrate(model, texts(), density=0.5, progress=False)


def masked(model):
    options = {"dejavu.execution": "masked"}
    return torch.compile(model.forward, backend="dejavu_eager", options=options)


@pytest.mark.parametrize("attached", ["fitted", "loaded"])
@torch.no_grad()
def test_units_run_by_the_sketch(sketched, tmp_path, attached):
    """Against hooks on the eager model, scores in float64."""
    model, calibration = sketched
    assert {str(site.policy) for site in calibration.sites} == {"sketch"}
    assert len({site.threshold for site in calibration.sites}) == 1
    if attached == "loaded":
        calibration.save_pretrained(tmp_path)
        model = tiny("llama")
        calibration = dv.load(model, tmp_path)
    else:
        calibration.attach(model)
    ids = text(9, batch=1, length=12)
    got = masked(model)(ids).logits
    handles, ran = [], []
    for layer, site in zip(model.model.layers, calibration.sites, strict=True):
        seen = {}

        def see(module, args, seen=seen):
            seen["x"] = args[0].flatten(0, -2)

        def keep(module, args, site=site, seen=seen):
            sketch = site.sketch
            score = sketch_oracle(seen["x"], sketch.gate, sketch.up, sketch.numbers)
            runs = (score > site.threshold).view_as(args[0])
            ran.append(runs.float().mean().item())
            return (args[0] * runs,)

        handles.append(layer.mlp.gate_proj.register_forward_pre_hook(see))
        handles.append(layer.mlp.down_proj.register_forward_pre_hook(keep))
    want = model(ids).logits
    for handle in handles:
        handle.remove()
    assert 0.3 < sum(ran) / len(ran) < 0.7
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@torch.no_grad()
def test_a_decode_step_runs_what_masked_execution_keeps(sketched):
    model, calibration = sketched
    calibration.attach(model)
    ids = text(9, batch=1, length=1)
    want = masked(model)(ids, use_cache=False).logits
    torch.compiler.reset()
    got = torch.compile(model.forward, backend="dejavu_eager")(ids, use_cache=False).logits
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    report = dv.explain(model, ids)
    mlps = [site for site in report.sites if site.kind == "mlp"]
    assert {site.policy for site in mlps} == {"sketch"}
    # 6 bits a pair of weights, 5 numbers a unit, and half of three matrices
    units, width = 256, mlps[0].bytes_dense // (3 * 256 * 4)
    density = calibration.sites[0].metrics.density
    read = units * width * 6 // 8 + 5 * units * 4 + density * mlps[0].bytes_dense
    assert mlps[0].bytes_sparse == pytest.approx(read, rel=1e-3)


def test_auto_gives_each_sketch_a_density_within_the_budget():
    model = tiny("llama", layers=3)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e-4)
    found = dv.calibrate(model, texts(4), max_ppl_increase=0.002, progress=False)
    mlps = [site for site in found.sites if site.kind == "mlp"]
    assert str(mlps[1].policy) == "sketch"
    assert mlps[1].density < min(mlps[0].density, mlps[2].density)
    assert found.quality.perplexity_increase_at_most <= 0.002


def test_without_gradients_units_weigh_what_they_add(monkeypatch, caplog):
    def refuse(*_, **__):
        raise RuntimeError("derivative for aten::_int_mm is not implemented")

    monkeypatch.setattr(sensitivity._Gates, "gradients", refuse)
    model = tiny("llama")
    found = dv.calibrate(model, texts(), density=0.5, progress=False)
    assert "aten::_int_mm" in caplog.text
    assert len({site.threshold for site in found.sites}) == len(found.sites)
    assert found.density == pytest.approx(0.5, abs=0.05)


def test_what_has_no_gated_pair_has_no_sketch():
    found = dv.calibrate(tiny("gpt2"), texts(), policy="sketch", density=0.5, progress=False)
    assert {str(site.policy) for site in found.sites} == {"dense"}


@pytest.mark.parametrize("part", ["gate", "up", "numbers"])
def test_a_missing_part_is_refused(sketched, tmp_path, part):
    sketched[1].save_pretrained(tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    name = sketched[1].sites[0].name
    del tensors[f"{name}.sketch.{part}"]
    save_file(tensors, tmp_path / TENSORS)
    with pytest.raises(dv.ArtifactError, match=f"lacks the sketch of {name}"):
        dv.load(tiny("llama"), tmp_path)


def test_useless_numbers_are_refused(sketched, tmp_path):
    sketched[1].save_pretrained(tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    name = sketched[1].sites[0].name
    tensors[f"{name}.sketch.numbers"][2, 3] = float("nan")
    save_file(tensors, tmp_path / TENSORS)
    with pytest.raises(dv.ArtifactError, match=f"sketch of {name} .* NaN"):
        dv.load(tiny("llama"), tmp_path)
