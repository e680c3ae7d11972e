import dataclasses

import pytest

from dejavu_compile.cost import SiteCost
from dejavu_compile.passes.site import Execution, Policy

# A gated MLP in fp32: two leaves of 16 features and an output of 16, predictor of rank 4
ROW = 16 * 4
GATED = SiteCost(
    units=100, bytes_per_unit=3 * ROW, carrier_bytes_per_unit=ROW, predictor_bytes=2000
)


SCORED = (Policy.PREDICT, Policy.SKETCH)  # by something that is read for it
SPARSE = (*SCORED, Policy.EXACT, Policy.GATE)


def counted(cost, policy, selected_by_token):
    """Bytes counted unit by unit, for the units that each token selects."""
    union = set().union(*selected_by_token)
    total = cost.predictor_bytes if policy in SCORED else 0
    for unit in range(cost.units):
        carrier = 0 if policy in SCORED else cost.carrier_bytes_per_unit
        total += carrier
        if unit in union or policy is Policy.DENSE:
            total += cost.bytes_per_unit - carrier
    return total


@pytest.mark.parametrize("policy", list(Policy))
@pytest.mark.parametrize("kept", [0, 1, 30, 100])
def test_closed_form_equals_a_count_for_one_token(policy, kept):
    expected = counted(GATED, policy, [set(range(kept))])
    assert GATED.bytes(policy, kept / 100) == pytest.approx(expected)


@pytest.mark.parametrize("policy", SPARSE)
def test_union_of_two_independent_tokens_equals_a_count(policy):
    # Unit u = 10 i + j; one token keeps i < 3, the other j < 3: independent, each 30 %
    first = {10 * i + j for i in range(3) for j in range(10)}
    second = {10 * i + j for i in range(10) for j in range(3)}
    expected = counted(GATED, policy, [first, second])
    assert GATED.bytes(policy, 0.3, tokens=2) == pytest.approx(expected)


@pytest.mark.parametrize("policy", SPARSE)
def test_break_even_reads_as_much_as_dense(policy):
    density = GATED.break_even(policy)
    dense = GATED.bytes(Policy.DENSE, 1.0)
    assert GATED.bytes(policy, density) == pytest.approx(dense)
    assert GATED.bytes(policy, density - 0.01) < dense


def test_predictor_moves_break_even_by_its_share():
    assert GATED.break_even(Policy.PREDICT) == pytest.approx(1 - 2000 / (100 * 3 * ROW))
    assert GATED.break_even(Policy.GATE) == pytest.approx(1.0)
    assert GATED.break_even(Policy.DENSE) == 1.0


def test_more_tokens_never_read_less_and_never_more_than_all():
    for policy in SPARSE:
        sizes = [GATED.bytes(policy, 0.2, tokens) for tokens in range(1, 9)]
        assert sizes == sorted(sizes)
        assert sizes[-1] <= GATED.bytes(policy, 1.0)


def test_a_cache_is_read_a_sequence_and_weights_a_batch():
    heads = SiteCost(
        units=8, bytes_per_unit=100, carrier_bytes_per_unit=0, predictor_bytes=10,
        cache_bytes_per_unit=1000,
    )  # fmt: skip
    assert heads.bytes(Policy.DENSE, 1.0, 4) == 8 * 100 + 4 * 8 * 1000
    # Four sequences choose half each: of 16 heads, one is chosen by nobody
    assert heads.bytes(Policy.PREDICT, 0.5, 4) == pytest.approx(
        8 * 100 * 15 / 16 + 10 + 4 * 4 * 1000
    )
    cache_only = heads.bytes(Policy.PREDICT, 0.5, 4, Execution.CACHE)
    assert cache_only == 8 * 100 + 10 + 4 * 4 * 1000
    density = heads.break_even(Policy.PREDICT)
    assert heads.bytes(Policy.PREDICT, density) == pytest.approx(heads.bytes(Policy.DENSE, 1.0))


def test_on_a_gpu_rows_and_predictors_cost_more_for_several_tokens():
    gpu = dataclasses.replace(GATED, several_cost_more=True)
    # Two tokens of 30 % each select 51 % of the units
    gathered = 0.51 * GATED.units * GATED.bytes_per_unit
    assert gpu.bytes(Policy.PREDICT, 0.3, tokens=2) == pytest.approx(2.1 * gathered + 2 * 2000)
    assert GATED.bytes(Policy.PREDICT, 0.3, tokens=2) == pytest.approx(gathered + 2000)
    carrier = GATED.units * GATED.carrier_bytes_per_unit
    for tokens, times in ((1, 1), (2, 2.1), (4, 2.6), (8, 3.6)):
        full = gpu.bytes(Policy.GATE, 1.0, tokens)
        assert full == pytest.approx(carrier + times * 2 * carrier)
    assert gpu.break_even(Policy.PREDICT) == GATED.break_even(Policy.PREDICT)


def test_on_an_h200_mlps_of_opt_are_sparse_for_two_sequences_and_dense_for_four():
    # OPT-6.7B at 10 %, four layers, timed: 0.62 and 0.74 ms at two sequences, 0.78 and 0.76 at four
    mlp = SiteCost(
        units=16384, bytes_per_unit=4 * 4096, carrier_bytes_per_unit=0, predictor_bytes=10_500_000,
        several_cost_more=True,
    )  # fmt: skip
    assert mlp.bytes(Policy.PREDICT, 0.1, 2) < mlp.bytes(Policy.DENSE, 1.0, 2)
    assert mlp.bytes(Policy.PREDICT, 0.1, 4) > mlp.bytes(Policy.DENSE, 1.0, 4)


def test_on_an_h200_caches_are_skipped_where_that_pays_for_its_launches():
    # The same, half of the heads: at four sequences 1 to 4 % slower than dense, at eight 1 to 3 % faster
    heads = SiteCost(
        units=32, bytes_per_unit=4 * 128 * 4096 * 2, carrier_bytes_per_unit=0, predictor_bytes=32 * 4096 * 2,
        cache_bytes_per_unit=512 * 128 * 2 * 2, several_cost_more=True,
    )  # fmt: skip
    for tokens, pays in ((2, False), (4, False), (8, True), (64, True)):
        skipped = heads.bytes(Policy.PREDICT, 0.5, tokens, Execution.CACHE)
        assert (skipped < heads.bytes(Policy.DENSE, 1.0, tokens)) == pays
    on_cpu = dataclasses.replace(heads, several_cost_more=False)
    saved = 4 * 16 * heads.cache_bytes_per_unit - heads.predictor_bytes
    skipped = on_cpu.bytes(Policy.PREDICT, 0.5, 4, Execution.CACHE)
    assert on_cpu.bytes(Policy.DENSE, 1.0, 4) - skipped == pytest.approx(saved)
