"""Allocation against brute force over planted losses; the search against planted qualities."""

import itertools
import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import texts, tiny

import dejavu_compile as dv
from dejavu_compile import sensitivity
from dejavu_compile.allocate import (
    MAX_CANDIDATES,
    Option,
    bytes_read,
    candidates,
    frontier,
    within_budget,
)
from dejavu_compile.artifact import Calibration, SiteRecord
from dejavu_compile.calibrate import fit
from dejavu_compile.evaluate import Evaluation
from dejavu_compile.passes.site import Policy, SiteKind
from dejavu_compile.predictors import ThresholdCurve
from dejavu_compile.workdir import Memory


def record(site, density):
    return SiteRecord(
        kind=SiteKind.MLP, name=f"layers.{site}.mlp.weight", layer=site, units=8, policy=Policy.GATE,
        num_weights=64, fingerprint="", curve=ThresholdCurve((1.0,), (-math.inf,)), density=density,
    )  # fmt: skip


@st.composite
def planted(draw):
    """Sites with options of whole bytes and losses, whose sums are exact; the first loses nothing."""
    sites = []
    for site in range(draw(st.integers(1, 4))):
        pairs = draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=4))
        pairs.insert(0, (10, 0))
        sites.append(
            [Option(record(site, size / 10), float(size), float(loss)) for size, loss in pairs]
        )
    return sites


def total(choice):
    return sum(o.bytes for o in choice), sum(o.loss for o in choice)


@given(planted())
def test_no_choice_of_options_reads_as_little_and_loses_less(sites):
    every = [total(choice) for choice in itertools.product(*sites)]
    for choice in frontier(sites):
        size, loss = total(choice)
        assert not any(b <= size and other < loss for b, other in every)


@given(planted())
def test_the_frontier_goes_from_the_least_loss_to_the_fewest_bytes(sites):
    found = [total(choice) for choice in frontier(sites)]
    every = [total(choice) for choice in itertools.product(*sites)]
    assert found[0] == min(every, key=lambda pair: pair[::-1])
    assert found[-1] == min(every)
    assert all(after[0] < before[0] for before, after in itertools.pairwise(found))


def test_a_site_for_which_its_policy_does_not_pay_stays_lossless():
    pays = [Option(record(0, 1.0), 10.0, 0.0), Option(record(0, 0.5), 5.0, 1.0)]
    never = [Option(record(1, 1.0), 10.0, 0.0), Option(record(1, 0.9), 11.0, 0.5)]
    for choice in frontier([pays, never]):
        assert choice[1] is never[0]


def nothing_yet(sites=()):
    return Calibration(tuple(sites), "Model", 0, "")


def test_candidates_are_spread_over_the_frontier_sparsest_first():
    options = [Option(record(0, 1 - i / 200), 200.0 - i, float(i * i)) for i in range(200)]
    found = candidates(nothing_yet(), frontier([options]))
    densities = [c.sites[0].density for c in found]
    assert len(found) <= MAX_CANDIDATES
    assert densities[0] == options[-1].record.density
    assert densities[-1] == options[1].record.density, "the mildest is there too"
    assert densities == sorted(densities)
    assert 1.0 not in densities, "what loses nothing needs no measuring"


def judged(increases, margin=0.0, tried=None):
    """A judge of planted increases, sparsest first."""

    def judge(number):
        if tried is not None:
            tried.append(number)
        increase = increases[number]
        quality = Evaluation(1000, 10.0, 10.0 * (1 + increase), 0.0, 1.0, margin)
        return nothing_yet([record(number, 0.5)]).with_quality(quality)

    return judge


@given(st.lists(st.floats(0, 1), min_size=1, max_size=70), st.floats(0, 1))
def test_the_sparsest_within_the_budget_is_chosen_in_few_measurements(increases, budget):
    increases, tried = sorted(increases, reverse=True), []
    kept = [i for i, increase in enumerate(increases) if 10 * (1 + increase) / 10 - 1 <= budget]
    judge = judged(increases, tried=tried)
    if not kept:
        with pytest.raises(dv.CalibrationError):
            within_budget(judge, len(increases), budget, lambda *_: None)
        return
    found = within_budget(judge, len(increases), budget, lambda *_: None)
    assert found.sites[0].layer == kept[0]
    assert len(tried) <= math.ceil(math.log2(len(increases) + 1))


def test_a_budget_has_to_be_kept_with_confidence():
    increases = [0.009, 0.005]
    found = within_budget(judged(increases), 2, 0.01, lambda *_: None)
    assert found.sites[0].layer == 0
    found = within_budget(judged(increases, margin=0.002), 2, 0.01, lambda *_: None)
    assert found.sites[0].layer == 1
    with pytest.raises(dv.CalibrationError, match=r"layers\.1\.mlp\.weight would have to stay"):
        within_budget(judged(increases, margin=0.02), 2, 0.01, lambda *_: None)


# --- on models -------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """What is allocated counts here, not the fit."""
    monkeypatch.setattr(sys.modules["dejavu_compile.calibrate"], "FIT_STEPS", 10)


def calibrated(model, budget, **options):
    return dv.calibrate(model, texts(4), max_ppl_increase=budget, progress=False, **options)


def test_a_layer_that_adds_nothing_gives_up_first():
    model = tiny("llama", layers=3)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e-4)
    sites = calibrated(model, 0.002, policy="gate").sites
    densities = [site.density for site in sites]
    assert densities[1] == min(sites[1].curve.densities)
    assert densities[1] < min(densities[0], densities[2])


def test_the_same_seed_and_text_give_the_same_allocation():
    first = calibrated(tiny("llama"), 0.01, seed=3)
    torch.manual_seed(99)
    assert calibrated(tiny("llama"), 0.01, seed=3).to_dict() == first.to_dict()


def test_from_a_folder_it_is_the_same_and_nothing_is_measured_again(tmp_path, monkeypatch):
    options = {"policy": "gate", "workdir": tmp_path}
    expected = calibrated(tiny("llama"), 0.01, policy="gate").to_dict()
    assert calibrated(tiny("llama"), 0.01, **options).to_dict() == expected
    assert {path.name.split("-")[0] for path in tmp_path.glob("*.safetensors")} == {
        "collect", "gates", "skipping", "quality",
    }  # fmt: skip
    monkeypatch.setattr(sensitivity, "_skipped", lambda *_: pytest.fail("it is in the folder"))
    assert calibrated(tiny("llama"), 0.01, **options).to_dict() == expected


def test_without_gradients_all_mlps_get_one_density_and_heads_stay_dense(monkeypatch, caplog):
    def refuse(*_, **__):
        raise RuntimeError("derivative for aten::_int_mm is not implemented")

    monkeypatch.setattr(sensitivity._Gates, "gradients", refuse)
    found = calibrated(tiny("llama"), 0.5)
    assert "aten::_int_mm" in caplog.text
    mlps = [site for site in found.sites if site.kind is SiteKind.MLP]
    assert len({site.density for site in mlps}) == 1
    assert all(site.density == 1.0 for site in found.sites if site not in mlps)


def test_bytes_read_count_units_and_predictors():
    model = tiny("opt", layers=2, units=512)
    batches = [{"input_ids": ids} for ids in texts(4)]
    found, recordings = fit(
        model, batches, "predict", heads=False, lookahead=1, seed=0, progress=lambda *_: None,
        store=Memory(),
    )  # fmt: skip
    read, dense = bytes_read(found.at_density(0.25), recordings)
    site = 2 * 128 * 512 * 4
    assert dense == 2 * site
    predictor = found.sites[1].predictor
    assert found.sites[0].policy is Policy.EXACT
    exact = site  # at density 1: nothing was measured yet
    by_predictor = site / 4 + predictor.down.numel() + predictor.up.numel() + 4 * 512
    assert read == pytest.approx(exact + by_predictor)
