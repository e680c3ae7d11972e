import math

import pytest
import torch
import torch.nn.functional as F
from tiny import selecting_everything, text, texts, tiny

import dejavu_compile as dv
from dejavu_compile.evaluate import Tally, margin_of
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


# --- the margin ------------------------------------------------------------------------------------

T_95 = {3: 2.3534, 11: 1.7959, 47: 1.6779}  # of a printed table, by degrees of freedom


def alone(increases, tokens):
    """The margin if sequences were independent (Cochran 1977, 6.3)."""
    n = len(tokens)
    rest = increases - tokens * increases.sum() / tokens.sum()
    return T_95[n - 1] * ((rest**2).sum() * n / (n - 1)).sqrt().item() / tokens.sum().item()


def drawn(generator, count, windows, together):
    """Sequences of unequal length, of documents of `windows` each on average; 0.01 is the mean increase of a token.

    `together`: the share of the variance that all sequences of a document have in common.
    """
    tokens = torch.randint(50, 150, (count,), generator=generator).double()
    begins = torch.rand(count, generator=generator) < 1 / windows
    of_document = torch.randn(count, generator=generator).double()[begins.cumsum(0) - 1]
    own = torch.randn(count, generator=generator).double()
    noise = together**0.5 * of_document + (1 - together) ** 0.5 * own
    return tokens * (0.01 + 0.02 * noise), tokens


def coverage(margin, count, windows, together, trials=1000):
    """How often the truth is below the bound, and the mean margin."""
    generator, covered, total = torch.Generator().manual_seed(count), 0, 0.0
    for _ in range(trials):
        increases, tokens = drawn(generator, count, windows, together)
        found = margin(increases, tokens)
        covered += (increases.sum() / tokens.sum()).item() + found >= 0.01
        total += found
    return covered / trials, total / trials


@pytest.mark.parametrize("count", [4, 12, 48])
def test_the_margin_covers_the_truth_19_times_in_20(count):
    covered, margin = coverage(margin_of, count, 1, 0.0)
    expected, least = coverage(alone, count, 1, 0.0)
    assert expected == pytest.approx(0.95, abs=0.02)
    assert expected <= covered
    assert least <= margin <= least * {4: 1.9, 12: 1.7, 48: 1.3}[count], "a margin costs density"


@pytest.mark.parametrize("windows", [2, 3, 4])
def test_the_margin_covers_the_truth_where_neighbours_are_of_one_document(windows):
    covered, _ = coverage(margin_of, 48, windows, 0.6)
    assert coverage(alone, 48, windows, 0.6)[0] < 0.88, "or it would be no test"
    assert covered >= 0.91


def test_the_margin_sees_what_neighbours_share_only_in_reading_order():
    generator, count = torch.Generator().manual_seed(0), 48
    increases = torch.arange(6.0).repeat_interleave(8).double()  # six documents of eight windows
    tokens = torch.full((count,), 100.0).double()
    shuffled = increases[torch.randperm(count, generator=generator)]
    assert margin_of(increases, tokens) > 2 * alone(increases, tokens)
    assert margin_of(shuffled, tokens) < 1.5 * alone(increases, tokens)


def test_the_margin_of_batches_is_that_of_their_sequences():
    """Log probabilities in which the increase is planted: reading order is kept over batches."""
    increases = torch.tensor([0.1, 0.3, 0.2, 0.7, 0.6, 0.9, 0.8])
    tally = Tally()
    for part in increases.split(3):
        dense = torch.full((2 * len(part), 2), math.log(0.5))
        other = dense - part.repeat_interleave(2)[:, None]
        target = torch.zeros(2 * len(part), dtype=torch.int64)
        tally.add(dense, other, target, torch.arange(len(part)).repeat_interleave(2))
    expected = margin_of(2 * increases, torch.full((7,), 2))
    assert tally.result().margin == pytest.approx(expected, rel=1e-5)


def test_a_single_sequence_has_no_margin():
    assert margin_of(torch.tensor([3.0]), torch.tensor([100])) == 0.0


def test_two_sequences_have_the_margin_of_two():
    """t = 6.314 at one degree of freedom, whichever order."""
    expected = 6.3138 * abs(0.03 - 0.01) / 2
    for pair in ([1.0, 3.0], [3.0, 1.0]):
        found = margin_of(torch.tensor(pair), torch.tensor([100, 100]))
        assert found == pytest.approx(expected, rel=1e-4)
