"""Every private torch name that this project uses, in one place.

Supported and tested: torch 2.11 and 2.13. When a new torch moves one of these, this is the only file
that changes.
"""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import fx, nn
from torch._dynamo import config as dynamo_config
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.source import GlobalSource
from torch._dynamo.utils import counters
from torch._functorch._aot_autograd.schemas import AOTConfig
from torch._functorch.aot_autograd import construct_fake_mode, process_inputs
from torch._guards import TracingContext
from torch._higher_order_ops import triton_kernel_wrap
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options, list_options
from torch._inductor.codecache import CppCodeCache
from torch._inductor.codegen.triton import FixedTritonConfig, TritonKernel
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import make_fx

__all__ = [
    "EARLY_LAUNCH",
    "CustomGraphPass",
    "FakeTensor",
    "TracingContext",
    "add_static_buffer",
    "check_strides_every_call",
    "compile_counters",
    "compile_fx",
    "guard_identity",
    "has_early_launch",
    "inductor_cache_dir",
    "inductor_option_names",
    "kernels_analysed_once",
    "launched_early",
    "list_mode_options",
    "load_cpp",
    "names_in",
    "norms_in_one_step",
    "qualified_name",
    "recompile_limit",
    "trace_to_aten",
    "unset_fake_temporarily",
]


def trace_to_aten(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    """Trace `gm` to pre-dispatch ATen: `linear` and `scaled_dot_product_attention` stay whole.

    The inputs are made fake the way AOTAutograd will make them fake afterwards, in the same fake mode
    and shape environment, so that symbolic sizes stay the same symbols and no guard is added.
    """
    config = AOTConfig(
        fw_compiler=None,
        bw_compiler=None,
        partition_fn=None,
        decompositions={},
        num_params_buffers=0,
        aot_id=0,
        keep_inference_input_mutations=True,
        dynamic_shapes=True,
    )
    inputs = list(example_inputs)
    fake_mode, shape_env = construct_fake_mode(inputs, config)
    if any(True for _ in gm.parameters()):
        # A graph module that still owns its parameters (`symbolic_trace`, `export`) mixes them in.
        fake_mode.allow_non_fake_inputs = True
    fake_inputs = process_inputs(inputs, config, fake_mode, shape_env)
    # torch 2.13 returns (inputs, indices of async collectives), 2.11 the inputs alone
    if isinstance(fake_inputs, tuple):
        fake_inputs = fake_inputs[0]
    with fake_mode, torch.no_grad():
        return make_fx(gm, pre_dispatch=True)(*fake_inputs)


def storage_id(tensor: torch.Tensor) -> int:
    """Which memory a tensor lies in: a number that it shares with its views, and with nothing else that lives."""
    return tensor.untyped_storage()._cdata


def qualified_name(node: fx.Node) -> str | None:
    """The qualified name of the parameter or buffer that a Dynamo placeholder stands for.

    `L['self']._modules['lm_head']._parameters['weight']` becomes `lm_head.weight`.
    """
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        return None
    # `name` is a property from torch 2.12 on, a method before
    name = source.name() if callable(source.name) else source.name
    if "_parameters" not in name and "_buffers" not in name:
        return None
    keys = [part.split("']")[0] for part in name.split("['")[1:]]
    root = keys[0] if name.startswith("L[") else None
    return ".".join(keys[1:] if root is not None else keys)


def names_in(model: nn.Module, gm: fx.GraphModule, inputs: Sequence[Any]) -> dict[str, str]:
    """`qualified_name` of each parameter that a graph reads -> its name in `model`.

    They differ where a graph was captured from a part of the model, after a graph break.
    """
    known = {id(p): name for name, p in model.named_parameters()}
    known |= {id(p): name for name, p in model.named_buffers()}
    placeholders = gm.graph.find_nodes(op="placeholder")
    pairs = zip(map(qualified_name, placeholders), inputs, strict=True)
    return {name: known[id(x)] for name, x in pairs if name is not None and id(x) in known}


def add_static_buffer(gm: fx.GraphModule, name: str, tensor: torch.Tensor) -> None:
    """Register `tensor` on a Dynamo GraphModule so that Inductor treats it as it does a parameter.

    A buffer without a recorded source is a dynamic input: CUDA graphs would copy it every step.
    """
    gm.register_buffer(name, tensor, persistent=False)
    sources = getattr(gm, "_param_name_to_source", None)
    if sources is None:
        sources = {}
        gm._param_name_to_source = sources
    sources[name] = GlobalSource(name)


def guard_identity(node: fx.Node) -> None:
    """While the backend runs: make Dynamo's guards ask for the very tensor that `node` stands for now.

    Its own guards accept any parameter of the same shape: another model's of the same class. Does
    nothing for a node that Dynamo didn't make, in graphs that are compiled by hand.
    """
    source = getattr(node, "_dynamo_source", None)
    if source is not None and TracingContext.try_get() is not None:
        install_guard(source.make_guard(GuardBuilder.ID_MATCH))


def check_strides_every_call() -> None:
    """Make guards that are built from now on look at each parameter, not only at its module's dict.

    torch 2.11 skips parameters of modules whose dict is unchanged, in two ways, and would run a graph
    that was compiled for other strides; later versions look by default.
    """
    dynamo_config.use_recursive_dict_tags_for_guards = False
    dynamo_config.skip_tensor_guards_with_matching_dict_tags = False


def recompile_limit(limit: int) -> AbstractContextManager[None]:
    """Meanwhile Dynamo makes up to `limit` graphs of a function before it gives up."""
    return dynamo_config.patch(recompile_limit=limit, accumulated_recompile_limit=limit)


def compile_counters() -> dict[str, int]:
    """Graphs compiled and CUDA graphs skipped so far in this process."""
    return {
        "graphs": counters["stats"]["unique_graphs"],
        "cudagraph_skips": counters["inductor"]["cudagraph_skips"],
    }


def inductor_option_names() -> set[str]:
    """The names that Inductor accepts as options."""
    return set(list_options())


def inductor_cache_dir() -> str:
    """Where Inductor keeps what it compiled: `TORCHINDUCTOR_CACHE_DIR`, or a folder of the user's among temporary files."""
    return cache_dir()


def load_cpp(source: str) -> Any:
    """Compile C++ source with the flags of Inductor's own kernels, and load it (a ctypes.CDLL).

    Kept in Inductor's cache on disk by its content. Raises what the compiler raises.
    """
    return CppCodeCache.load(source)


@contextmanager
def kernels_analysed_once() -> Iterator[None]:
    """Remember what each of our Triton kernels writes, while a graph is compiled.

    Torch works it out from the kernel's MLIR, twice a launch and 0.03 to 0.15 s each time: 40 s of the compile of
    a decoder of 32 layers, whose launches are all alike.
    """
    # torch 2.13's name, torch 2.11's
    names = ("identify_accessed_tensors", "identify_mutated_tensors")
    name = next((n for n in names if hasattr(triton_kernel_wrap, n)), None)
    if name is None:
        yield
        return
    analyse, known = getattr(triton_kernel_wrap, name), {}

    def once(kernel: Any, arguments: dict[str, Any], *more: Any) -> Any:
        function = getattr(kernel, "fn", None)
        if not getattr(function, "__module__", "").startswith("dejavu_compile."):
            return analyse(kernel, arguments, *more)
        key = (function, *((name, _kind(value)) for name, value in arguments.items()))
        if key not in known:
            known[key] = analyse(kernel, arguments, *more)
        return known[key]

    setattr(triton_kernel_wrap, name, once)
    try:
        yield
    finally:
        setattr(triton_kernel_wrap, name, analyse)


def _kind(value: Any) -> Hashable:
    """What of an argument a kernel's code depends on."""
    if isinstance(value, int | float | str | bool | None):
        return type(value), value
    dtype = getattr(value, "dtype", None)
    if dtype is None and callable(getattr(value, "get_dtype", None)):
        dtype = value.get_dtype()
    return type(value), dtype if dtype is not None else str(value)


ONE_STEP = 16384  # elements that a program holds
EIGHT_WARPS = 2048  # of which so many are held well by the warps that Inductor gives it
PARTS = 8192  # about as long are rows of which a norm first adds up the parts that a sum left: more warps read more at a time


@contextmanager
def norms_in_one_step() -> Iterator[None]:
    """Meanwhile Inductor keeps a lone row of up to `ONE_STEP` elements in registers, where else it goes through it twice.

    The norm of one token: 0.8 % of a step of Llama-3-8B, 3 % of OPT-66B. (H200)
    """
    base = type(V.choices)

    class OneStep(base):
        @staticmethod
        def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
            usual = base.should_use_persistent_reduction(features, cooperative_reduction)
            return _is_lone_row(features, 0, ONE_STEP) or usual

        def triton_kernel_kwargs(
            self, kernel_cls: Any, features: Any, groups: Any, kernel_kwargs: dict[str, Any]
        ) -> dict[str, Any]:
            kwargs = super().triton_kernel_kwargs(kernel_cls, features, groups, kernel_kwargs)
            if kernel_cls is TritonKernel and _is_lone_row(features, EIGHT_WARPS, ONE_STEP):
                warps = 32 if _is_lone_row(features, EIGHT_WARPS, PARTS) else 16
                config = FixedTritonConfig({"XBLOCK": 1, "num_warps": warps, "num_stages": 1})
                kwargs = {**kwargs, "fixed_config": config}
            return kwargs

    with V.set_choices_handler(OneStep()):
        yield


def _is_lone_row(features: Any, above: int, longest: int) -> bool:
    """A reduction of one row of more than `above` elements, in the form that Inductor has for it by default."""
    triton, sizes, length = inductor_config.triton, V.graph.sizevars, features.reduction_numel
    other_forms = (
        triton.cooperative_reductions,
        triton.force_cooperative_reductions,
        triton.multi_kernel,
    )
    return (
        features.numel == 1
        and sizes.statically_known_leq(length, longest)
        and not sizes.statically_known_leq(length, above)
        and triton.persistent_reductions
        and not any(other_forms)
    )


EARLY_LAUNCH = "triton.enable_pdl"  # Inductor's option for its own kernels
_GENERATES = (
    "_enable_pdl_codegen",
    "_handle_pdl_before_access",
    "_handle_pdl_after_load",
    "_filter_pdl",
)


def has_early_launch(device: torch.device) -> bool:
    """Whether kernels on this device can be launched before their predecessors end.

    Programmatic dependent launch: CUDA, compute capability 9.0 and up.
    """
    return (
        device.type == "cuda"
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(device) >= (9, 0)
        and hasattr(inductor_config.triton, "enable_pdl")
        and all(hasattr(TritonKernel, name) for name in _GENERATES)
    )


@contextmanager
def launched_early(mode: int) -> Iterator[None]:
    """Meanwhile Inductor gives all kernels programmatic dependent launch, ours among them in this `mode`, their EARLY.

    For graphs compiled with `EARLY_LAUNCH`. Inductor's own kernels would wait only where they read what the kernel
    before wrote; here every one lets the next start, and then waits, so that the end of one is the end of all before it.
    Ours are written so; of them Inductor only needs to hear it.
    """
    wait, start = TritonKernel.GDC_WAIT, TritonKernel.GDC_LAUNCH

    def before_access(self: Any, buffer: Any, *dependencies: Any, **_: Any) -> None:
        if self._enable_pdl_codegen():
            looped = self.inside_reduction and self.range_trees[-1].is_loop
            (self.body if looped else buffer).writeline(wait)

    def after_load(self: Any, *_: Any) -> None:
        """Said at the beginning."""

    def filtered(self: Any, code: Any) -> None:
        is_wait = [type(line) is str and wait in line for line in code._lines]
        if any(is_wait):
            first = is_wait.index(True)
            lines = [line for line, waits in zip(code._lines, is_wait, strict=True) if not waits]
            line = code._lines[first]
            code._lines = [*lines[:first], line.replace(wait, start), line, *lines[first:]]

    define_kernel = PythonWrapperCodegen.define_kernel

    def define(self: Any, name: str, body: str, *args: Any, **kwargs: Any) -> None:
        if "'EARLY': False" in body:
            body = body.replace("'EARLY': False", f"'EARLY': {mode}")
            body = body.replace("triton_meta={", "triton_meta={'launch_pdl': True, ")
        define_kernel(self, name, body, *args, **kwargs)

    with (
        mock.patch.object(TritonKernel, "_handle_pdl_before_access", before_access),
        mock.patch.object(TritonKernel, "_handle_pdl_after_load", after_load),
        mock.patch.object(TritonKernel, "_filter_pdl", filtered),
        mock.patch.object(PythonWrapperCodegen, "define_kernel", define),
    ):
        yield
