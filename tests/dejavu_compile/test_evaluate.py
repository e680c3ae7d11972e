import math

import pytest
import torch
import torch.nn.functional as F
from tiny import selecting_everything, text, texts, tiny

import dejavu_compile as dv
from dejavu_compile.kernels.nibbles import unpacked


@pytest.fixture(scope="module")
def calibrated():
    model = tiny("opt", layers=3)
    return model, dv.calibrate(model, texts(), policy="predict", density=0.3, progress=False)


def perplexity_with_units_zeroed(model, calibration, ids):
    """By hooks: each layer's predictor reads the previous layer's MLP input, float64 scores."""
    layers = model.model.decoder.layers
    inputs, handles, kept = {}, [], []

    def remember(number):
        return lambda module, args: inputs.__setitem__(number, args[0])

    def zero(number, site):
        predictor = site.predictor

        def hook(module, args):
            source = inputs[number - site.lookahead].double()
            inner = source @ unpacked(predictor.down).double().T
            score = inner @ unpacked(predictor.up).double().T * predictor.scale.double()
            keep = score + predictor.bias.double() > site.threshold
            kept.append(keep.double().mean().item())
            return (args[0] * keep.view(args[0].shape),)

        return hook

    for number, site in enumerate(calibration.sites):
        handles.append(layers[number].fc1.register_forward_pre_hook(remember(number)))
        if site.policy == "predict":
            handles.append(layers[number].fc2.register_forward_pre_hook(zero(number, site)))
    try:
        with torch.no_grad():
            logits = model.forward(ids, use_cache=False).logits[:, :-1].double()
    finally:
        for handle in handles:
            handle.remove()
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    return math.exp(loss.item()), sum(kept) / max(len(kept), 1)


def test_masked_evaluation_equals_zeroing_units_by_hooks(calibrated):
    model, calibration = calibrated
    ids = text(11)
    expected, density = perplexity_with_units_zeroed(model, calibration, ids)
    found = dv.evaluate(model, [ids])
    dense, _ = perplexity_with_units_zeroed(model, calibration.with_sites(()), ids)
    assert found.perplexity_dense == pytest.approx(dense, rel=1e-5)
    assert found.perplexity_sparse == pytest.approx(expected, rel=2e-5)
    assert abs(expected / dense - 1) > 2e-4, "the oracle must tell sparse from dense"
    assert 0.15 < density < 0.45
    assert found.tokens == ids.shape[0] * (ids.shape[1] - 1)


def test_every_unit_selected_is_dense(calibrated):
    _, calibration = calibrated
    other = tiny("opt", layers=3)
    selecting_everything(calibration).attach(other)
    quality = dv.evaluate(other, [text(11)])
    assert quality.perplexity_increase == pytest.approx(0, abs=1e-6)
    assert quality.top1_agreement == 1.0
    assert quality.kl == pytest.approx(0, abs=1e-7)


def test_padding_is_not_counted(calibrated):
    model, _ = calibrated
    ids = text(12, batch=2, length=20)
    mask = torch.ones_like(ids)
    mask[0, 12:] = 0
    padded = dv.evaluate(model, [{"input_ids": ids, "attention_mask": mask}])
    parts = dv.evaluate(model, [ids[:1, :12], ids[1:]])
    assert padded.tokens == parts.tokens == 11 + 19
    assert padded.perplexity_dense == pytest.approx(parts.perplexity_dense, rel=1e-4)
    assert padded.perplexity_sparse == pytest.approx(parts.perplexity_sparse, rel=1e-3)


def test_unusable_models_and_batches_are_refused():
    with pytest.raises(dv.ModelStateError):
        dv.evaluate(tiny("opt").train(), texts())
    with pytest.raises(dv.CalibrationError, match="no batches"):
        dv.evaluate(tiny("opt"), [])
