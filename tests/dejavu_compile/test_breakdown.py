"""A profile's times add up to the step, and bytes go to the kernels that certainly read them."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dejavu_compile.breakdown import Launch, attributed, breakdown, in_steps, table
from dejavu_compile.step_bytes import ATTENTION, PRODUCT, Read

SEEDS = st.integers(0, 2**32 - 1)


def launches(*kernels, us=10.0):
    return [Launch(kernel, 7, 12.0 * i, us) for i, kernel in enumerate(kernels)]


def drawn_steps(seed):
    """Calls alike, of kernels on two streams that overlap, some launched before the one before has ended."""
    draw, steps, now = random.Random(seed), [], 0.0
    names = [f"k{draw.randint(0, 3)}" for _ in range(draw.randint(1, 12))]
    for _ in range(draw.randint(2, 5)):
        step = []
        for name in names:
            now = max(0.0, now + draw.uniform(0, 5))
            step.append(Launch(name, draw.choice((7, 13)), now, draw.uniform(0.5, 9)))
        now = max(x.start_us + x.us for x in step)
        steps.append(step)
    return steps


@given(SEEDS)
def test_own_times_and_gaps_add_up_to_the_steps(seed):
    steps = drawn_steps(seed)
    parts = breakdown(steps, len(steps), [], 1e12, 100.0)
    ends = [max(x.start_us + x.us for x in step) for step in steps]
    each = (ends[-1] - ends[0]) / (len(steps) - 1)
    total = sum(parts["sum"][key] for key in ("own_us", "gaps_us", "between_steps_us"))
    assert total == pytest.approx(each)
    counted = [launch for step in steps[1:] for launch in step]
    assert sum(k["us"] for k in parts["kernels"]) == pytest.approx(
        sum(x.us for x in counted) / (len(steps) - 1)
    )
    assert all(0 <= k["own_us"] <= k["us"] + 1e-9 for k in parts["kernels"])
    assert parts["sum"]["launches"] == pytest.approx(len(steps[0]))


@given(SEEDS)
def test_calls_that_do_alike_are_told_apart(seed):
    steps = drawn_steps(seed)
    flat = [launch for step in steps for launch in step]
    assert in_steps(flat, len(steps)) == steps
    odd = [*flat, Launch("once", 7, flat[-1].start_us + 100, 1.0)]
    assert in_steps(odd, len(steps)) == [odd]


def test_a_kernel_of_ours_gets_the_bytes_of_its_ops():
    step = launches("_gemv_kernel", "_rows_kernel_3", "_gemv_kernel", "inner_int8_kernel")
    reads = [Read("gemv", "_gemv_kernel", 100, (4, 4)), Read("gathered_rows", "_rows_kernel", 7, (4, 4)),
             Read("gemv", "_gemv_kernel", 20, (9, 4)), Read("select", "inner_kernel", 3, (4, 2))]  # fmt: skip
    want = {"_gemv_kernel": 120, "_rows_kernel_3": 7, "inner_int8_kernel": 3}
    assert attributed(step, reads) == want


def test_what_is_not_certain_has_no_bytes():
    rows = Read("gathered_rows", "_rows_kernel", 5, (4, 4))
    assert attributed(launches("_rows_kernel", "_rows_kernel"), [rows]) == {}, (
        "one launch too many"
    )
    unknown = [rows, Read("gathered_rows", "_rows_kernel", None, (4, 4))]
    assert attributed(launches("_rows_kernel", "_rows_kernel"), unknown) == {}
    new = Read("something_new", "something_new", None)
    assert attributed(launches("_something_new_kernel"), [new]) == {}
    fused = launches(
        "triton_red_fused_add_native_layer_norm_view_6", "Memcpy DtoD (Device -> Device)"
    )
    assert attributed(fused, [rows]) == {}


SPLIT = "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>"
FLASH = "cudnn_generated_fort_native_sdpa_sm80_flash_fprop_wmma_f16_knob_35_16x128x128"
SMALL = "void cutlass::Kernel2<cutlass_80_simt_sgemm_128x32_8x5_tn_align1>"


def test_products_of_a_library_are_told_by_their_order():
    """Names as in a profile of Llama-3-8B on an H100, two layers of attention."""
    wide, narrow = (f"nvjet_sm90_tst_64x8_64x16_{n}x1_v_bz_splitK_TNT" for n in (2, 4))
    pointwise = "triton_poi_fused__scaled_dot_product_cudnn_attention__to_copy_add_bmm_cat_clone_2"
    layer = [wide, SPLIT, narrow, SPLIT, pointwise, FLASH, wide, SPLIT]
    step = launches("triton_poi_fused__to_copy_bmm_expand_unsqueeze_1", SMALL, *layer * 2)
    q, k, o = (
        Read("linear", PRODUCT, n, shape)
        for n, shape in ((64, (8, 8)), (16, (2, 8)), (64, (8, 8)))
    )
    angles, cache = Read("product", PRODUCT, 1, (1, 1)), Read("attention", ATTENTION, 9, (1, 8))
    want = {SMALL: 1, wide: 256, narrow: 32, FLASH: 18}
    assert attributed(step, [angles, *[q, k, cache, o] * 2]) == want
    # one shape by two kernels: the order can't be as it seems
    assert attributed(step, [angles, *[k, q, cache, o] * 2]) == {FLASH: 18}


@pytest.mark.parametrize("angles_first", [True, False])
def test_a_measured_step_is_told_apart(angles_first):
    """Dense Llama-3-8B of 8 layers on an H100: Inductor ran the angles' product after that of the queries."""
    path = (
        Path(__file__).parents[2]
        / "benchmarks"
        / "results"
        / "decode-h100-llama-3-8b-8-layers.json"
    )
    row = json.loads(path.read_text())["runs"][0]["rows"][0]
    step = [Launch(e["kernel"], e["stream"], e["start_us"], e["us"]) for e in row["timeline"]]

    def linear(rows, columns):
        return Read("linear", PRODUCT, 2 * rows * columns, (rows, columns))

    d, ffn, vocabulary = 4096, 14336, 128256
    cache = Read("attention", ATTENTION, 2 * 2 * 8 * 512 * 128, (1, 8, 512, 128))
    layer = [
        linear(d, d),
        linear(1024, d),
        linear(1024, d),
        cache,
        linear(d, d),
        linear(ffn, d),
        linear(ffn, d),
        linear(d, ffn),
    ]
    reads = [*layer * 8, linear(vocabulary, d)]
    reads.insert(0 if angles_first else 1, Read("product", PRODUCT, 260, (1, 1, 1)))
    found = {kernel: size for kernel, size in attributed(step, reads).items() if size > 1000}
    assert found == {
        "nvjet_sm90_tst_64x8_64x16_2x1_v_bz_TNT": 16 * 2 * ffn * d,
        "nvjet_sm90_tst_64x8_64x16_2x1_v_bz_splitK_TNT": 16 * 2 * d * d + 8 * 2 * ffn * d,
        "nvjet_sm90_tst_64x8_64x16_4x1_v_bz_splitK_TNT": 16 * 2 * 1024 * d,
        "nvjet_sm90_tst_384x8_64x4_2x1_v_bz_TNT": 2 * vocabulary * d,
        next(k for k in found if "sdpa" in k): 8 * cache.num_bytes,
    }


def test_a_product_that_inductor_writes_itself_is_one():
    """Names as max-autotune makes them: a template, and a sum of products."""
    names = ["triton_tem_fused_mm_t_view_3", "triton_red_fused__unsafe_view_mm_t_view_7", "triton_red_fused_add_mean_rsqrt_1"]  # fmt: skip
    reads = [Read("linear", PRODUCT, 4, (2, 2)), Read("linear", PRODUCT, 6, (3, 2))]
    assert attributed(launches(*names), reads) == {names[0]: 4, names[1]: 6}


def test_the_table_says_what_is_known():
    steps = [launches("_gemv_kernel", "triton_red_fused_add_0") for _ in range(2)]
    steps[1] = [Launch(x.kernel, 7, x.start_us + 30, x.us) for x in steps[1]]
    parts = breakdown(steps, 2, [Read("gemv", "_gemv_kernel", 5_000_000, (4, 4))], 1e12, 26.0)
    gemv, norm = parts["kernels"]
    assert gemv["share_of_copy"] == pytest.approx(0.5)
    assert gemv["above_floor_us"] == pytest.approx(5.0)
    assert norm["bytes"] is None
    assert parts["sum"]["without_bytes_us"] == pytest.approx(10.0)
    assert parts["sum"]["floor_us"] == pytest.approx(5.0)
    text = table(parts)
    assert "50%" in text
    assert "10.0 of them without known bytes" in text
    assert "must read: 5.0 MB" in text
    assert "not known" in table(breakdown(steps, 2, [Read("x", "x", None)], 1e12, 26.0))
