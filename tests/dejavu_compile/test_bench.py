"""What the benchmarks attach does what their oracle says, and the bytes that they report are those."""

import pytest
import torch
from transformers import LlamaConfig

from dejavu_compile import bench, detach
from dejavu_compile._compat import compile_counters

LENGTH, LAYERS, WIDTH, UNITS = 128, 3, 128, 512
SHAPES = {
    "opt": bench.opt(WIDTH, UNITS, LAYERS, 8),
    "llama": LlamaConfig(
        vocab_size=1024, hidden_size=WIDTH, intermediate_size=UNITS, num_hidden_layers=LAYERS,
        num_attention_heads=8, num_key_value_heads=2, tie_word_embeddings=False,
    ),
}  # fmt: skip


@pytest.fixture(params=SHAPES)
def model(request, monkeypatch):
    monkeypatch.setattr(bench, "SHAPES", SHAPES)
    return bench.build(request.param, "cpu", torch.float32, context=LENGTH)


def sparse_logits(model, batch):
    forward = torch.compile(model.forward, backend="dejavu_eager", options={"dejavu.exact": False})
    return bench.DecodeStep(model, forward, LENGTH, batch)()


def attach_and_compare(model, kept, batch, prepared):
    want = bench.oracle_logits(model, kept, LENGTH, batch)
    dense = bench.oracle_logits(model, [], LENGTH, batch)
    assert (want - dense).abs().max() > 1e-3 * dense.abs().max(), "the oracle must tell"
    got = sparse_logits(model, batch)
    assert prepared[-1].plan.num_sparse == len(kept)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_random_predictors_select_what_the_oracle_keeps(model, batch, prepared):
    kept = bench.attach_random_predictors(model, 0.1, head_density=0.5)
    assert len(kept) == 2 * (LAYERS - 1)
    attach_and_compare(model, kept, batch, prepared)


@torch.no_grad()
def test_each_sequence_of_a_batch_runs_its_own_heads(model, prepared):
    kept = bench.attach_heads_per_sequence(model, 0.5, LENGTH, batch=3)
    assert len(kept) == LAYERS - 1
    assert all((k.mask[0] != k.mask[1]).any() for k in kept)
    attach_and_compare(model, kept, 3, prepared)


@torch.no_grad()
def test_what_is_kept_is_that_of_the_same_part_in_another_model(model):
    other = bench.build(
        "opt" if hasattr(model.model, "decoder") else "llama", "cpu", torch.float32
    )
    kept = bench.attach_random_predictors(model, 0.1, head_density=0.5)
    for one in kept:
        twin = one.in_model(model, other)
        assert twin.mask is one.mask
        name = next(n for n, p in model.named_parameters() if p is one.part.out)
        assert twin.part.out is other.get_parameter(name)


@torch.no_grad()
def test_gates_select_what_the_oracle_keeps(model, prepared):
    if bench.mlps(model)[0].act is None:
        pytest.skip("a model without gates")
    kept = bench.attach_gates(model, 0.5, LENGTH)
    assert len(kept) == LAYERS
    attach_and_compare(model, kept, 1, prepared)


@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_sketches_select_what_the_oracle_keeps(model, batch, prepared):
    if bench.mlps(model)[0].act is None:
        pytest.skip("a model without gates")
    kept = bench.attach_random_sketches(model, 0.4)
    assert len(kept) == LAYERS
    attach_and_compare(model, kept, batch, prepared)
    one, sketch = WIDTH * UNITS * 4, LAYERS * (WIDTH * UNITS * 6 // 8 + 5 * UNITS * 4)
    dense = bench.weight_bytes(model, None)
    assert bench.weight_bytes(model, 0.4) == pytest.approx(
        dense - LAYERS * 3 * 0.6 * one + sketch, rel=2e-3
    )


def test_bytes_are_counted_from_what_is_attached(model):
    dense = bench.weight_bytes(model, None)
    parts = bench.mlps(model)
    one = WIDTH * UNITS * 4
    bench.attach_random_predictors(model, 0.25)
    predictor = bench.attached(parts[1].out).predictor.num_bytes
    matrices = 1 + len(parts[0].into)
    saved = (LAYERS - 1) * (0.75 * matrices * one - predictor)
    assert bench.weight_bytes(model, 0.25) == pytest.approx(dense - saved)
    detach(model)
    if parts[0].act is not None:
        bench.attach_gates(model, 0.25, LENGTH)
        assert bench.weight_bytes(model, 0.25) == pytest.approx(dense - LAYERS * 0.75 * 2 * one)


def test_cache_bytes_of_shared_keys_count_a_group_once(model):
    heads, head_dim = 8, WIDTH // 8
    groups = getattr(model.config, "num_key_value_heads", None) or heads
    assert bench.cache_bytes(model, 100) == 2 * LAYERS * groups * head_dim * 100 * 4
    share = 1 - 0.5 ** (heads // groups)
    want = 2 * (1 + (LAYERS - 1) * share) * groups * head_dim * 100 * 4
    assert bench.cache_bytes(model, 100, 0.5) == pytest.approx(want, abs=1)


@torch.no_grad()
def test_measure_reports_errors_and_recompiles(model):
    before = compile_counters()["graphs"]
    want = bench.oracle_logits(model, [], LENGTH)
    row = bench.measure(model, "dense", LENGTH, 10, want, backend="eager")
    assert compile_counters()["graphs"] > before
    assert row["error"] < 1e-5
    assert row["recompiles"] == 0
    assert 0 < row["p20"] <= row["p50"] <= row["p80"]


@torch.no_grad()
def test_a_prompt_in_parts_is_the_same_prompt(model, monkeypatch):
    whole = bench.DecodeStep(model, model.forward, LENGTH, batch=2)()
    monkeypatch.setattr(bench, "PROMPT_CHUNK", 24)
    parts = bench.DecodeStep(model, model.forward, LENGTH, batch=2)()
    assert (parts - whole).abs().max() <= 1e-5 * whole.abs().max()
