"""The products with weights that aren't read as projections, and what they are: for the report.

    bmm(x, experts)             a stack of matrices
    linear(x, w * scale)        a matrix that is computed at each step
    conv1d(x, w)                a convolution

Together with `find_sites`, every weight of two dims or more that a graph multiplies by is accounted for.
"""

import operator
from collections.abc import Callable, Iterator

from torch import fx

from dejavu_compile._compat import qualified_name

from .in_place import targets_of
from .separable import IDENTITY, VIEWS, aten, shape_of
from .site import Other, Projection

CONVOLUTIONS = {
    aten.conv1d.default,
    aten.conv2d.default,
    aten.convolution.default,
    aten.conv1d.padding,
}
PRODUCTS = {aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default, aten.bmm.default,
            aten.baddbmm.default, aten.einsum.default, aten._grouped_mm.default} | CONVOLUTIONS  # fmt: skip
SAME_ELEMENTS = IDENTITY | VIEWS | {
    aten.t.default, aten.mT.default, aten.numpy_T.default, aten.transpose.int, aten.permute.default,
    aten.expand.default,
}  # fmt: skip
PARTS = {
    aten.select.int, aten.index.Tensor, aten.slice.Tensor, aten.index_select.default, operator.getitem,
    aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int,
}  # fmt: skip


def _weight(node: fx.Node) -> fx.Node | None:
    """The parameter that a value is a view, a part or a function of, if of nothing else that varies."""
    while node.op == "call_function" and not targets_of(node):
        sources = [n for n in node.all_input_nodes if len(shape_of(n) or ()) != 1]
        if not sources or (node.target not in SAME_ELEMENTS | PARTS and len(sources) > 1):
            return None
        node = sources[0]
    named = node.op == "get_attr" or (node.op == "placeholder" and qualified_name(node))
    return node if named and len(shape_of(node) or ()) > 1 else None


def _reason(node: fx.Node, value: fx.Node, weight: fx.Node) -> str:
    """Why there is no site, in words to act on."""
    rank, used = len(shape_of(weight)), shape_of(value)
    if node.target in CONVOLUTIONS:
        return "a convolution: its output features aren't contracted by a projection alone"
    while value is not weight and value.target in SAME_ELEMENTS:
        value = value.all_input_nodes[0]
    if value is not weight and value.target in PARTS:
        if rank > 2:
            return f"one of {shape_of(weight)[0]} matrices, of which the model itself selects (experts)"
        return "a part of a matrix: only whole ones are split by unit"
    if value is not weight:
        return f"its weight is computed at each step ({op_name(value)}): store the result instead"
    if rank > 2:
        return (
            f"a stack of matrices ({rank} dims, {op_name(node)}): only matrices are split by unit"
        )
    if len(used) > rank:
        return f"a matrix in {used[0]} pieces ({op_name(node)}): only whole ones are split by unit"
    return f"{op_name(node)} isn't a projection of the last axis"


def op_name(node: fx.Node) -> str:
    """An op as messages call it."""
    return getattr(node.target, "__name__", str(node.target)).removesuffix(".default")


def others_in(node: fx.Node) -> Iterator[tuple[fx.Node, Other]]:
    """The weights that `node`, which isn't a projection, multiplies by."""
    if node.target not in PRODUCTS:
        return
    for value in node.all_input_nodes:
        weight = _weight(value) if shape_of(value) is not None else None
        if weight is not None:
            name = qualified_name(weight) or str(weight.target)
            tensor = weight.meta["val"]
            size = tensor.numel() * tensor.element_size()
            yield weight, Other(name, _reason(node, value, weight), size)


def find_others(
    gm: fx.GraphModule, as_projection: Callable[[fx.Node], Projection | None]
) -> tuple[Other, ...]:
    """Every product with a weight that `as_projection` can't read, in graph order, each weight once."""
    found: dict[fx.Node, Other] = {}
    for node in gm.graph.nodes:
        if as_projection(node) is None:
            for weight, other in others_in(node):
                found.setdefault(weight, other)
    return tuple(found.values())
