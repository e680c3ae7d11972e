"""What the benchmarks attach does what their oracle says, and the bytes that they report are those."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from tiny import tiny
from transformers import AutoModelForCausalLM, Gemma3nTextConfig, LlamaConfig

from dejavu_compile import bench, decode_step, detach, random_selections, shapes
from dejavu_compile._compat import compile_counters
from dejavu_compile.attachments import attached, make_unit_major
from dejavu_compile.backend import dejavu_eager
from dejavu_compile.errors import OptionError

LENGTH, LAYERS, WIDTH, UNITS = 128, 3, 128, 512
SHAPES = {
    "opt": shapes.opt(WIDTH, UNITS, LAYERS, 8),
    "llama": LlamaConfig(
        vocab_size=1024, hidden_size=WIDTH, intermediate_size=UNITS, num_hidden_layers=LAYERS,
        num_attention_heads=8, num_key_value_heads=2, tie_word_embeddings=False,
    ),
}  # fmt: skip


@pytest.fixture(params=SHAPES)
def model(request, monkeypatch):
    monkeypatch.setattr(shapes, "SHAPES", SHAPES)
    return shapes.build(request.param, "cpu", torch.float32, context=LENGTH)


def sparse_logits(model, batch):
    forward = torch.compile(model.forward, backend="dejavu_eager", options={"dejavu.exact": False})
    return decode_step.DecodeStep(model, forward, LENGTH, batch)()


def attach_and_compare(model, kept, batch, prepared):
    want = decode_step.oracle_logits(model, kept, LENGTH, batch)
    dense = decode_step.oracle_logits(model, [], LENGTH, batch)
    assert (want - dense).abs().max() > 1e-3 * dense.abs().max(), "the oracle must tell"
    got = sparse_logits(model, batch)
    assert prepared[-1].plan.num_sparse == len(kept)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_random_predictors_select_what_the_oracle_keeps(model, batch, prepared):
    kept = random_selections.attach_random_predictors(model, 0.1, head_density=0.5)
    assert len(kept) == 2 * (LAYERS - 1)
    attach_and_compare(model, kept, batch, prepared)


@torch.no_grad()
def test_a_compiled_step_runs_the_other_units_for_a_while(model):
    random_selections.attach_random_predictors(model, 0.1)
    forward = torch.compile(model.forward, backend="dejavu_eager", options={"dejavu.exact": False})
    step = decode_step.DecodeStep(model, forward, LENGTH, 1)

    def logits():
        step.reset()
        return step().clone()

    before = logits()
    with random_selections.the_other_units(model):
        assert (logits() - before).abs().max() > 1e-3 * before.abs().max()
    assert torch.equal(logits(), before)


@torch.no_grad()
def test_a_program_that_runs_the_last_steps_units_fails_the_check(model):
    kept = random_selections.attach_random_predictors(model, 0.1)
    want = decode_step.oracle_logits(model, kept, LENGTH, 1)
    before = []

    def a_step_late(gm, example_inputs):
        run = dejavu_eager(gm, example_inputs, options={"dejavu.exact": False})

        def late(*args):
            before.append(run(*args))
            return before[-2] if len(before) > 1 else before[-1]

        return late

    settled, unsettled = (
        bench.measure(model, "late", LENGTH, 2, want, 1, otherwise=otherwise, backend=a_step_late)
        for otherwise in (nullcontext, partial(random_selections.the_other_units, model))
    )
    assert unsettled["error"] > 10 * settled["error"]


@torch.no_grad()
def test_each_sequence_of_a_batch_runs_its_own_heads(model, prepared):
    kept = random_selections.attach_per_sequence(model, None, 0.5, LENGTH, batch=3)
    assert len(kept) == LAYERS - 1
    assert all((k.mask[0] != k.mask[1]).any() for k in kept)
    attach_and_compare(model, kept, 3, prepared)


@torch.no_grad()
def test_each_sequence_of_a_batch_selects_its_own_neurons_and_heads(model, prepared):
    kept = random_selections.attach_per_sequence(model, 0.1, 0.5, LENGTH, batch=3)
    assert len(kept) == 2 * (LAYERS - 1)
    unions = [one.share(2).weights for one in kept if one.part.is_mlp]
    assert all(0.2 < union < 0.3 for union in unions), "three sequences, a tenth for each"
    attach_and_compare(model, kept, 3, prepared)


@torch.no_grad()
def test_heads_of_each_sequence_are_found_beside_other_selections(model, prepared):
    kept = random_selections.attach_random_predictors(model, 0.1)
    kept += random_selections.attach_per_sequence(model, None, 0.5, LENGTH, 3, kept)
    attach_and_compare(model, kept, 3, prepared)


@torch.no_grad()
def test_what_is_kept_is_that_of_the_same_part_in_another_model(model):
    other = shapes.build(
        "opt" if hasattr(model.model, "decoder") else "llama", "cpu", torch.float32
    )
    kept = random_selections.attach_random_predictors(model, 0.1, head_density=0.5)
    for one in kept:
        twin = one.in_model(model, other)
        assert twin.mask is one.mask
        name = next(n for n, p in model.named_parameters() if p is one.part.out)
        assert twin.part.out is other.get_parameter(name)


@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_gates_select_what_the_oracle_keeps(model, batch, prepared):
    if shapes.mlps(model)[0].act is None:
        pytest.skip("a model without gates")
    kept = random_selections.attach_gates(model, 0.5, LENGTH, batch)
    assert len(kept) == LAYERS
    attach_and_compare(model, kept, batch, prepared)


@torch.no_grad()
def test_every_step_that_is_timed_selects_as_many_gates(model):
    if shapes.mlps(model)[0].act is None:
        pytest.skip("a model without gates")
    shares = []
    for one in random_selections.attach_gates(model, 0.5, LENGTH):
        one.part.act.register_forward_hook(
            lambda module, args, out, one=one: shares.append((out[:, -1].abs() > one.threshold).float().mean())
        )  # fmt: skip
    step = decode_step.DecodeStep(model, model.forward, LENGTH)
    del shares[:]
    for _ in range(bench.TOGETHER + 1):
        step()
    assert len(shares) == LAYERS * (bench.TOGETHER + 1)
    assert all(abs(share - 0.5) < 0.01 for share in shares)


@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_sketches_select_what_the_oracle_keeps(model, batch, prepared):
    if shapes.mlps(model)[0].act is None:
        pytest.skip("a model without gates")
    kept = random_selections.attach_random_sketches(model, 0.4)
    assert len(kept) == LAYERS
    attach_and_compare(model, kept, batch, prepared)
    one, sketch = WIDTH * UNITS * 4, LAYERS * (WIDTH * UNITS * 6 // 8 + 5 * UNITS * 4)
    dense = shapes.weight_bytes(model, None)
    assert shapes.weight_bytes(model, 0.4) == pytest.approx(
        dense - LAYERS * 3 * 0.6 * one + sketch, rel=2e-3
    )


def test_bytes_are_counted_from_what_is_attached(model):
    dense = shapes.weight_bytes(model, None)
    parts = shapes.mlps(model)
    one = WIDTH * UNITS * 4
    random_selections.attach_random_predictors(model, 0.25)
    predictor = attached(parts[1].out).predictor.num_bytes
    matrices = 1 + len(parts[0].into)
    saved = (LAYERS - 1) * (0.75 * matrices * one - predictor)
    assert shapes.weight_bytes(model, 0.25) == pytest.approx(dense - saved)
    detach(model)
    if parts[0].act is not None:
        random_selections.attach_gates(model, 0.25, LENGTH)
        assert shapes.weight_bytes(model, 0.25) == pytest.approx(dense - LAYERS * 0.75 * 2 * one)


def test_cache_bytes_of_shared_keys_count_a_group_once(model):
    heads, head_dim = 8, WIDTH // 8
    groups = getattr(model.config, "num_key_value_heads", None) or heads
    assert shapes.cache_bytes(model, 100) == 2 * LAYERS * groups * head_dim * 100 * 4
    share = 1 - 0.5 ** (heads // groups)
    want = 2 * (1 + (LAYERS - 1) * share) * groups * head_dim * 100 * 4
    assert shapes.cache_bytes(model, 100, 0.5) == pytest.approx(want, abs=1)


def test_a_sample_on_a_gpu_begins_behind_one_more_call(monkeypatch):
    happened = []

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            happened.append("event")

        def elapsed_time(self, end):
            return 6.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: happened.append("wait"))
    times = bench.time_us(
        lambda: happened.append("call"), 2, warmup=0, together=3, prepare=lambda: happened.append("prepare")
    )  # fmt: skip
    sample = ["prepare", "wait", "call", "event", "call", "call", "call", "event", "wait"]
    assert happened == 2 * sample
    assert times["p50"] == 2000.0


@torch.no_grad()
def test_measure_reports_errors_and_recompiles(model):
    before = compile_counters()["graphs"]
    want = decode_step.oracle_logits(model, [], LENGTH)
    row = bench.measure(model, "dense", LENGTH, 10, want, backend="eager")
    assert compile_counters()["graphs"] > before
    assert row["error"] < 1e-5
    assert row["recompiles"] == 0
    assert 0 < row["p20"] <= row["p50"] <= row["p80"]


@torch.no_grad()
def test_a_prompt_in_parts_is_the_same_prompt(model, monkeypatch):
    whole = decode_step.DecodeStep(model, model.forward, LENGTH, batch=2)()
    monkeypatch.setattr(decode_step, "PROMPT_CHUNK", 24)
    parts = decode_step.DecodeStep(model, model.forward, LENGTH, batch=2)()
    assert (parts - whole).abs().max() <= 1e-5 * whole.abs().max()


def small_gemma():
    """Layers with and without a sparse gate, sliding windows, and keys shared by the last."""
    return Gemma3nTextConfig(
        vocab_size=1024, vocab_size_per_layer_input=1024, hidden_size=WIDTH, intermediate_size=UNITS,
        num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, head_dim=32, laurel_rank=8,
        hidden_size_per_layer_input=16, num_kv_shared_layers=2, sliding_window=LENGTH,
        layer_types=["sliding_attention", "full_attention"] * 3, activation_sparsity_pattern=[0.95] * 2 + [0.0] * 4,
    )  # fmt: skip


@pytest.mark.parametrize("layers", [None, 3])
@torch.no_grad()
def test_gemma_runs_its_own_sparse_layers_exactly(layers, monkeypatch, prepared):
    monkeypatch.setitem(shapes.SHAPES, "gemma", small_gemma())
    model = shapes.build("gemma", "cpu", torch.float32, layers, context=LENGTH)
    for part in shapes.mlps(model):
        make_unit_major(part.out, 1, produces_units=False)
        make_unit_major(part.into[1], 1, produces_units=True)
    step = decode_step.DecodeStep(model, model.forward, LENGTH)
    want = step().clone()
    step.reset()
    assert torch.equal(step(), want), "a step can be taken again"
    oracle = decode_step.oracle_step(model, [], LENGTH)
    sparse = [oracle.shares[id(part.out)].weights for part in shapes.mlps(model)[:2]]
    assert all(0.01 < share < 0.1 for share in sparse)
    got = decode_step.DecodeStep(
        model, torch.compile(model.forward, backend="dejavu_eager"), LENGTH
    )()
    policies = [
        p.decision.policy
        for p in prepared[-1].plan.sites
        if p.site.name.endswith("down_proj.weight")
    ]
    assert policies == ["exact"] * 2 + ["dense"] * (model.config.num_hidden_layers - 2)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@torch.no_grad()
def test_gemma_compiles_nothing_while_it_is_timed(monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "gemma", small_gemma())
    model = shapes.build("gemma", "cpu", torch.float32, 3, context=LENGTH)
    want = decode_step.oracle_logits(model, [], LENGTH)
    row = bench.measure(model, "dense", LENGTH, 3, want, backend="eager")
    assert row["error"] < 1e-5
    assert row["recompiles"] == 0


def test_the_published_gemma_has_its_size():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shapes.SHAPES["gemma-3n-e4b"])
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(6.87e9, rel=0.01)
    assert [part.act is None for part in shapes.mlps(model)] == [True] * 10 + [False] * 25


def test_a_cache_longer_than_a_sliding_window_is_refused(monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "gemma", small_gemma())
    model = shapes.build("gemma", "cpu", torch.float32, context=LENGTH)
    with pytest.raises(OptionError, match="longer than this model's sliding window"):
        decode_step.DecodeStep(model, model.forward, 2 * LENGTH)


@pytest.mark.parametrize(("name", "into"), [("opt", 1), ("nemotron", 1), ("llama", 2)])
def test_the_parts_of_an_mlp(name, into):
    model = tiny(name)
    parts = shapes.mlps(model)
    assert len(parts) == model.config.num_hidden_layers
    for part in parts:
        assert [tuple(w.shape) for w in part.into] == [(part.units, part.out.shape[0])] * into
        assert (part.act is not None) == (into == 2)
