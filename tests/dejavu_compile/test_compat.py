"""What stands between us and torch's private names."""

import pytest
import torch
from torch._higher_order_ops import triton_kernel_wrap

from dejavu_compile import _compat

NAME = next(
    n
    for n in ("identify_accessed_tensors", "identify_mutated_tensors")
    if hasattr(triton_kernel_wrap, n)
)


class Kernel:
    def __init__(self, module):
        self.fn = lambda: None
        self.fn.__module__ = module


OURS, THEIRS = Kernel("dejavu_compile.kernels.rows"), Kernel("somebody.elses")


@pytest.fixture
def analysed(monkeypatch):
    """The kernels that torch really analysed."""
    calls = []

    def analyse(kernel, arguments, *more):
        calls.append(kernel)
        return ["out"]

    monkeypatch.setattr(triton_kernel_wrap, NAME, analyse)
    return calls


def ask(kernel, **arguments):
    return getattr(triton_kernel_wrap, NAME)(kernel, arguments, {})


def test_a_kernel_is_analysed_once_for_launches_that_are_alike(analysed):
    before = getattr(triton_kernel_wrap, NAME)
    with _compat.kernels_analysed_once():
        for _ in range(3):
            assert ask(OURS, x=torch.zeros(2), n=4) == ["out"]
    assert analysed == [OURS]
    assert getattr(triton_kernel_wrap, NAME) is before


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.zeros(2, dtype=torch.float16), "n": 4},
        {"x": torch.zeros(2), "n": 5},
        {"x": torch.zeros(2), "n": True},
        {"x": None, "n": 4},
        {"x": torch.zeros(2), "n": 4, "BLOCK": 8},
    ],
    ids=["dtype", "size", "flag", "absent", "more"],
)
def test_launches_that_differ_are_analysed_apart(analysed, other):
    with _compat.kernels_analysed_once():
        ask(OURS, x=torch.zeros(2), n=4)
        ask(OURS, **other)
    assert len(analysed) == 2


def test_other_peoples_kernels_are_left_to_torch(analysed):
    with _compat.kernels_analysed_once():
        ask(THEIRS, x=torch.zeros(2))
        ask(THEIRS, x=torch.zeros(2))
    assert len(analysed) == 2


def test_an_error_leaves_torch_as_it_was(analysed):
    before = getattr(triton_kernel_wrap, NAME)
    with pytest.raises(KeyError), _compat.kernels_analysed_once():
        raise KeyError
    assert getattr(triton_kernel_wrap, NAME) is before
