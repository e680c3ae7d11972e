"""The ways of calling `generate` that reach the backend, and one that doesn't. (facts: trap 1)"""

import pytest
import torch
from tiny import selecting_everything, text, texts, tiny

import dejavu_compile as dv

SAMPLING = {"do_sample": True, "temperature": 0.9, "top_k": 20}
WAYS = {
    "model.compile": lambda model: model.compile(backend="dejavu_eager"),
    "model.forward": lambda model: setattr(
        model, "forward", torch.compile(model.forward, backend="dejavu_eager")
    ),
}


@pytest.fixture(scope="module")
def everything_selected():
    model = tiny("opt")
    calibration = dv.calibrate(model, texts(), policy="predict", density=1.0, progress=False)
    return selecting_everything(calibration)


def generate(model, inputs, sampling, cache):
    torch.manual_seed(3)
    options = SAMPLING if sampling else {"do_sample": False}
    return model.generate(**inputs, max_new_tokens=6, cache_implementation=cache, **options)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("way", WAYS)
def test_tokens_equal_eager(way, cache, everything_selected, prepared):
    model = tiny("opt")
    everything_selected.attach(model)
    inputs = {"input_ids": text(5, batch=1, length=8)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    expected = [generate(model, inputs, sampling, cache) for sampling in (False, True)]
    assert not prepared
    WAYS[way](model)
    got = [generate(model, inputs, sampling, cache) for sampling in (False, True)]
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)
    assert max(p.plan.num_sparse for p in prepared) == 2


def test_left_padded_batch_of_two_equals_eager(everything_selected, prepared):
    model = tiny("opt")
    everything_selected.attach(model)
    ids = text(5, batch=2, length=8)
    ids[0, :3] = 0
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    expected = generate(model, inputs, False, "dynamic")
    model.compile(backend="dejavu_eager")
    assert torch.equal(generate(model, inputs, False, "dynamic"), expected)
    assert max(p.plan.num_sparse for p in prepared) == 2


def test_generate_of_a_compiled_wrapper_never_reaches_the_backend(prepared):
    """The documented trap: `generate` is looked up on the original model."""
    model = torch.compile(tiny("opt"), backend="dejavu_eager")
    model.generate(text(5, batch=1, length=8), max_new_tokens=3, do_sample=False)
    assert not prepared


@pytest.mark.gpu
@pytest.mark.slow
def test_compile_config_on_a_gpu_equals_eager(everything_selected, prepared):
    from transformers import CompileConfig

    model = tiny("opt").cuda()
    everything_selected.attach(model)
    ids = text(5, batch=1, length=8).cuda()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = generate(model, inputs, False, None)
    got = model.generate(
        **inputs, max_new_tokens=6, do_sample=False, cache_implementation="static",
        compile_config=CompileConfig(backend="dejavu", mode="reduce-overhead"),
    )  # fmt: skip
    assert torch.equal(got, expected)
    assert prepared


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("attached", [True, False], ids=["all units selected", "nothing attached"])
def test_two_thousand_tokens_of_a_trained_decoder_equal_eager(attached, prepared):
    """Through CUDA graphs, past the length that the decoder was trained on: near ties would show what adds up."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, CompileConfig

    path = "demo/models/llama-python-8m"
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval().cuda()
    if attached:
        calibration = dv.calibrate(
            model, [text(5, batch=4, length=128).cuda()] * 3, policy="predict", density=1.0, progress=False
        )  # fmt: skip
        selecting_everything(calibration).attach(model)
    inputs = tokenizer("class Tree:\n    def __init__(self", return_tensors="pt").to("cuda")
    options = {"max_new_tokens": 2000, "min_new_tokens": 2000, "do_sample": True, "top_k": 5,
               "cache_implementation": "static"}  # fmt: skip
    torch.manual_seed(3)
    expected = model.generate(**inputs, **options, disable_compile=True)
    torch.manual_seed(3)
    got = model.generate(
        **inputs, **options, compile_config=CompileConfig(backend="dejavu", mode="reduce-overhead")
    )
    assert expected.shape[1] == inputs["input_ids"].shape[1] + 2000
    assert len(expected.unique()) > 100  # not one phrase over and over
    assert torch.equal(got, expected)
    assert max(p.plan.num_sparse for p in prepared) == (7 if attached else 0)
