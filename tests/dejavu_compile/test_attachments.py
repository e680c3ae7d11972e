"""Two models of one class share Dynamo's cache of compiled graphs: none may run the other's predictors."""

import pytest
import torch
from tiny import text, texts, tiny

import dejavu_compile as dv


@pytest.fixture(scope="module")
def calibrated():
    model = tiny("opt", layers=3)
    return model, dv.calibrate(model, texts(), policy="predict", density=0.3, progress=False)


def compiled(model):
    return torch.compile(
        model.forward, backend="dejavu_eager", options={"dejavu.execution": "masked"}
    )


@torch.no_grad()
def logits(run):
    return run(text(11), use_cache=False).logits


def assert_each_runs_as_itself(models):
    """`models`: (model, is it sparse). Each compiled alone in a fresh cache is the oracle."""
    expected = []
    for model, _ in models:
        torch.compiler.reset()
        expected.append(logits(compiled(model)))
    torch.compiler.reset()
    runs = [compiled(model) for model, _ in models]
    for _ in range(2):
        for run, oracle, (model, sparse) in zip(runs, expected, models, strict=True):
            found = logits(run)
            torch.testing.assert_close(found, oracle, rtol=0, atol=0)
            dense = logits(model.forward)
            assert torch.equal(found, dense) != sparse


def test_a_model_of_the_same_class_stays_dense(calibrated):
    assert_each_runs_as_itself([(calibrated[0], True), (tiny("opt", layers=3), False)])
    assert_each_runs_as_itself([(tiny("opt", layers=3), False), (calibrated[0], True)])


def test_two_densities_of_one_calibration(calibrated):
    model, calibration = calibrated
    other = tiny("opt", layers=3)
    calibration.at_density(0.1).attach(other)
    assert_each_runs_as_itself([(model, True), (other, True)])


def test_attaching_drops_graphs_that_take_any_model(calibrated):
    model, calibration = calibrated
    other, attached_later = tiny("opt", layers=3), tiny("opt", layers=3)
    dv.detach(model)
    try:
        run, run_later = compiled(other), compiled(attached_later)
        dense = logits(run)
        assert torch.equal(logits(run_later), dense)
        calibration.attach(attached_later)
        assert not torch.equal(logits(run_later), dense)
        assert torch.equal(logits(run), dense)
    finally:
        calibration.attach(model)
