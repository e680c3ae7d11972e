"""The backend changes nothing but speed, as long as nothing is selected away."""

import copy
import warnings

import pytest
import torch
from tiny import NAMES, selecting_everything, text, texts, tiny

import dejavu_compile as dv
from dejavu_compile import attachments, backend
from dejavu_compile._compat import compile_counters

STEPS = 4
RELATIVE = 1e-5


@pytest.fixture
def prepared(monkeypatch):
    """What our passes did with each graph, in order of compilation."""
    seen, run = [], backend.prepare

    def spy(*args):
        seen.append(run(*args))
        return seen[-1]

    monkeypatch.setattr(backend, "prepare", spy)
    return seen


@torch.no_grad()
def logits_of_decoding(model, ids, call):
    """Logits of the prefill and of STEPS decode steps, with a dynamic cache."""
    out = call(input_ids=ids, use_cache=True)
    logits = [out.logits]
    for _ in range(STEPS):
        token = logits[-1][:, -1:].argmax(-1)
        out = call(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits)
    return logits


def greedy(model, ids):
    return model.generate(ids, max_new_tokens=6, do_sample=False)


def assert_lossless(model, how="dejavu_eager"):
    ids = text(7, batch=1, length=9)
    expected = logits_of_decoding(model, ids, model.forward)
    tokens = greedy(model, ids)
    model.compile(backend=how)
    for got, want in zip(logits_of_decoding(model, ids, model), expected, strict=True):
        assert (got - want).abs().max() <= RELATIVE * want.abs().max()
    assert torch.equal(greedy(model, ids), tokens)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_attached_is_lossless(name):
    assert_lossless(tiny(name))


@pytest.mark.parametrize("policy", ["exact", "predict", "gate"])
@pytest.mark.parametrize("name", NAMES)
def test_calibrated_at_full_density_is_lossless(name, policy):
    model = tiny(name)
    calibration = dv.calibrate(model, texts(), policy=policy, density=1.0, progress=False)
    assert calibration.quality.perplexity_increase == pytest.approx(0, abs=1e-6)
    assert_lossless(model)


@pytest.mark.parametrize("policy", ["predict", "gate"])
@pytest.mark.parametrize("name", NAMES)
def test_sparse_graph_that_selects_every_unit_is_lossless(name, policy, prepared):
    model = tiny(name)
    calibration = dv.calibrate(model, texts(), policy=policy, density=1.0, progress=False)
    wanted = [site for site in calibration.sites if site.policy == policy]
    selecting_everything(calibration).attach(model)
    assert_lossless(model)
    assert len(wanted) == (1 if policy == "predict" else 2)
    assert max(p.plan.num_sparse for p in prepared) >= len(wanted)
