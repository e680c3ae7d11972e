"""What stands between us and torch's private names."""

from types import SimpleNamespace

import pytest
import sympy
import torch
from torch._higher_order_ops import triton_kernel_wrap
from torch._inductor.choices import InductorChoices
from torch._inductor.codegen.triton import TritonKernel
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.sizevars import SizeVarAllocator
from torch._inductor.utils import IndentedBuffer
from torch._inductor.virtualized import V

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


# --- programmatic dependent launch -----------------------------------------------------------------------


def test_early_launch_is_known_to_this_torch_and_off_without_a_gpu():
    assert all(hasattr(TritonKernel, name) for name in _compat._GENERATES)
    assert not _compat.has_early_launch(torch.device("cpu"))


def test_a_kernel_lets_the_next_start_and_waits_once_before_all_it_does():
    code = IndentedBuffer()
    wait, start = TritonKernel.GDC_WAIT, TritonKernel.GDC_LAUNCH
    for line in ("x = arange()", wait, "a = load(x)", wait, "b = load(a)", wait, "store(b)"):
        code.writeline(line)
    with _compat.launched_early(2):
        TritonKernel._filter_pdl(None, code)
    expected = ["x = arange()", start, wait, "a = load(x)", "b = load(a)", "store(b)"]
    assert code.getvalue().split("\n")[:-1] == expected


def test_only_kernels_that_say_so_are_launched_early(monkeypatch):
    defined = {}
    monkeypatch.setattr(
        PythonWrapperCodegen, "define_kernel",
        lambda self, name, body, *args, **kwargs: defined.__setitem__(name, body),
    )  # fmt: skip
    ours = "triton_meta={'constants': {'EARLY': False}}"
    theirs = "triton_meta={'constants': {'BLOCK': 8}}"
    with _compat.launched_early(2):
        PythonWrapperCodegen.define_kernel(None, "ours", ours)
        PythonWrapperCodegen.define_kernel(None, "theirs", theirs)
    PythonWrapperCodegen.define_kernel(None, "later", ours)
    early = "triton_meta={'launch_pdl': True, 'constants': {'EARLY': 2}}"
    assert defined == {"ours": early, "theirs": theirs, "later": ours}


def test_torch_is_left_as_it_was():
    names = ("_handle_pdl_before_access", "_handle_pdl_after_load", "_filter_pdl")
    before = [getattr(TritonKernel, name) for name in names]
    with pytest.raises(KeyError), _compat.launched_early(2):
        raise KeyError
    assert [getattr(TritonKernel, name) for name in names] == before


# --- lone rows -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows, width, kept, warps",
    [
        (1, 2048, True, None),
        (1, 4096, True, 32),
        (1, 9216, True, 16),
        (1, 16384, True, 16),
        (1, 16385, False, None),
        (8, 4096, False, None),
        (8, 9216, False, None),
    ],
)
def test_only_a_lone_short_row_is_kept_in_registers(rows, width, kept, warps):
    seen = []

    class Usual(InductorChoices):
        @staticmethod
        def should_use_persistent_reduction(features, cooperative_reduction):
            seen.append(features)
            return False

    features = SimpleNamespace(numel=sympy.Integer(rows), reduction_numel=sympy.Integer(width))
    graph = SimpleNamespace(sizevars=SizeVarAllocator())

    def asked():
        kwargs = V.choices.triton_kernel_kwargs(TritonKernel, features, [], {"features": features})
        assert kwargs.pop("features") is features
        config = kwargs.pop("fixed_config", None)
        assert not kwargs
        persistent = V.choices.should_use_persistent_reduction(features, False)
        return persistent, config and config["num_warps"]

    with V.set_choices_handler(Usual()), V.set_graph_handler(graph):
        before = V.choices
        with _compat.norms_in_one_step():
            assert asked() == (kept, warps)
            for other in (
                {"triton.persistent_reductions": False},
                {"triton.cooperative_reductions": True},
                {"triton.multi_kernel": 1},
            ):
                with _compat.inductor_config.patch(other):
                    assert asked() == (False, None)
        assert V.choices is before
    assert seen == [features] * 4
