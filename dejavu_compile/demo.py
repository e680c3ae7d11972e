"""The demo: a real trained decoder made sparse by predictors, its words, its quality, and the speed."""

import shutil
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from dejavu_compile.passes.site import SiteKind

from . import bench
from .artifact import Calibration, detach
from .backend import dejavu
from .calibrate import calibrate
from .decode_step import oracle_logits
from .errors import ArtifactError
from .evaluate import Evaluation, evaluate
from .random_selections import attach_random_predictors
from .read_artifact import load
from .shapes import build, weight_bytes
from .text import windows

PROMPTS = (
    "def read_lines(path):\n    with open(path",
    "class Node:\n    def __init__(self, value",
    "import os\nimport sys\n\n\ndef main(",
)
SPEED_LAYERS_CPU = 6  # of 24: on two cores each layer costs seconds to make and to compile


def _folder() -> Path:
    """The checkout's demo/ folder."""
    folder = Path(__file__).resolve().parents[1] / "demo"
    if not (folder / "models").is_dir():
        raise ArtifactError(
            "the demo's models are not here", found=f"no {folder / 'models'}",
            expected="a checkout of the repository (they are not in the wheel)",
            fix="clone it and run make demo",
        )  # fmt: skip
    return folder


def _generate(model: nn.Module, tokenizer: object, prompts: tuple[str, ...]) -> list[str]:
    completions = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        inputs = inputs.to(next(model.parameters()).device)
        out = model.generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=1)
        completions.append(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :]))
    return completions


def _completions(console: Console, dense: list[str], sparse: list[str]) -> None:
    table = Table(title="Greedy completions: dense and sparse", show_lines=True)
    for name in ("prompt", "dense", "sparse"):
        table.add_column(name, overflow="fold")
    for row in zip(PROMPTS, dense, sparse, strict=True):
        table.add_row(*row)
    console.print(table)


def _quality(console: Console, calibration: Calibration, quality: Evaluation) -> None:
    table = Table(title="MLPs of the trained OPT decoder (calibration text, held out)")
    for name in ("layer", "policy", "predictor rank", "bytes of the MLP", "density", "recall"):
        table.add_column(name, justify="right")
    for site in (s for s in calibration.sites if s.kind is SiteKind.MLP):
        rank, share = "", ""
        if site.predictor is not None:
            rank = str(site.predictor.rank)
            share = f"{site.predictor_share:.1%}"
        metrics = site.metrics
        table.add_row(
            str(site.layer), str(site.policy), rank, share,
            f"{metrics.density:.3f}", f"{metrics.recall:.3f}",
        )  # fmt: skip
    console.print(table)
    console.print(
        f"held-out text, {quality.tokens} tokens: perplexity {quality.perplexity_dense:.4f} dense, "
        f"{quality.perplexity_sparse:.4f} sparse ({quality.perplexity_increase:+.2%}); "
        f"top-1 agreement {quality.top1_agreement:.2%}; mean MLP density {calibration.density:.3f}"
    )


def _speed(console: Console, density: float) -> None:
    cuda = torch.cuda.is_available()
    device, layers = ("cuda", None) if cuda else ("cpu", SPEED_LAYERS_CPU)
    model = build("opt-1.3b", device, torch.bfloat16, layers)
    layers = model.config.num_hidden_layers
    console.print(
        f"\nSpeed measurement only: OPT-1.3B's shape, {layers} of 24 layers, RANDOM weights, bf16, "
        f"batch 1, neurons selected at the density just measured ({density:.3f})"
    )
    mode = {"triton.cudagraphs": True} if cuda else {}
    repeats = 20
    oracle = oracle_logits(model, [], 512)
    dense = bench.measure(model, "dense", 512, repeats, oracle, backend="inductor", options=mode)
    kept = attach_random_predictors(model, density)
    oracle = oracle_logits(model, kept, 512)
    sparse = bench.measure(model, "dejavu", 512, repeats, oracle, backend=dejavu, options=mode)
    table = Table(title="Decode step")
    for name in ("", "ms a token", "weights read, MB", "error against oracle"):
        table.add_column(name, justify="right")
    for name, row, d in (("dense Inductor", dense, None), ("dejavu", sparse, density)):
        table.add_row(
            name, f"{row['p50'] / 1e3:.2f}", f"{weight_bytes(model, d) / 1e6:.0f}",
            f"{row['error']:.1e}",
        )  # fmt: skip
    console.print(table)
    console.print(f"dejavu is {dense['p50'] / sparse['p50']:.2f}x as fast")
    detach(model)


def run() -> None:
    """Calibrate, save, reload, compile, generate, measure; prints as it goes."""
    started = time.monotonic()
    console = Console()
    folder = _folder()
    cuda = torch.cuda.is_available()
    name = folder / "models" / "opt-python-8m"
    tokenizer = AutoTokenizer.from_pretrained(name)
    dtype = torch.bfloat16 if cuda else torch.float32
    model = (
        AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        .to("cuda" if cuda else "cpu")
        .eval()
    )
    dense = _generate(model, tokenizer, PROMPTS)

    console.print("[1/4] calibrate on text that the model was not trained on")
    text = windows(tokenizer, folder / "text" / "calibration.txt", limit=160)
    calibration = calibrate(model, text, density=0.24)

    console.print("[2/4] save, detach, reload")
    artifact = Path(tempfile.mkdtemp()) / "opt-python-8m-dejavu"
    calibration.save_pretrained(artifact)
    detach(model)
    calibration = load(model, artifact)
    shutil.rmtree(artifact.parent)

    console.print("[3/4] quality on held-out text, then compile and generate")
    quality = evaluate(model, windows(tokenizer, folder / "text" / "heldout.txt", limit=32))
    model.compile(backend=dejavu)
    sparse = _generate(model, tokenizer, PROMPTS)
    _completions(console, dense, sparse)
    _quality(console, calibration, quality)

    console.print("[4/4] speed")
    _speed(console, calibration.thresholded_density)
    console.print(f"done in {time.monotonic() - started:.0f} s")
