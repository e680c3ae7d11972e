import math

import pytest
import torch

from dejavu_compile.errors import CalibrationError
from dejavu_compile.kernels.nibbles import unpacked
from dejavu_compile.predictors import (
    Predictor,
    SiteExamples,
    ThresholdCurve,
    contribution_cutoff,
    fit_predictors,
    measure,
    rank_and_bits,
    rank_for_budget,
    shared_threshold_curve,
    threshold_curve,
    threshold_for_density,
    threshold_for_recall,
)
from dejavu_compile.predictors import _slope as slope

WIDTH, UNITS, TRUE_RANK = 24, 64, 4


def planted(seed: int, tokens: int = 3000, dtype: torch.dtype = torch.float32) -> SiteExamples:
    """Units that are a ReLU of a rank-4 map of a source with offset, badly scaled channels."""
    g = torch.Generator().manual_seed(seed)
    clean = torch.randn(tokens, WIDTH, generator=g)
    down = torch.randn(TRUE_RANK, WIDTH, generator=g) / WIDTH**0.5
    up = torch.randn(UNITS, TRUE_RANK, generator=g)
    hidden = (clean @ down.T @ up.T - 2.0).relu()
    scale = torch.logspace(-1, 1, WIDTH)
    column_norm = torch.rand(UNITS, generator=g) + 0.5
    return SiteExamples((clean * scale + 3.0).to(dtype), hidden.to(dtype), column_norm)


@pytest.fixture(scope="module")
def fitted() -> tuple[Predictor, SiteExamples]:
    fit, held_out = planted(0).split(0.2)
    return fit_predictors([fit], [8], seed=0, steps=300)[0], held_out


@pytest.mark.parametrize(
    ("dense_bytes", "width", "units", "bits", "rank"),
    [
        (2 * 256 * 1024 * 2, 256, 1024, 16, 16),  # 20.48 affordable
        (2 * 4096 * 16384 * 2, 4096, 16384, 16, 320),  # 327.68
        (2 * 4096 * 16384 * 2, 4096, 16384, 8, 640),  # 655.36
        (2 * 4096 * 16384 * 2, 4096, 16384, 4, 1024),  # 1310.72, above the largest
        (2 * 2048 * 8192 * 2, 2048, 8192, 4, 640),  # 655.36
        (3 * 4096 * 14336 * 2, 4096, 14336, 16, 464),  # 477.87
        (2 * 64 * 256 * 2, 64, 256, 16, 0),  # 5.12
        (16 * 320 * 20 * 2, 64, 256, 16, 16),  # fits to the byte
        (16 * 320 * 20 * 2 - 1, 64, 256, 16, 0),
        (16 * 320 * 20, 64, 256, 4, 32),
        (16 * 320 * 20 - 1, 64, 256, 4, 0),
    ],
)
def test_rank_is_the_largest_of_whole_vectors_in_budget(dense_bytes, width, units, bits, rank):
    assert rank_for_budget(dense_bytes, width, units, bits) == rank


def test_rank_never_exceeds_the_narrower_side():
    assert rank_for_budget(10**9, 40, 1000, 16) == 32


@pytest.mark.parametrize(
    ("dense_bytes", "width", "units", "least", "form"),
    [
        (2 * 2048 * 8192 * 2, 2048, 8192, 4, (640, 4)),
        (2 * 4096 * 16384 * 2, 4096, 16384, 4, (1024, 4)),  # 1280 would fit
        (2 * 9216 * 36864 * 2, 9216, 36864, 4, (1024, 4)),  # and 1472 in int8
        (2 * 4096 * 16384 * 2, 4096, 16384, 8, (640, 8)),
        (2 * 4100 * 16384 * 2, 4100, 16384, 4, (640, 8)),  # rows of 4100 aren't whole words
        (16 * 320 * 20, 64, 256, 4, (32, 4)),
        (10**9, 64, 256, 4, (64, 8)),  # four bits would buy none
        (100, 64, 256, 4, (0, 8)),
    ],
)
def test_four_bits_where_they_buy_rank(dense_bytes, width, units, least, form):
    assert rank_and_bits(dense_bytes, width, units, least_bits=least) == form


def test_planted_low_rank_units_are_found_at_twice_their_share(fitted):
    predictor, held_out = fitted
    share = (held_out.hidden > 0).float().mean().item()
    threshold = threshold_for_density(predictor.score(held_out.source), 2 * share)
    metrics = measure(predictor, threshold, held_out, torch.eye(UNITS) * held_out.column_norm)
    assert metrics.density == pytest.approx(2 * share, rel=0.01)
    assert metrics.recall > 0.98
    assert metrics.output_error < 0.05


def test_score_is_the_log_of_the_expected_contribution(fitted):
    """Fitted on a source that says nothing, the score of a unit is the log of its mean weight."""
    g = torch.Generator().manual_seed(3)
    examples = SiteExamples(
        torch.ones(2000, 8), torch.rand(2000, 16, generator=g), torch.rand(16, generator=g) + 0.5
    )
    predictor = fit_predictors([examples], [2], seed=0, steps=200)[0]
    mean = (examples.hidden * examples.column_norm).mean(0) / contribution_cutoff(examples)
    torch.testing.assert_close(
        predictor.score(examples.source[:1])[0], mean.log(), atol=0.05, rtol=0.0
    )


def test_slope_is_the_derivative_of_the_weighted_cross_entropy():
    g = torch.Generator().manual_seed(0)
    score = torch.randn(50, 20, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(50, 20, generator=g, dtype=torch.float64) * 30
    runs, skipped = score.sigmoid().log(), (-score).sigmoid().log()
    (derivative,) = torch.autograd.grad(-(weight * runs + skipped).sum(), score)
    torch.testing.assert_close(slope(score.detach(), weight), derivative)


def test_fit_starts_at_what_each_unit_does_on_average():
    examples = planted(1)
    predictor = fit_predictors([examples], [8], seed=0, steps=0)[0]
    assert predictor.up.eq(0).all()
    mean = (examples.hidden * examples.column_norm).mean(0) / contribution_cutoff(examples)
    torch.testing.assert_close(predictor.bias, mean.clamp(min=1e-4).log())


def test_same_seed_gives_same_bits_and_leaves_the_global_rng_alone():
    sites = [planted(0), planted(1)]
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = fit_predictors(sites, [8, 8], seed=5, steps=20)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    second = fit_predictors(sites, [8, 8], seed=5, steps=20)
    other = fit_predictors(sites, [8, 8], seed=6, steps=20)
    for a, b, c in zip(first, second, other, strict=True):
        assert torch.equal(a.down, b.down) and torch.equal(a.up, b.up)
        assert torch.equal(a.bias, b.bias)
        assert not torch.equal(a.down, c.down)


def test_sites_fitted_together_equal_sites_fitted_alone():
    """Also across groups: the third site has another rank, the fourth another length."""
    sites = [planted(0), planted(1), planted(2), planted(3, tokens=2000)]
    ranks = [8, 8, 4, 8]
    together = fit_predictors(sites, ranks, seed=0, steps=30)
    for site, rank, joint in zip(sites, ranks, together, strict=True):
        alone = fit_predictors([site], [rank], seed=0, steps=30)[0]
        assert joint.rank == rank
        torch.testing.assert_close(
            joint.score(site.source), alone.score(site.source), atol=1e-3, rtol=1e-3
        )


def test_bf16_examples_give_fp32_predictors():
    predictor = fit_predictors([planted(0, dtype=torch.bfloat16)], [8], seed=0, steps=2)[0]
    assert {predictor.down.dtype, predictor.up.dtype, predictor.bias.dtype} == {torch.float32}
    for bits, dtype in ((8, torch.int8), (4, torch.uint8)):
        stored = predictor.quantized(bits)
        assert stored.rank == 8
        assert (stored.down.dtype, stored.up.dtype) == (dtype, dtype)
        assert (stored.bias.dtype, stored.scale.dtype) == (torch.float32, torch.float32)
        assert stored.score(torch.ones(2, WIDTH, dtype=torch.bfloat16)).dtype == torch.float32


def test_quantized_predictor_scores_as_the_fp32_one_does(fitted):
    predictor, held_out = fitted
    exact, rounded = (p.score(held_out.source) for p in (predictor, predictor.quantized(8)))
    # The channels' scales spread a hundredfold here, and a row of `down` has one step for all of them.
    assert (rounded - exact).norm() < 0.1 * (exact - exact.mean()).norm()
    threshold = threshold_for_density(exact, 0.2)
    assert ((exact > threshold) != (rounded > threshold)).float().mean() < 0.03


def test_channels_that_hardly_move_do_not_cost_the_others_their_precision():
    """Beside channels with all that is to know, seven of noise, a thousand times quieter."""
    site, g = planted(0), torch.Generator().manual_seed(1)
    noise = torch.randn(site.tokens, 7, generator=g) * 1e-3
    with_noise = SiteExamples(torch.cat([site.source, noise], 1), site.hidden, site.column_norm)
    predictor = fit_predictors([with_noise], [8], seed=0, steps=300)[0]
    assert predictor.down[:, -7:].eq(0).all()
    assert predictor.down[:, :-7].ne(0).all()
    exact, rounded = (p.score(with_noise.source) for p in (predictor, predictor.quantized(8)))
    assert (rounded - exact).norm() < 0.2 * (exact - exact.mean()).norm()


@pytest.mark.parametrize(("bits", "most"), [(8, 127), (4, 7)])
def test_quantized_weights_are_the_fp32_ones_to_half_a_step(fitted, bits, most):
    """With the row scales of `down` moved into `up`, the product is that of the rounded matrices."""
    predictor, _ = fitted
    stored = predictor.quantized(bits)
    down, up = unpacked(stored.down), unpacked(stored.up)
    assert down.abs().amax(dim=1).eq(most).all()
    assert up.abs().amax(dim=1).eq(most).all()
    step = predictor.down.double().abs().amax(dim=1) / most
    down = down.double() * step[:, None]
    assert ((down - predictor.down.double()).abs() <= 0.5001 * step[:, None]).all()
    up = up.double() * stored.scale.double()[:, None] / step
    step_up = (predictor.up.double() * step).abs().amax(dim=1, keepdim=True) / most / step
    assert ((up - predictor.up.double()).abs() <= 0.5001 * step_up).all()


@pytest.mark.parametrize("bits", [32, 8, 4], ids=["fp32", "int8", "int4"])
@pytest.mark.parametrize("density", [0.05, 0.3, 0.9])
def test_selector_bias_says_score_above_threshold(fitted, bits, density):
    predictor, held_out = fitted
    predictor = predictor if bits == 32 else predictor.quantized(bits)
    score = predictor.score(held_out.source)
    threshold = threshold_for_density(score, density)
    inner = held_out.source.double() @ unpacked(predictor.down).double().T
    bias = predictor.selector_bias(threshold).double()
    selector = inner @ unpacked(predictor.up).double().T + bias
    clear = (score - threshold).abs() > 1e-4
    assert torch.equal((selector > 0)[clear], (score > threshold)[clear])
    assert clear.float().mean() > 0.99


def test_selector_bias_of_minus_infinity_selects_everything_and_stays_finite(fitted):
    predictor, held_out = fitted
    predictor = predictor.quantized(8)
    bias = predictor.selector_bias(-math.inf)
    assert bias.isfinite().all()
    inner = held_out.source @ predictor.down.float().T
    assert (inner @ predictor.up.float().T + bias > 0).all()


def test_dead_units_and_dead_channels_stay_finite():
    site = planted(0)
    source, hidden = site.source.clone(), site.hidden.clone()
    source[:, 3], hidden[:, 5] = 7.0, 0.0
    predictor = fit_predictors(
        [SiteExamples(source, hidden, site.column_norm)], [4], seed=0, steps=20
    )[0]
    scores = predictor.score(source)
    assert scores.isfinite().all()
    silent = fit_predictors(
        [SiteExamples(source, hidden * 0, site.column_norm)], [4], seed=0, steps=5
    )[0]
    assert silent.score(source).isfinite().all()


def test_progress_counts_sites_and_steps():
    seen = []
    fit_predictors(
        [planted(0), planted(1), planted(2, tokens=2000)],
        [4, 4, 4],
        seed=0,
        steps=2,
        progress=lambda *event: seen.append(event),
    )
    assert [e for e in seen if e[0] == "prepare"] == [("prepare", i, 3) for i in (1, 2, 3)]
    assert [e for e in seen if e[0] == "fit"] == [("fit", i, 4) for i in (1, 2, 3, 4)]


@pytest.mark.parametrize("name", ["source", "hidden", "column_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_name_the_site(name, value):
    good = planted(0)
    parts = {k: getattr(good, k).clone() for k in ("source", "hidden", "column_norm")}
    parts[name].view(-1)[7] = value
    with pytest.raises(CalibrationError, match=f"site 1 hold NaN or inf in {name}"):
        fit_predictors([good, SiteExamples(**parts)], [4, 4], seed=0, steps=1)


def test_examples_that_cannot_be_used_name_the_site():
    good = planted(0)
    with pytest.raises(CalibrationError, match=r"site 0 has too few examples(.|\n)*10 tokens"):
        fit_predictors([planted(0, tokens=10)], [4], seed=0, steps=1)
    with pytest.raises(CalibrationError, match="site 0 don't belong together"):
        broken = SiteExamples(good.source[1:], good.hidden, good.column_norm)
        fit_predictors([broken], [4], seed=0, steps=1)
    with pytest.raises(CalibrationError, match=r"site 1 can't have(.|\n)*rank 0"):
        fit_predictors([good, good], [4, 0], seed=0, steps=1)
    with pytest.raises(ValueError, match="1 sites, but 2 ranks"):
        fit_predictors([good], [4, 4], seed=0, steps=1)


@pytest.mark.parametrize("density", [0.0, 0.01, 0.25, 0.5, 1.0])
def test_threshold_selects_the_density(density):
    scores = torch.randperm(1000, generator=torch.Generator().manual_seed(0)).float().view(50, 20)
    threshold = threshold_for_density(scores, density)
    assert (scores > threshold).sum().item() == density * 1000


def test_threshold_selects_the_recall():
    g = torch.Generator().manual_seed(0)
    scores, labels = torch.rand(100, 40, generator=g), torch.rand(100, 40, generator=g) < 0.1
    threshold = threshold_for_recall(scores, labels, 0.9)
    assert (scores[labels] > threshold).float().mean().item() == pytest.approx(0.9, abs=0.005)
    assert threshold_for_recall(scores, labels & False, 0.9) == math.inf


def test_curve_agrees_with_single_thresholds_and_interpolates_between_them():
    scores = torch.randn(500, 30, generator=torch.Generator().manual_seed(0))
    curve = threshold_curve(scores)
    for density, threshold in zip(curve.densities, curve.thresholds, strict=True):
        assert curve.at(density) == threshold == threshold_for_density(scores, density)
    assert (scores > curve.at(0.22)).float().mean().item() == pytest.approx(0.22, abs=0.01)
    assert curve.at(1.0) == -math.inf
    assert ThresholdCurve((0.1, 0.2), (4.0, 2.0)).at(0.15) == pytest.approx(3.0)


def test_shared_curve_gives_the_mean_density_and_more_to_the_site_that_needs_it():
    g = torch.Generator().manual_seed(0)
    quiet, busy = torch.randn(400, 30, generator=g) - 1, torch.randn(400, 30, generator=g) + 1
    threshold = shared_threshold_curve(iter([quiet, busy])).at(0.3)
    shares = [(s > threshold).float().mean().item() for s in (quiet, busy)]
    assert sum(shares) / 2 == pytest.approx(0.3, abs=0.001)
    assert shares[1] > 5 * shares[0]


def test_cutoff_leaves_out_the_energy_it_says():
    examples = planted(0)
    cutoff = contribution_cutoff(examples, left_out=0.05)
    energy = (examples.hidden * examples.column_norm).double().square()
    below = energy[energy.sqrt() < cutoff].sum() / energy.sum()
    assert below.item() == pytest.approx(0.05, abs=1e-3)


def test_metrics_equal_their_definitions_in_float64(fitted):
    predictor, held_out = fitted
    w_out = torch.randn(10, UNITS, generator=torch.Generator().manual_seed(1))
    threshold, cutoff = 0.5, 0.3
    metrics = measure(predictor, threshold, held_out, w_out, cutoff=cutoff)
    exact = held_out.source.double() @ predictor.down.double().T @ predictor.up.double().T
    chosen = exact + predictor.bias.double() > threshold
    wanted = held_out.hidden.double() * held_out.column_norm.double() > cutoff
    dense = held_out.hidden.double() @ w_out.double().T
    sparse = torch.where(chosen, held_out.hidden.double(), 0.0) @ w_out.double().T
    assert metrics.density == pytest.approx(chosen.double().mean().item(), abs=1e-4)
    assert metrics.recall == pytest.approx(
        (chosen & wanted).sum().item() / wanted.sum().item(), abs=1e-3
    )
    assert metrics.precision == pytest.approx(
        (chosen & wanted).sum().item() / chosen.sum().item(), abs=1e-3
    )
    assert metrics.output_error == pytest.approx(
        ((dense - sparse).norm() / dense.norm()).item(), rel=1e-3
    )


def test_empty_and_full_selection_are_legal(fitted):
    predictor, held_out = fitted
    nothing = measure(predictor, math.inf, held_out, torch.eye(UNITS))
    assert (nothing.density, nothing.recall, nothing.output_error) == (
        0.0,
        0.0,
        pytest.approx(1.0),
    )
    everything = measure(predictor, -math.inf, held_out, torch.eye(UNITS))
    assert (everything.density, everything.recall, everything.output_error) == (1.0, 1.0, 0.0)
