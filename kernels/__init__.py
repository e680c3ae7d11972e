"""Ops on selected units: each file holds one op's reference, kernel, launcher and registration."""

if __name__ == "kernels":
    # Python run in a checkout meets this folder where transformers asks for Hugging Face's `kernels`
    from ._name import hand_over

    hand_over()
else:
    from ._triton import EARLY, HEADS_START, ROWS_START
    from .attention import attention_reference, decode_attention, decode_attention_cpu
    from .gathered_sum import gathered_sum, gathered_sum_reference
    from .gemv import gemv, gemv_reference
    from .heads import head_sum, head_sum_reference
    from .lookahead import select_begin, select_join
    from .pairs import pack_pairs, unpack_pairs
    from .rows import (
        gathered_glu,
        gathered_glu_reference,
        gathered_rows,
        gathered_rows_reference,
    )
    from .select import select, select_reference
    from .selection import compact, compact_reference
    from .sketch import sketch_score, sketch_score_reference

__all__ = [
    "EARLY",
    "HEADS_START",
    "ROWS_START",
    "attention_reference",
    "compact",
    "compact_reference",
    "decode_attention",
    "decode_attention_cpu",
    "gathered_glu",
    "gathered_glu_reference",
    "gathered_rows",
    "gathered_rows_reference",
    "gathered_sum",
    "gathered_sum_reference",
    "gemv",
    "gemv_reference",
    "head_sum",
    "head_sum_reference",
    "pack_pairs",
    "select",
    "select_begin",
    "select_join",
    "select_reference",
    "sketch_score",
    "sketch_score_reference",
    "unpack_pairs",
]
