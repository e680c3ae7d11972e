"""What torch believes that a kernel writes: its outputs. Whatever else it names is copied at every step."""

import importlib
from dataclasses import dataclass, field

import pytest
import torch
from launched import operations
from torch._higher_order_ops import triton_kernel_wrap

from dejavu_compile.launches import KERNELS, arguments_of

triton = pytest.importorskip("triton")
selection = importlib.import_module("dejavu_compile.kernels.selection")
select = importlib.import_module("dejavu_compile.kernels.select")


@pytest.fixture(autouse=True)
def target(monkeypatch):
    """A GPU to compile for; none is needed."""
    from triton.backends.compiler import GPUTarget

    class Hopper:
        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

    if not torch.cuda.is_available():
        monkeypatch.setattr(triton.runtime.driver, "_active", Hopper())


def believed_written(kernel, arguments):
    """The names that torch finds, as `torch.compile` asks for them."""
    if hasattr(triton_kernel_wrap, "identify_accessed_tensors"):
        accesses = triton_kernel_wrap.identify_accessed_tensors(kernel, arguments, {})
        return {dependency.name for dependency in accesses.read_writes.writes}
    return set(triton_kernel_wrap.identify_mutated_tensors(kernel, arguments, {}))


@dataclass
class Analysed:
    """Stands for a kernel, and keeps the tensors that it is passed, and those that torch believes it writes."""

    kernel: object
    written: list[torch.Tensor] = field(default_factory=list)
    passed: list[torch.Tensor] = field(default_factory=list)

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            options = {"num_warps", "num_stages"}
            named = {k: v for k, v in kwargs.items() if k not in options}
            arguments = dict(zip(self.kernel.arg_names, args, strict=False)) | named
            self.passed += [v for v in arguments.values() if isinstance(v, torch.Tensor)]
            for name in believed_written(self.kernel, arguments):
                self.written.append(arguments[name])

        return launch


def assert_only_outputs(written, *inputs):
    assert written
    given = {tensor.data_ptr() for tensor in inputs}
    assert not given & {tensor.data_ptr() for tensor in written}


def analysed(name):
    """An op's arguments by their names, and its kernel after a launch of it."""
    op, *args = operations(1)[name]
    arguments = arguments_of(op, args)
    kernel = Analysed(KERNELS[op].kernel)
    KERNELS[op].launch(kernel, arguments, None)
    return vars(arguments), kernel


@pytest.mark.parametrize("name", operations(1))
def test_inputs_and_weights_are_not(name):
    arguments, kernel = analysed(name)
    inputs = [v for k, v in arguments.items() if isinstance(v, torch.Tensor) and k != "arrived"]
    lists = [v for v in arguments.values() if isinstance(v, list)]
    assert_only_outputs(kernel.written, *inputs, *(t for v in lists for t in v if t is not None))


@pytest.mark.parametrize("name", operations(1))
def test_an_activation_is_passed_once(name):
    """Inductor writes a copy of it for each time that it is."""
    arguments, kernel = analysed(name)
    for activation in ("x", "q", "hidden", "times", "score"):
        value = arguments.get(activation)
        if value is not None and name != "sketch":  # which makes digits of it first
            assert [t.data_ptr() for t in kernel.passed].count(value.data_ptr()) == 1


@pytest.mark.parametrize("scale", [None, torch.ones(70)], ids=["plain", "scaled"])
@pytest.mark.parametrize("tokens", [1, 3], ids=["m1", "m3"])
def test_values_that_are_compacted_are_not(scale, tokens):
    kernel, values = Analysed(selection._compact_kernel), torch.randn(tokens, 70)
    selection.launch_compact(kernel, values, 0.5, scale)
    assert_only_outputs(kernel.written, values, *([] if scale is None else [scale]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=["fp32", "int8"])
def test_a_predictor_is_not(dtype):
    source, bias = torch.randn(1, 64), torch.randn(96)
    down, up = torch.ones(16, 64, dtype=dtype), torch.ones(96, 16, dtype=dtype)
    kernels = [Analysed(kernel) for kernel in select.select_kernels(source, down, up)]
    select.launch_select(kernels, source, down, up, bias)
    for kernel in kernels:
        assert_only_outputs(kernel.written, source, down, up, bias)


def test_a_gemv_into_caches_writes_these_and_not_their_counter():
    gemv = importlib.import_module("dejavu_compile.kernels.gemv")
    x, weight = torch.randn(1, 16), torch.randn(24, 16)
    keys, values = torch.zeros(2, 1, 3, 5, 8)
    caches = gemv.Caches(keys, values, torch.tensor(2), 0, 1)
    kernel = Analysed(gemv._gemv_kernel)
    gemv.launch_gemv(kernel, x, [weight] * 2, [None] * 2, "identity", caches=caches)
    assert_only_outputs(kernel.written, x, weight, caches.position)
    written = {tensor.data_ptr() for tensor in kernel.written}
    assert {keys.data_ptr(), values.data_ptr()} < written
