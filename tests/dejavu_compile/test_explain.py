import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from tiny import NAMES, texts, tiny

import dejavu_compile as dv

# Projections of one layer, and whether its MLP is a site
PROJECTIONS = {
    "opt": 6, "gpt2": 4, "llama": 7, "gemma2": 7, "gpt_neox": 4, "falcon": 4, "bloom": 4, "phi3": 4,
    "qwen3": 7, "nemotron": 6,
}  # fmt: skip
TOKEN = torch.tensor([[5]])


def matrices_read_by_projections(model):
    """Every 2-D weight but the embeddings; the head counts, tied or not."""
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)
    }
    named = {
        name: p for name, p in model.named_parameters() if p.dim() == 2 and id(p) not in embeddings
    }
    return named


@pytest.mark.parametrize("name", NAMES)
def test_every_projection_is_accounted_for(name):
    model = tiny(name)
    report = dv.explain(model, TOKEN, use_cache=False)
    layers = model.config.num_hidden_layers
    assert [site.layer for site in report.sites if site.kind == "mlp"] == list(range(layers))
    assert [site.layer for site in report.sites if site.kind == "attention"] == list(range(layers))
    inside = {"llama": 2, "gemma2": 2, "qwen3": 2}.get(name, 1)  # of an MLP, before its units
    inside += (
        3 if name == "opt" else 1
    )  # without a cache a head's own keys and values; none are shared
    assert len(report.unmatched) == (PROJECTIONS[name] - 2 - inside) * layers + 1  # and the head
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for entry in [*report.sites, *report.unmatched]:
        assert entry.name in parameters
        assert entry.reason
        assert entry.bytes_dense > 0
    for site in report.sites:
        assert site.name in matrices_read_by_projections(model)
        assert site.units == (4 if site.kind == "attention" else 512 if name == "bloom" else 256)
        assert 0 < site.break_even <= 1


def test_report_prints_every_name_and_reason_and_is_json():
    report = dv.explain(tiny("llama"), TOKEN, use_cache=False)
    shown = str(report)
    for entry in [*report.sites, *report.unmatched]:
        assert entry.name in shown
        assert entry.reason in shown
    stored = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert [site["name"] for site in stored["sites"]] == [site.name for site in report.sites]
    assert len(stored["unmatched"]) == len(report.unmatched)
    assert stored["sites"][0]["density"] is None


def test_attention_that_a_graph_break_cuts_off_is_told():
    model = tiny("llama")
    projection = model.model.layers[1].self_attn.o_proj
    projection.forward = lambda x: torch._dynamo.graph_break() or F.linear(x, projection.weight)
    report = dv.explain(model, TOKEN, use_cache=False)
    assert [site.layer for site in report.sites if site.kind == "attention"] == [0]
    (lone,) = report.lone_attention
    assert "leaves its graph" in lone.reason
    shown, stored = str(report), json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert f"{lone.name}  {lone.reason}" in shown.split("attention in no site")[1]
    assert stored["lone_attention"] == [{"name": lone.name, "reason": lone.reason}]


def test_bytes_equal_those_of_the_weights():
    model = tiny("llama")
    report = dv.explain(model, TOKEN, use_cache=False)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for projection in report.unmatched:
        weight = parameters[projection.name]
        assert projection.bytes_dense == weight.numel() * weight.element_size()
    mlps = [site for site in report.sites if site.kind == "mlp"]
    for site, layer in zip(mlps, model.model.layers, strict=True):
        assert site.bytes_dense == sum(p.numel() * 4 for p in layer.mlp.parameters())


def test_calibrated_policy_and_density_show():
    model = tiny("llama")
    dv.calibrate(model, texts(), policy="gate", density=0.4, progress=False)
    for site in dv.explain(model, TOKEN, use_cache=False).sites:
        if site.kind == "attention":
            continue
        assert (site.policy, site.reason) == ("gate", "calibrated")
        assert site.density == pytest.approx(0.4, abs=0.15)
        expected = (1 + 2 * site.density) / 3 * site.bytes_dense
        assert site.bytes_sparse == pytest.approx(expected, rel=1e-3)


def test_prefill_reason_names_the_number_of_tokens():
    report = dv.explain(tiny("opt"), torch.ones(1, 12, dtype=torch.long), use_cache=False)
    for site in report.sites:
        assert site.policy == "dense"
        assert "prefill" in site.reason
        assert "12 tokens" in site.reason


def test_expected_speedup_is_that_of_the_bytes():
    model = tiny("llama")
    dv.calibrate(model, texts(), policy="gate", density=0.4, progress=False)
    for site in dv.explain(model, TOKEN, use_cache=False).sites:
        assert site.speedup == pytest.approx(site.bytes_dense / site.bytes_sparse)
        assert (site.speedup > 1) == (site.policy == "gate")


def test_torch_logs_shows_graphs_and_decisions():
    """As for any module of PyTorch, by its name."""
    script = (
        "import torch\n"
        "model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))\n"
        "with torch.no_grad():\n"
        "    torch.compile(model.eval(), backend='dejavu_eager')(torch.ones(1, 8))\n"
    )
    environment = {**os.environ, "TORCH_LOGS": "+dejavu_compile"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    for said in (
        "normalize took",
        "torch.ops.aten.relu.default",
        "0 sites sparse, 1 dense",
        "2.weight: dense",
    ):
        assert said in done.stderr
