"""What a step must read, read off its graph, is what the weights say."""

import pytest
import torch
from transformers import LlamaConfig

from dejavu_compile import random_selections, shapes
from dejavu_compile.attachments import make_unit_major
from dejavu_compile.decode_step import DecodeStep, oracle_step
from dejavu_compile.step_bytes import KERNEL, NO_LAUNCH, capture_step, total

LENGTH, LAYERS, WIDTH, UNITS, HEADS = 64, 3, 128, 512, 8
SHAPES = {
    "opt": shapes.opt(WIDTH, UNITS, LAYERS, HEADS),
    "llama": LlamaConfig(
        vocab_size=1024, hidden_size=WIDTH, intermediate_size=UNITS, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=2, tie_word_embeddings=False,
    ),
}  # fmt: skip


@pytest.fixture(params=SHAPES)
def model(request, monkeypatch):
    monkeypatch.setattr(shapes, "SHAPES", SHAPES)
    return shapes.build(request.param, "cpu", torch.float32, context=LENGTH)


def norms(model):
    """Bytes of what no projection reads."""
    return sum(p.numel() * 4 for name, p in model.named_parameters() if "norm" in name)


def products(reads):
    """Of activations alone: the angles of a rotary embedding."""
    return sum(read.num_bytes for read in reads if read.op == "product")


def reads_of(model, kept, batch=1, backend="dejavu", **options):
    shares = oracle_step(model, kept, LENGTH, batch).shares
    step = DecodeStep(model, model.forward, LENGTH, batch)
    captured = capture_step(step, model.forward, backend=backend, options=options)
    assert step.forward == model.forward, "the step is as it was"
    return captured.reads(shares), captured


def test_dense_reads_every_weight_and_the_cache(model):
    reads, captured = reads_of(model, [], backend="inductor")
    want = shapes.weight_bytes(model, None) - norms(model) + shapes.cache_bytes(model, LENGTH)
    assert total(reads) - products(reads) == want
    assert not captured.sites


@pytest.mark.parametrize(("density", "heads"), [(0.25, None), (0.25, 0.5), (None, 0.5)])
def test_predictors_read_what_they_select_and_themselves(model, density, heads):
    kept = random_selections.attach_random_predictors(model, density, heads)
    reads, captured = reads_of(model, kept, **{"dejavu.exact": False})
    want = shapes.weight_bytes(model, density, heads) - norms(model)
    cache = [read.num_bytes for read in reads if read.op.endswith("attention")]
    rest = total(reads) - products(reads) - sum(cache)
    assert rest == pytest.approx(want, rel=2e-3)  # but for the biases of rows
    assert captured.sparse == {id(one.part.out) for one in kept}
    assert sum(s["policy"] == "predict" for s in captured.sites) == len(kept)
    group = HEADS // getattr(model.config, "num_key_value_heads", HEADS)
    if group == 1:  # else the formula expects what chance gives
        assert sum(cache) == pytest.approx(shapes.cache_bytes(model, LENGTH, heads))


def test_gates_are_read_in_full(model):
    if shapes.mlps(model)[0].act is None:
        pytest.skip("a model without gates")
    kept = random_selections.attach_gates(model, 0.25, LENGTH)
    reads, _ = reads_of(model, kept)
    want = shapes.weight_bytes(model, 0.25) - norms(model) + shapes.cache_bytes(model, LENGTH)
    assert total(reads) - products(reads) == pytest.approx(want, rel=2e-3)


def test_sketches_are_read_in_full(model):
    if shapes.mlps(model)[0].act is None:
        pytest.skip("a model without gates")
    kept = random_selections.attach_random_sketches(model, 0.25)
    reads, _ = reads_of(model, kept)
    sketches = [read.num_bytes for read in reads if read.op == "sketch_score"]
    assert sketches == [WIDTH * UNITS * 6 // 8 + 5 * UNITS * 4] * LAYERS
    want = shapes.weight_bytes(model, 0.25) - norms(model) + shapes.cache_bytes(model, LENGTH)
    assert total(reads) - products(reads) == pytest.approx(want, rel=2e-3)


def test_the_union_of_a_batch_is_read_once_and_a_cache_for_each_sequence(model):
    kept = random_selections.attach_per_sequence(model, 0.1, 0.5, LENGTH, batch=3)
    reads, _ = reads_of(model, kept, batch=3, **{"dejavu.exact": False})
    union = {id(one.part.out): one.share(HEADS).weights for one in kept}
    parts = shapes.mlps(model)[1:]
    want = sum(union[id(part.out)] * part.num_bytes for part in parts)
    rows = ("gathered_rows", "gathered_glu", "gathered_sum")
    got = sum(read.num_bytes for read in reads if read.op in rows)
    assert got == pytest.approx(want, rel=5e-3)  # and biases of rows


def test_exact_zeros_count_as_measured_or_not_at_all(model):
    if shapes.mlps(model)[0].act is not None:
        pytest.skip("a model without exact zeros")
    for part in shapes.mlps(model):
        make_unit_major(part.out, 1, produces_units=False)
    step = DecodeStep(model, model.forward, LENGTH)
    captured = capture_step(step, model.forward, backend="dejavu")
    assert total(captured.reads()) is None
    shares = oracle_step(model, [], LENGTH).shares
    reads = captured.reads(shares)
    sums = [read.num_bytes for read in reads if read.op == "gathered_sum"]
    one = WIDTH * UNITS * 4
    want = [round(shares[id(part.out)].weights * one) for part in shapes.mlps(model)]
    assert sums == want
    assert all(0.3 * one < size < 0.7 * one for size in sums), "random weights: half are zero"


def test_every_op_of_ours_has_its_kernel():
    """A new op has to say which kernel it launches, or that it launches none."""
    names = {name.removeprefix("dejavu::").split(".")[0] for name in torch._C._dispatch_get_all_op_names()
             if name.startswith("dejavu::")}  # fmt: skip
    known = {*KERNEL, *NO_LAUNCH, "select", "select_begin", "decode_attention"}
    assert {name.removesuffix("_cpu") for name in names} <= known
