"""Heads: calibrated, kept, evaluated, compiled and run, from the public functions only."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from heads_oracle import HeadsByHooks, attention_sites, heads_only
from tiny import selecting_everything, text, texts, tiny
from transformers import StaticCache

import dejavu_compile as dv
from dejavu_compile import plan
from dejavu_compile.passes.site import Execution, SiteKind

LAYERS = 3


@pytest.fixture(scope="module", params=["opt", "llama"])
def calibrated(request):
    """Half of the heads, MLPs as their own policy wants them."""
    model = tiny(request.param, layers=LAYERS)
    return model, dv.calibrate(model, texts(), head_density=0.5, progress=False)


def test_layer_0_is_dense_and_the_others_read_a_layer_earlier(calibrated):
    _, calibration = calibrated
    sites = attention_sites(calibration)
    assert [s.layer for s in sites] == list(range(LAYERS))
    assert [s.policy for s in sites] == ["dense", "predict", "predict"]
    assert [s.source for s in sites] == [None, sites[0].name, sites[1].name]
    assert [s.lookahead for s in sites] == [0, 1, 1]
    assert all(s.units == 4 for s in sites)
    predicted = [s.metrics.density for s in sites if s.predictor is not None]
    assert sum(predicted) / len(predicted) == pytest.approx(0.5, abs=0.1)
    assert calibration.head_density == pytest.approx((1 + 2 * 0.5) / LAYERS, abs=0.1)


def test_predictor_is_one_matrix_within_its_budget(calibrated):
    model, calibration = calibrated
    for site in attention_sites(calibration)[1:]:
        assert site.predictor.down is None
        assert site.predictor.up.shape == (4, model.config.hidden_size)
        assert site.predictor_share <= 0.05


@torch.no_grad()
def test_masked_evaluation_equals_zeroing_heads_by_hooks(calibrated):
    model, calibration = calibrated
    ids = text(11)

    def perplexity():
        logits = model.forward(ids, use_cache=False).logits[:, :-1].double()
        return math.exp(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item())

    dense = perplexity()
    with HeadsByHooks(model, calibration) as oracle:
        expected = perplexity()
    dv.detach(model)
    heads_only(calibration).attach(model)
    found = dv.evaluate(model, [ids])
    calibration.attach(model)
    assert 0.2 < oracle.density < 0.8
    assert found.perplexity_dense == pytest.approx(dense, rel=1e-5)
    assert found.perplexity_sparse == pytest.approx(expected, rel=2e-5)
    assert abs(expected / dense - 1) > 1e-4, "the oracle must tell sparse from dense"


@torch.no_grad()
def test_saved_and_loaded_is_the_same(calibrated, tmp_path):
    model, calibration = calibrated
    calibration.save_pretrained(tmp_path)
    name = "opt" if "OPT" in type(model).__name__ else "llama"
    other = tiny(name, layers=LAYERS)
    loaded = dv.load(other, tmp_path)
    assert loaded.to_dict() == calibration.to_dict()
    for a, b in zip(attention_sites(calibration), attention_sites(loaded), strict=True):
        assert (a.predictor is None) == (b.predictor is None)
        if a.predictor is not None:
            assert b.predictor.down is None
            assert torch.equal(a.predictor.up, b.predictor.up)


def decode(model, forward, batch, steps=6, length=32):
    """Logits of some decode steps over a static cache."""
    cache = StaticCache(config=model.config, max_cache_len=length)
    model.forward(text(0, batch, 8), past_key_values=cache)
    logits = []
    for step in range(steps):
        at = {}
        if "OPT" in type(model).__name__:
            mask = (torch.arange(length) <= 8 + step).expand(batch, 1, 1, -1)
            at = {"position_ids": torch.full((batch, 1), 8 + step), "attention_mask": mask}
        out = forward(text(step, batch, 1), past_key_values=cache, **at)
        logits.append(out.logits[:, -1].clone())
    return torch.stack(logits)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_all_heads_selected_is_lossless_through_inductor(calibrated, batch, prepared):
    model, calibration = calibrated
    selecting_everything(calibration).attach(model)
    want = decode(model, model.forward, batch)
    got = decode(model, torch.compile(model.forward, backend="dejavu"), batch)
    calibration.attach(model)
    ran = [s for p in prepared for s in p.plan.sites if s.decision.policy == "predict"]
    assert any(s.site.kind is SiteKind.ATTENTION for s in ran)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def executions(model, batch, prepared):
    """How each sparse site runs in a decode step of this batch: by kind."""
    decode(model, torch.compile(model.forward, backend="dejavu_eager"), batch, steps=1)
    sites = [s for p in prepared for s in p.plan.sites if s.decision.policy != "dense"]
    return {(s.site.kind, s.decision.execution) for s in sites}


@torch.no_grad()
def test_where_several_tokens_cost_more_a_batch_skips_only_the_cache(
    calibrated, prepared, monkeypatch
):
    model, calibration = calibrated
    calibration.attach(model)
    alike = executions(model, 3, prepared)
    assert (SiteKind.ATTENTION, Execution.GATHERED) in alike
    prepared.clear()
    torch.compiler.reset()
    as_on_cpu = plan.cost_of
    # Caches this small don't pay for a launch.
    monkeypatch.setattr("dejavu_compile.cost.LAUNCHES", 0)
    monkeypatch.setattr(
        plan, "cost_of", lambda *args: replace(as_on_cpu(*args), several_cost_more=True)
    )
    costly = executions(model, 3, prepared)
    assert (SiteKind.ATTENTION, Execution.CACHE) in costly
    assert (SiteKind.ATTENTION, Execution.GATHERED) not in costly
    reasons = [s.reason for p in prepared for s in p.plan.sites if s.site.kind is SiteKind.MLP]
    assert any("for 3 tokens" in r for r in reasons)


@pytest.mark.parametrize("density", [0.0, -1.0, 1.5, float("nan")])
def test_head_density_out_of_range_is_refused(density):
    with pytest.raises(dv.OptionError, match="head_density"):
        dv.calibrate(tiny("opt"), texts(), head_density=density, progress=False)


def test_density_alone_leaves_attention_dense():
    calibration = dv.calibrate(tiny("opt"), texts(), density=0.5, progress=False)
    assert not attention_sites(calibration)


def test_budget_is_kept_with_heads_too():
    model = tiny("opt", layers=LAYERS)
    calibration = dv.calibrate(model, texts(7), max_ppl_increase=0.05, progress=False)
    assert attention_sites(calibration)
    assert calibration.quality.perplexity_increase <= 0.05


@torch.no_grad()
def test_explain_names_attention_sites(calibrated):
    model, _ = calibrated
    report = dv.explain(model, torch.tensor([[5]]), use_cache=False)
    heads = [s for s in report.sites if s.kind == "attention"]
    assert [s.layer for s in heads] == list(range(LAYERS))
    assert [s.units for s in heads] == [4] * LAYERS
    assert [s.policy for s in heads[1:]] == ["predict"] * (LAYERS - 1)
    assert all(s.bytes_sparse < s.bytes_dense for s in heads[1:])
