"""The coverage benchmark: what it says of each attention is what happened to it."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny

PATH = Path(__file__).parents[1] / "benchmarks" / "coverage.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("benchmark_of_coverage", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def attention_of(model, layer):
    return model.model.layers[layer].self_attn


def nothing(model):
    """Leaves the model as it is."""


def uncaptured(model):
    layer = attention_of(model, 1)
    layer.forward = torch._dynamo.disable(layer.forward)


def unread(model):
    layer = attention_of(model, 1)
    forward = layer.forward

    def twice(hidden_states, **kwargs):
        done = forward(hidden_states, **kwargs)
        keys = kwargs["past_key_values"].layers[1].keys
        F.scaled_dot_product_attention(keys, keys, keys)
        return done

    layer.forward = twice


def cut_off(model):
    projection = attention_of(model, 1).o_proj
    projection.forward = lambda x: torch._dynamo.graph_break() or F.linear(x, projection.weight)


def mixed(model):
    """Normalised over all heads."""
    projection = attention_of(model, 1).o_proj
    projection.forward = lambda x: F.linear(F.rms_norm(x, (x.shape[-1],)), projection.weight)


# what is done to one of two layers -> (attentions called, found, parts of the reasons with how often)
CASES = {
    nothing: (2, 2, {}),
    uncaptured: (2, 1, {"Dynamo captured it in no graph": 1}),
    unread: (3, 2, {"nothing reads what it computes": 1}),
    cut_off: (2, 1, {"leaves its graph before a projection reads it": 1}),
    mixed: (
        2,
        1,
        {"its heads aren't kept apart up to the projection that reads it (rms_norm)": 1},
    ),
}


def without_a_cache(model):
    """Each step is the whole text again; only the head, behind a graph break, is given one token."""
    head, prepare = model.lm_head, model.prepare_inputs_for_generation
    head.forward = lambda x: torch._dynamo.graph_break() or F.linear(x, head.weight)

    def whole(ids, **kwargs):
        kwargs |= {"past_key_values": None, "use_cache": False, "position_ids": None}
        return {**prepare(ids, **kwargs), **kwargs, "input_ids": ids}

    model.prepare_inputs_for_generation = whole


@pytest.mark.parametrize(
    ("change", "cache"), [*((case, True) for case in CASES), (nothing, False), (uncaptured, False)]
)
def test_each_attention_of_a_step_is_found_or_has_its_reason(bench, change, cache):
    called, found, reasons = CASES[change]
    model = tiny("llama").requires_grad_(False)
    change(model)
    if not cache:
        without_a_cache(model)
    want = bench.generate(model)
    expected = bench.count(model)
    assert expected.attentions == called
    row = bench.lossless(model, want, expected)
    assert row["error_lossless"] <= 1e-5
    assert row["sites_attention"] == found
    assert list(row["lone_attention"].values()) == list(reasons.values())
    assert all(map(str.__contains__, row["lone_attention"], reasons))


def test_every_miss_is_on_the_page(bench):
    row = {"type": "toy", "stage": "done", "mlps": 0, "attentions": 4, "missed_mlps": {},
           "error_lossless": 0.0, "sites_attention": 1, "sites_mlp": 0, "lone_attention": {"this": 2, "that": 1}}  # fmt: skip
    other = {**row, "type": "found", "mlps": 1, "sites_mlp": 1, "sites_attention": 4}
    lines = bench.page([row, other]).splitlines()
    (line,) = [x for x in lines if x.startswith("| toy")]
    assert "1 of 4" in line
    assert line.endswith("| this (2); that (1) |")
    (line,) = [x for x in lines if x.startswith("| found")]
    assert line.endswith("|  |")
