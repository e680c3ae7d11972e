"""lm-evaluation-harness scores the sparse model: the recipe of docs/lm_eval.md, against hooks on the eager model."""

import json
from pathlib import Path

import pytest
import torch
from tiny import tiny
from transformers import AutoTokenizer

import dejavu_compile as dv
from dejavu_compile.text import windows

lm_eval = pytest.importorskip("lm_eval", reason="needs lm_eval: pip install lm_eval")

DEMO = Path(__file__).parents[2] / "demo"
QUESTIONS = [
    {"line": "def read(path):", "choices": ["    return path", "return"], "answer": 0},
    {"line": "import os", "choices": ["        import sys", "import sys, os"], "answer": 1},
    {"line": "for line in lines:", "choices": ["    print(line)", "print"], "answer": 0},
]


def scored(model, tokenizer, folder):
    """Log-likelihoods [questions, choices] by the harness."""
    from lm_eval.models.huggingface import HFLM

    (folder / "lines.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    task = {
        "task": "lines", "dataset_path": "json", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(folder / "lines.jsonl")}, "cache_dir": str(folder)},
        "output_type": "multiple_choice", "doc_to_text": "{{line}}", "doc_to_choice": "choices",
        "doc_to_target": "answer", "target_delimiter": "\n",
    }  # fmt: skip
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
    result = lm_eval.simple_evaluate(lm, tasks=[task], bootstrap_iters=0)
    samples = sorted(result["samples"]["lines"], key=lambda sample: sample["doc_id"])
    return torch.tensor(
        [[float(found) for found, _ in sample["filtered_resps"]] for sample in samples]
    )


def by_hand(model, tokenizer):
    """The same, one choice at a time, without the harness and without a compiler."""
    totals = []
    for question in QUESTIONS:
        for choice in question["choices"]:
            context = tokenizer(question["line"])["input_ids"]
            ids = torch.tensor([tokenizer(question["line"] + "\n" + choice)["input_ids"]])
            with torch.no_grad():
                found = model.forward(ids, use_cache=False).logits.double().log_softmax(-1)
            wanted = range(len(context), ids.shape[1])
            totals.append(sum(found[0, i - 1, ids[0, i]] for i in wanted))
    return torch.stack(totals).view(len(QUESTIONS), -1)


def zero_small_gates(model, calibration):
    """Hooks that zero the units whose |activated gate| doesn't pass the site's threshold."""
    handles = []
    for layer, site in zip(model.model.layers, calibration.sites, strict=True):
        gates = {}

        def remember(module, args, output, gates=gates):
            gates["now"] = output

        def zero(module, args, gates=gates, threshold=site.threshold):
            return (args[0] * (gates["now"].abs() > threshold),)

        handles.append(layer.mlp.act_fn.register_forward_hook(remember))
        handles.append(layer.mlp.down_proj.register_forward_pre_hook(zero))
    return handles


@pytest.mark.slow
def test_the_harness_scores_the_selections_that_decode_uses(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "models" / "llama-python-8m")
    model = tiny("llama", vocab_size=len(tokenizer))
    text = windows(tokenizer, DEMO / "text" / "heldout.txt", length=64, limit=8)
    calibration = dv.calibrate(model, text, policy="gate", density=0.3, progress=False)
    torch.compiler.reset()
    dense = by_hand(model, tokenizer)
    torch.testing.assert_close(scored(model, tokenizer, tmp_path).double(), dense, rtol=1e-4, atol=1e-4)  # fmt: skip

    model.compile(backend="dejavu_eager", options={"dejavu.execution": "masked"})
    found = scored(model, tokenizer, tmp_path).double()
    handles = zero_small_gates(model, calibration)
    expected = by_hand(model, tokenizer)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (expected - dense).abs().max() > 1e-2, "the oracle must tell sparse from dense"
