"""Small launches of every kernel with block sizes to choose: an op with arguments, and what it must give."""

import torch
from kernel_cases import sketch_inputs

ops = torch.ops.dejavu
UNITS, WIDTH, HEADS, SLOTS = 24, 40, 4, 80


def _randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


def _selection() -> tuple[torch.Tensor, torch.Tensor]:
    index = torch.full((UNITS,), 2**30, dtype=torch.int32)
    units = torch.arange(UNITS)[torch.arange(UNITS) % 3 > 0]
    index[: len(units)] = units
    return index, torch.tensor(len(units), dtype=torch.int32)


def operations(tokens: int, device: str = "cpu") -> dict[str, tuple]:
    """Name -> (op, its arguments)."""
    x, hidden = _randn(tokens, WIDTH), _randn(tokens, UNITS)
    weight, up = _randn(UNITS, WIDTH), _randn(UNITS, WIDTH).flip(0)
    selection, arrived = _selection(), torch.zeros(4096, dtype=torch.int32)
    score = torch.where(torch.arange(tokens * HEADS).view(tokens, HEADS) % 3 > 0, 0.5, -0.5)
    owner = (torch.arange(2 * HEADS) // 2).int()
    heads = WIDTH // HEADS
    q, k, v = (
        _randn(tokens, heads_, slots, heads)
        for heads_, slots in ((HEADS, 1), (HEADS // 2, SLOTS), (HEADS // 2, SLOTS))
    )
    mask = torch.arange(SLOTS).expand(tokens, 1, 1, SLOTS) < 50
    sketch = sketch_inputs(UNITS, 64, tokens)
    made = {
        "rows": (ops.gathered_rows.default, x, weight, _randn(UNITS), *selection, "relu", hidden),
        "glu": (ops.gathered_glu.default, x, weight, None, up, None, *selection, "silu"),
        "sum": (ops.gathered_sum.default, hidden, weight, *selection, True, arrived),
        "sum by unit": (ops.gathered_sum.default, hidden, weight, *selection, False, arrived),
        "gemv": (ops.gemv.default, x, [weight, up[:5]], [_randn(UNITS), None], "gelu"),
        "gemv of heads": (ops.gemv.default, x, [weight, up[:5]], [None, None], "identity", owner, score),
        "head_sum": (ops.head_sum.default, x, _randn(WIDTH, UNITS), score, arrived),
        "attention": (ops.decode_attention.default, q, k, v, mask, 0.3, 0.0, None, arrived),
        "attention of heads": (ops.decode_attention.default, q, k, v, None, 0.3, 2.0, score, arrived),
        "sketch": (ops.sketch_score.default, *sketch, "silu"),
    }  # fmt: skip

    def moved(value):
        if isinstance(value, list):
            return [moved(v) for v in value]
        return value.to(device) if isinstance(value, torch.Tensor) else value

    return {name: (op, *map(moved, args)) for name, (op, *args) in made.items()}
