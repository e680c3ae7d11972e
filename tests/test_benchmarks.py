"""Every script under benchmarks/ starts: what it imports is still where it says."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from dejavu_compile import decode_step, random_selections, shapes

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("*.py") if "def main(" in path.read_text())


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_shows_its_help(name, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(name).main()
    assert stopped.value.code == 0
    assert "--out" in capsys.readouterr().out


@torch.no_grad()
def test_a_step_whose_selections_are_given_has_no_predictor_and_says_the_same(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    given = importlib.import_module("given")
    model = shapes.build("opt-125m", "cpu", torch.float32, layers=3, context=64)
    kept = random_selections.attach_random_predictors(model, 0.2)
    expected = decode_step.oracle_logits(model, kept, 64)
    give, graphs = given.give, []

    def seen(gm, *args):
        result = give(gm, *args)
        graphs.append({node.target for node in gm.graph.nodes})
        return result

    monkeypatch.setattr(given, "give", seen)
    compiled = torch.compile(model.forward, backend="dejavu_eager")
    with given.selections_given():
        logits = decode_step.DecodeStep(model, compiled, 64)()
    ops = torch.ops.dejavu
    assert ops.gathered_rows.default in graphs[-1]
    assert ops.select.default not in graphs[-1]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert given.predictor_bytes([part.out for part in shapes.mlps(model)]) > 0
