"""Which ATen ops are separable along an axis, and which keep a zero a zero.

An op is separable along an axis when element i of its output along the axis depends only on element i
of its inputs. Pointwise ops carry a tag for it in PyTorch; what is listed here is the rest: casts and
copies, views that keep the axis whole, and the selections of rows that fused projections use.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

aten = torch.ops.aten

# Values pass unchanged but for dtype, layout or memory format.
IDENTITY = {
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten._to_copy.default,
    aten.type_as.default, aten.clone.default, aten.contiguous.default, aten.alias.default,
    aten.detach.default, aten.lift_fresh_copy.default, aten.dropout.default,
}  # fmt: skip

VIEWS = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints,
    aten.unflatten.int, aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim,
    aten.squeeze.dims,
}  # fmt: skip

# Composite in pre-dispatch form, so PyTorch has no pointwise tag on them.
POINTWISE_UNTAGGED = {
    aten.square.default, aten.relu6.default, aten.selu.default, aten.hardswish.default,
    aten.log_sigmoid.default, aten.special_erf.default, aten.special_expit.default, aten.absolute.default,
    aten.negative.default, aten.arctan.default, aten.fix.default, aten.rsub.Scalar, aten.where.ScalarOther,
    aten.where.ScalarSelf, aten.where.Scalar, aten.true_divide.Tensor, aten.multiply.Tensor,
    aten.multiply.Scalar, aten.divide.Tensor, aten.divide.Scalar, aten.subtract.Tensor, aten.subtract.Scalar,
    aten.masked_fill.Tensor, aten.masked_fill.Scalar,
}  # fmt: skip

# Element i is exactly zero for a whole range of inputs.
ZERO_SOURCES = {aten.relu.default, aten.relu_.default, aten.relu6.default, aten.hardshrink.default,
                aten.softshrink.default, aten.hardswish.default, aten.hardsigmoid.default}  # fmt: skip

# f(0) == 0.
ZERO_AT_ZERO = ZERO_SOURCES - {aten.hardsigmoid.default} | {
    aten.silu.default, aten.gelu.default, aten.tanh.default, aten.neg.default, aten.abs.default,
    aten.sqrt.default, aten.sin.default, aten.asin.default, aten.atan.default, aten.erf.default,
    aten.square.default, aten.sign.default, aten.leaky_relu.default, aten.elu.default,
    aten.mish.default, aten.expm1.default, aten.log1p.default, aten.sinh.default,
    aten.round.default, aten.floor.default, aten.trunc.default, aten.selu.default,
}  # fmt: skip

MULTIPLY = {aten.mul.Tensor, aten.mul.Scalar, aten.mul_.Tensor, aten.multiply.Tensor}
DIVIDE = {aten.div.Tensor, aten.div.Scalar, aten.true_divide.Tensor}
ADD = {aten.add.Tensor, aten.sub.Tensor}

NONLINEAR_EXEMPT = MULTIPLY | DIVIDE | ADD | IDENTITY | VIEWS | {
    aten.add.Scalar, aten.sub.Scalar, aten.neg.default, aten.transpose.int, aten.permute.default,
}  # fmt: skip

SDPA = aten.scaled_dot_product_attention.default
SOFTMAX = {aten.softmax.int, aten._softmax.default, aten._safe_softmax.default}
PRODUCTS = {aten.bmm.default, aten.matmul.default}
ATTENTION = {SDPA, *SOFTMAX, *PRODUCTS, aten.baddbmm.default}


@dataclass(frozen=True, slots=True)
class OnAxis:
    """An input of a separable op that carries the axis, at `dim`."""

    node: fx.Node
    dim: int


def shape_of(node: fx.Node) -> tuple[int | torch.SymInt, ...] | None:
    """The shape of a tensor-valued node, else None."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def computed_from(node: fx.Node, start: fx.Node) -> set[fx.Node]:
    """The values that `node` is computed from, as far back as `start`, and both of them."""
    pending, seen = [node], set()
    while pending:
        node = pending.pop()
        if node not in seen and not node < start:
            seen.add(node)
            pending.extend(node.all_input_nodes)
    return seen


def is_pointwise(node: fx.Node) -> bool:
    """A functional op whose output elements depend on the matching input elements alone."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return False
    # An in-place op changes what other readers of its input see: it is left to the dense graph.
    if target._schema.is_mutable:
        return False
    return torch.Tag.pointwise in target.tags or target in POINTWISE_UNTAGGED


def separable_inputs(node: fx.Node, dim: int) -> list[OnAxis] | None:
    """The inputs of `node` that carry the axis `dim` of its output, or None: not separable along it.

    Inputs that broadcast along the axis are left out: every unit sees the same value of them.
    """
    if node.op != "call_function":
        return None
    if node.target in IDENTITY and not (node.target is aten.dropout.default and node.args[2]):
        return [OnAxis(node.args[0], dim)]
    if is_pointwise(node):
        return list(_broadcast_inputs(node, dim))
    if node.target in VIEWS:
        source = _view_input_dim(node, dim)
        return None if source is None else [OnAxis(node.args[0], source)]
    if node.target is aten.transpose.int:
        rank = len(shape_of(node))
        a, b = (d % rank for d in node.args[1:3])
        return [OnAxis(node.args[0], b if dim == a else a if dim == b else dim)]
    if node.target is aten.permute.default:
        rank = len(shape_of(node))
        return [OnAxis(node.args[0], node.args[1][dim] % rank)]
    return None


def _broadcast_inputs(node: fx.Node, dim: int) -> Iterator[OnAxis]:
    out = shape_of(node)
    for source in node.all_input_nodes:
        shape = shape_of(source)
        if shape is None:
            continue
        at = dim - (len(out) - len(shape))
        if at >= 0 and not (_is(shape[at], 1) and not _is(out[dim], 1)):
            yield OnAxis(source, at)


def _view_input_dim(node: fx.Node, dim: int) -> int | None:
    """Where the axis lies in the input of a view that keeps it whole, else None."""
    out, source = shape_of(node), shape_of(node.args[0])
    for at in reversed(range(len(source))):
        if _is(source[at], out[dim]) and same_size(source[at + 1 :], out[dim + 1 :]):
            return at
    return None


def _is(one: int | torch.SymInt, other: int | torch.SymInt) -> bool:
    """Equal as numbers, or the same symbol. (`==` of two symbols is a guard, and so a recompile.)"""
    if isinstance(one, int) and isinstance(other, int):
        return one == other
    return str(one) == str(other)


def same_size(one: tuple, other: tuple) -> bool:
    """Two shapes hold as many elements, whatever their symbols stand for."""
    return _sizes(one) == _sizes(other)


def _sizes(shape: tuple) -> tuple[int, tuple[str, ...]]:
    """The number of elements of a shape, as (product of the ints, the symbols)."""
    product, symbols = 1, []
    for size in shape:
        if isinstance(size, int):
            product *= size
        else:
            symbols.append(str(size))
    return product, tuple(sorted(symbols))


def produces_zeros(node: fx.Node) -> bool:
    """The op itself sets units to exactly zero over a range of inputs."""
    if node.op != "call_function":
        return False
    if node.target in ZERO_SOURCES:
        return True
    if node.target in (aten.clamp_min.default, aten.clamp.default, aten.hardtanh.default):
        low = node.args[1] if len(node.args) > 1 else node.kwargs.get("min")
        return isinstance(low, int | float) and low == 0
    if node.target is aten.threshold.default:
        return node.args[2] == 0
    return False


def keeps_zero(node: fx.Node, zero: set[fx.Node]) -> bool:
    """The output element is zero wherever the elements of the nodes in `zero` are."""
    inputs = [arg for arg in node.args if isinstance(arg, fx.Node)]
    target = node.target
    if target in MULTIPLY:
        return any(arg in zero for arg in inputs)
    if not inputs or inputs[0] not in zero:
        return False
    if target in IDENTITY | VIEWS | ZERO_AT_ZERO | DIVIDE:
        return target not in DIVIDE or not (len(inputs) > 1 and inputs[1] in zero)
    if target in (aten.transpose.int, aten.permute.default):
        return True
    if target is aten.pow.Tensor_Scalar:
        return node.args[1] > 0
    if target in ADD:
        return len(inputs) == 2 and all(arg in zero for arg in inputs)
    if target in (aten.clamp_min.default, aten.clamp.default, aten.hardtanh.default):
        low = node.args[1] if len(node.args) > 1 else node.kwargs.get("min")
        high = node.args[2] if len(node.args) > 2 else node.kwargs.get("max")
        return (low is None or low <= 0) and (high is None or high >= 0)
    if target is aten.threshold.default:
        return node.args[2] == 0
    return False
