"""Every op that a CPU runs, and its reference, for shapes, strides and counts that nobody chose."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import kernel_cases

from dejavu_compile import kernels as k

ARRIVED = torch.zeros(4096, dtype=torch.int32)
FORMS = pytest.mark.parametrize("form", ["op", "reference"])


@FORMS
@given(kernel_cases())
def test_compact_lists_what_any_token_exceeds(form, case):
    case.check_compact({"op": k.compact, "reference": k.compact_reference}[form])


@FORMS
@given(kernel_cases())
def test_rows_in_the_order_of_the_selection(form, case):
    run = {"op": k.gathered_rows, "reference": k.gathered_rows_reference}[form]
    case.check_rows(lambda x, w, b, chosen, act: run(x, w, b, *chosen, act))


@FORMS
@given(kernel_cases())
def test_gated_rows_in_the_order_of_the_selection(form, case):
    run = {"op": k.gathered_glu, "reference": k.gathered_glu_reference}[form]
    case.check_glu(lambda x, g, u, chosen, act: run(x, g, None, u, None, *chosen, act))


@FORMS
@given(kernel_cases(), st.booleans())
def test_sum_in_any_order_of_the_selection(form, case, compacted):
    def run(hidden, weight, chosen, by_slot):
        if form == "op":
            return k.gathered_sum(hidden, weight, *chosen, by_slot, ARRIVED)
        return k.gathered_sum_reference(hidden, weight, *chosen, by_slot)

    case.check_sum(run, compacted)


@given(kernel_cases())
def test_gemv_leaves_out_rows_of_heads_that_do_not_run(case):
    case.check_gemv(
        lambda x, weights, owner, score: k.gemv(x, weights, [None, None], "identity", owner, score)
    )


@given(kernel_cases())
def test_head_sum_of_each_tokens_heads(case):
    case.check_head_sum(lambda hidden, weight, score: k.head_sum(hidden, weight, score, ARRIVED))


@FORMS
@given(kernel_cases(), st.booleans(), st.sampled_from([0.0, 2.0]))
def test_attention_of_each_sequences_heads(form, case, masked, softcap):
    op = torch.ops.dejavu.decode_attention_cpu
    case.check_attention({"op": op, "reference": k.attention_reference}[form], masked, softcap)
