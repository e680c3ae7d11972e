"""The `dejavu` command on a tiny decoder with a real tokenizer: calibrate, eval, bench, verify, explain."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM
from typer.testing import CliRunner

from dejavu_compile.cli import _app, main

DEMO = Path(__file__).parents[2] / "demo"
TEXT = str(DEMO / "text" / "heldout.txt")
SMALL = ["--length", "64", "--windows", "8", "--device", "cpu"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random OPT of two layers, with the demo's tokenizer."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "models" / "opt-python-8m")
    config = OPTConfig(
        vocab_size=len(tokenizer), hidden_size=32, ffn_dim=256, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=32, max_position_embeddings=512, dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        OPTForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(_app(), arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_calibrate_then_eval_then_bench(folder, tmp_path):
    artifact, figures = str(tmp_path / "artifact"), tmp_path / "figures.json"
    saved, work = tmp_path / "calibration.json", tmp_path / "work"
    run("calibrate", folder, "--text", TEXT, "--out", artifact, "--density", "0.5", "--workdir", str(work),
        "--json", str(saved), *SMALL)  # fmt: skip
    written = json.loads((Path(artifact) / "dejavu_config.json").read_text())
    assert json.loads(saved.read_text()) == written
    assert (work / "manifest.json").exists()
    said = run("eval", folder, "--text", TEXT, "--artifact", artifact, "--json", str(figures), *SMALL)  # fmt: skip
    quality = json.loads(figures.read_text())
    assert f"{quality['perplexity_sparse']:.4f}" in said
    run("bench", folder, "--artifact", artifact, "--length", "128", "--repeats", "3", "--device", "cpu",
        "--json", str(figures))  # fmt: skip
    dense, sparse = json.loads(figures.read_text())["rows"]
    assert (dense["provider"], sparse["provider"]) == ("dense Inductor", "dejavu")
    assert max(dense["error"], sparse["error"]) < 1e-4
    assert min(dense["p50"], sparse["p50"]) > 0


def test_verify_writes_figures_and_a_picture(folder, tmp_path):
    figures, picture = tmp_path / "figures.json", tmp_path / "picture.png"
    said = run("verify", folder, "--text", TEXT, "--json", str(figures), "--plot", str(picture), *SMALL)  # fmt: skip
    rows = json.loads(figures.read_text())["existence"]
    assert {row["selector"] for row in rows} == {"contextual", "static", "random"}
    assert "contextual" in said
    assert "nan" not in said
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_explain(folder):
    assert "fc2" in run("explain", folder, "--device", "cpu")


@pytest.fixture
def mistaken(folder, tmp_path):
    """Things to be given for what they aren't."""
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    (tmp_path / "short.txt").write_text("x = 1")
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "manifest.json").write_text('{"seed": 1}')
    return {"MODEL": folder, "HERE": str(tmp_path), "TEXT": TEXT}


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("bench MODEL --length 20", "the cache's length doesn't fit"),
        ("bench MODEL --artifact HERE/empty", "is not an artifact"),
        ("bench HERE/nowhere", "no model could be loaded from"),
        ("bench HERE/empty", "no model could be loaded from"),
        ("explain MODEL --device abacus", "device 'abacus' can't be used"),
        ("eval MODEL --text TEXT --artifact HERE/empty", "is not an artifact"),
        ("verify MODEL --text HERE/short.txt", "short.txt is too short"),
        ("verify MODEL --text HERE/latin1.txt", "is not UTF-8 text"),
        ("verify MODEL --text TEXT --length 0", "nothing to learn"),
        ("verify MODEL --text TEXT --windows 0", "nothing to learn"),
        ("calibrate MODEL --text HERE/short.txt --out HERE/out", "short.txt is too short"),
        ("calibrate MODEL --text TEXT --out HERE/out --policy best", "unknown policy 'best'"),
        ("calibrate MODEL --text TEXT --out HERE/out --density 2", "density is out of range"),
        ("calibrate MODEL --text TEXT --out HERE/out --workdir HERE/begun", "another calibration"),
        ("calibrate MODEL --text TEXT --out HERE/short.txt", "is a file"),
        ("calibrate MODEL --text HERE/nowhere.txt --out HERE/out", "does not exist"),
        ("calibrate MODEL --text TEXT", "Missing option"),
    ],
)
def test_a_mistake_is_one_clear_message(command, words, mistaken, monkeypatch, capsys):
    for name, value in mistaken.items():
        command = command.replace(name, value)
    device = [] if "--device" in command else ["--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["dejavu", *command.split(), *device])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert words in " ".join(error.replace("│", "").split())
    assert "Traceback" not in error
