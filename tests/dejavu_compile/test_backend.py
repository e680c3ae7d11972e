"""The backend changes nothing but speed, as long as nothing is selected away."""

import copy
import re
import warnings

import pytest
import torch
from tiny import HIDDEN, NAMES, selecting_everything, text, texts, tiny
from torch._inductor.utils import run_and_get_code

import dejavu_compile as dv
from dejavu_compile import attachments, backend
from dejavu_compile._compat import compile_counters

STEPS = 4
RELATIVE = 1e-5


@torch.no_grad()
def logits_of_decoding(model, ids, call):
    """Logits of the prefill and of STEPS decode steps, with a dynamic cache."""
    out = call(input_ids=ids, use_cache=True)
    logits = [out.logits]
    for _ in range(STEPS):
        token = logits[-1][:, -1:].argmax(-1)
        out = call(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits)
    return logits


def greedy(model, ids):
    return model.generate(ids, max_new_tokens=6, do_sample=False)


def assert_lossless(model, how="dejavu_eager", *, generating=True):
    ids = text(7, batch=1, length=9)
    expected = logits_of_decoding(model, ids, model.forward)
    tokens = greedy(model, ids) if generating else None
    model.compile(backend=how)
    for got, want in zip(logits_of_decoding(model, ids, model), expected, strict=True):
        assert (got - want).abs().max() <= RELATIVE * want.abs().max()
    if generating:
        assert torch.equal(greedy(model, ids), tokens)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_attached_is_lossless(name):
    assert_lossless(tiny(name, layers=1), generating=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_nothing_attached_generates_the_same_tokens(name):
    assert_lossless(tiny(name))


# The rest of the models are slow only because there are many


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["exact"])
@pytest.mark.parametrize("name", NAMES)
def test_calibrated_at_full_density_is_lossless(name, policy):
    model = tiny(name)
    calibration = dv.calibrate(model, texts(), policy=policy, density=1.0, progress=False)
    assert calibration.quality.perplexity_increase == pytest.approx(0, abs=1e-6)
    assert_lossless(model, generating=False)


@pytest.mark.parametrize(
    ("name", "policy"), [(n, "predict") for n in NAMES] + [("llama", "gate"), ("phi3", "gate")]
)
def test_sparse_graph_that_selects_every_unit_is_lossless(name, policy, prepared):
    model = tiny(name)
    calibration = dv.calibrate(model, texts(), policy=policy, density=1.0, progress=False)
    wanted = [site for site in calibration.sites if site.policy == policy]
    selecting_everything(calibration).attach(model)
    assert_lossless(model, generating=policy == "predict")
    assert wanted
    assert max(p.plan.num_sparse for p in prepared) >= len(wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["opt", "llama"])
def test_lossless_through_inductor(name, prepared):
    model = tiny(name)
    policy = "predict" if name == "opt" else "gate"
    calibration = dv.calibrate(model, texts(), policy=policy, density=1.0, progress=False)
    selecting_everything(calibration).attach(model)
    assert_lossless(model, "dejavu")
    assert max(p.plan.num_sparse for p in prepared) == 2


def test_grad_enabled_is_dense_with_one_warning(monkeypatch, prepared):
    monkeypatch.setattr(backend, "_warned_of_grad", False)
    model = tiny("opt")
    model.compile(backend="dejavu_eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for length in (1, 1, 5):
            out = model(text(0, batch=1, length=length), use_cache=False)
    ours = [w for w in caught if "dejavu" in str(w.message)]
    assert len(ours) == 1
    assert "no_grad" in str(ours[0].message)
    assert not prepared
    out.logits.sum().backward()
    assert model.model.decoder.layers[0].fc2.weight.grad is not None


@torch.no_grad()
def test_relayout_makes_opt_sparse_and_changes_no_parameter(prepared, tmp_path):
    model = tiny("opt")
    before = copy.deepcopy(model.state_dict())
    identities = {name: id(p) for name, p in model.named_parameters()}
    weights = [layer.fc2.weight for layer in model.model.decoder.layers]
    token = torch.tensor([[5]])
    expected = model.forward(token, use_cache=False).logits
    model.compile(backend="dejavu_eager")
    graphs = compile_counters()["graphs"]
    for _ in range(3):
        logits = model(token, use_cache=False).logits
        assert (logits - expected).abs().max() <= RELATIVE * expected.abs().max()
    assert [p.plan.num_sparse for p in prepared] == [0, 2]
    assert compile_counters()["graphs"] - graphs <= 2
    assert {name: id(p) for name, p in model.named_parameters()} == identities
    for name, value in model.state_dict().items():
        assert value.shape == before[name].shape
        assert torch.equal(value, before[name])
    for weight in weights:
        assert weight.stride() == (1, HIDDEN)
        assert weight.untyped_storage().nbytes() == weight.numel() * 4
        assert attachments.is_unit_major(weight, 1, produces_units=False)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded(token, use_cache=False).logits, expected)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, before[name])


# --- what Inductor is given and what it makes of it --------------------------------------------------


@pytest.fixture(scope="module")
def predicted():
    """An OPT of three layers whose second and third site are predicted."""
    model = tiny("opt", layers=3)
    dv.calibrate(model, texts(), policy="predict", density=0.3, progress=False)
    return model


@pytest.mark.slow
@torch.no_grad()
def test_generated_code_predicts_before_the_previous_layers_down_projection(predicted):
    compiled = torch.compile(predicted.forward, backend="dejavu")
    torch._inductor.config.force_disable_caches = True
    try:
        _, sources = run_and_get_code(compiled, torch.tensor([[5]]), use_cache=False)
    finally:
        torch._inductor.config.force_disable_caches = False
    lines = sources[-1].splitlines()

    def calls(op):
        found = [i for i, line in enumerate(lines) if f"= torch.ops.dejavu.{op}" in line]
        return [i for i in found if not lines[i].lstrip().startswith("#")]

    selects, sums = calls("select"), calls("gathered_sum")
    assert (len(selects), len(sums)) == (2, 3), [lines[i] for i in (*selects, *sums)]
    # Site 0 is exact, so sums[k] is layer k's down projection, and selects[k] serves layer k + 1.
    for number, select in enumerate(selects):
        assert select < sums[number]


@torch.no_grad()
def test_added_buffers_are_static_inputs_as_parameters_are(predicted, monkeypatch):
    from torch._guards import TracingContext

    static = []

    def inner(gm, example_inputs, **kwargs):
        metadata = TracingContext.get().fw_metadata
        static.append(len(metadata.static_input_indices))
        return gm.forward

    real = backend.compile_fx

    def outer(gm, example_inputs, config_patches=None):
        return real(gm, example_inputs, inner_compile=inner, config_patches=config_patches)

    monkeypatch.setattr(backend, "compile_fx", outer)
    parameters = len(list(predicted.parameters()))
    torch.compile(predicted.forward, backend="dejavu", options={"dejavu.execution": "dense"})(
        torch.tensor([[5]]), use_cache=False
    )
    torch.compiler.reset()
    torch.compile(predicted.forward, backend="dejavu")(torch.tensor([[5]]), use_cache=False)
    predictors, counters = 2 * 3, 1  # layers 1 and 2 have two matrices and a bias each
    assert static == [parameters, parameters + predictors + counters]


def without_numbers_of_graphs(code):
    """Generated code but for the ids that count the graphs of a process."""
    return re.sub(r"AOT ID: .*|_graph_\d+|\d+_inference", "", code)


@pytest.mark.parametrize("case", ["no site is found", "switched off"])
def test_inductor_generates_the_same_code_where_we_do_nothing(case):
    if case == "no site is found":
        model, x = (
            torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8)),
            torch.ones(1, 8),
        )
        options = {}
    else:
        model, x = tiny("opt", layers=1).model.decoder.layers[0], torch.randn(1, 1, HIDDEN)
        options = {"dejavu.execution": "dense"}
    codes = []
    for how, given in (("inductor", {}), ("dejavu", options)):
        torch.compiler.reset()
        compiled = torch.compile(model.eval(), backend=how, options=given)
        with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
            _, (code,) = run_and_get_code(compiled, x)
        codes.append(without_numbers_of_graphs(code))
    assert "mm" in codes[0]
    assert codes[0] == codes[1]
