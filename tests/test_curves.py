"""The benchmarks of a decode step, on tiny shapes: each point matches its oracle and says what the plan chose."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from dejavu_compile import shapes

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = {
    "opt-tiny": shapes.opt(128, 1024, 2, 8),
    "llama-tiny": LlamaConfig(
        vocab_size=1024, hidden_size=128, intermediate_size=1024, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=2, tie_word_embeddings=False,
    ),
}  # fmt: skip


@pytest.fixture
def benchmark(monkeypatch):
    """A script of benchmarks/, as a module that knows the tiny shapes."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name, config in TINY.items():
        monkeypatch.setitem(shapes.SHAPES, name, config)

    def load(name):
        spec = importlib.util.spec_from_file_location(
            f"benchmark_{name}", BENCHMARKS / f"{name}.py"
        )
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module

    return load


def run(main, path, *more):
    main([*more, "--dtype", "fp32", "--repeats", "2", "--out", str(path)])
    return json.loads(path.read_text())


@pytest.mark.slow
def test_all_curves_of_predictors(benchmark, tmp_path, capsys):
    written = run(
        benchmark("curves").main, tmp_path / "c.json", "--shape", "opt-tiny", "--layers", "2", "--length", "64",
        "--densities", "0.05", "1.0", "--lengths", "64", "128", "--batches", "1", "2", "6",
        "--layer-counts", "2", "3",
    )  # fmt: skip
    points = {(p["curve"], p["x"], p["provider"]): p for p in written["points"]}
    assert all(p["us"] > 0 and p["error"] < p["tolerance"] for p in points.values())
    assert "partial" not in written
    # what doesn't change is measured once
    assert points["density", 0.05, "dense"]["us"] == points["density", 1.0, "dense"]["us"]
    assert points["kv", 64, "auto"]["us"] == points["layers", 2, "auto"]["us"]
    assert "mlp predict" in points["density", 0.05, "auto"]["detail"]
    assert "mlp predict" not in points["density", 1.0, "auto"]["detail"]
    assert points["density", 0.05, "auto"]["bytes"] < points["density", 1.0, "auto"]["bytes"]
    assert points["kv", 64, "dense"]["bytes"] < points["kv", 128, "dense"]["bytes"]
    # the plan's choice, and the other one: past dejavu.max_tokens MLPs are dense
    assert "mlp predict" in points["batch", 2, "auto"]["detail"]
    assert "mlp predict" not in points["batch", 2, "mlps dense"]["detail"]
    assert "mlp predict" not in points["batch", 6, "auto"]["detail"]
    assert "mlp predict" in points["batch", 6, "mlps sparse"]["detail"]
    slower = {x for x, _ in written["slower_than_dense"].get("batch", [])}
    for x in (1, 2, 6):
        dense, auto = (points["batch", x, name]["us"] for name in ("dense", "auto"))
        assert (x in slower) == (auto > 1.03 * dense)
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert "batch" in capsys.readouterr().out


@pytest.mark.slow
def test_gates_at_several_sequences(benchmark, tmp_path):
    written = run(
        benchmark("curves").main, tmp_path / "c.json", "--shape", "llama-tiny", "--layers", "2",
        "--length", "64", "--curves", "batch", "--batches", "1", "3", "--density", "0.2",
    )  # fmt: skip
    assert {p["provider"] for p in written["points"]} == {"dense", "auto", "mlps dense"}
    assert all(p["us"] is not None for p in written["points"]), written["points"]
    assert any("mlp gate" in p["detail"] for p in written["points"])
    assert written["density"] == 0.2
    assert written["head_density"] is None


def test_a_point_that_does_not_match_has_no_time(benchmark, monkeypatch):
    curves = benchmark("curves")
    data = sys.modules["curves_data"]
    row = {
        "error": float("nan"),
        "p50": 1.0,
        "p20": 1.0,
        "p80": 1.0,
        "recompiles": 0,
        "cudagraph_skips": 0,
    }
    monkeypatch.setattr(data, "measure", lambda *args, **kwargs: row)
    with torch.no_grad():
        bench = curves.Bench("opt-tiny", torch.float32, 64, ["default"], 2)
        point = bench.sparse(curves.Place(2, 64, 1, 0.05))
    assert point.us is None
    assert point.failure.startswith("FAILED")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--densities 0", "a density is a share"),
        ("--head-density 2", "a density is a share"),
        ("--layers 1", "at least 2 layers"),
        ("--lengths 16", "a cache takes 32 slots"),
        ("--batches 0", "a batch 1 sequence"),
        ("--curves depth", "invalid choice: 'depth'"),
        ("--shape opt-7b", "invalid choice: 'opt-7b'"),
    ],
)
def test_a_mistake_is_one_clear_message(benchmark, arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark("curves").main(arguments.split())
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_decode_says_what_each_row_must_read(benchmark, tmp_path):
    written = run(
        benchmark("decode").main, tmp_path / "d.json", "--shape", "opt-tiny", "--length", "64", "--batch", "1", "2",
        "--head-density", "0.5", "--modes", "default", "--variants", "auto", "lossless", "--breakdown",
    )  # fmt: skip
    for one in written["runs"]:
        assert all(row["error"] < row["tolerance"] for row in one["rows"])
        dense, auto, lossless = (row["read_bytes"] for row in one["rows"])
        assert auto < lossless <= dense
        # the formula counts norms, and not the angles
        assert dense == pytest.approx(one["rows"][0]["bytes"], rel=1e-2)
        assert auto == pytest.approx(one["rows"][1]["bytes"], rel=0.05)
