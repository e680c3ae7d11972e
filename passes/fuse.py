"""Let a projection end with its activation, and a gated pair be one launch.

    silu(gathered_rows(x, Wg, i, c)) * gathered_rows(x, Wu, i, c)   ->   gathered_glu(x, Wg, Wu, i, c, "silu")
    relu(gathered_rows(x, W, i, c))                                 ->   gathered_rows(x, W, i, c, "relu")
    index_select(g, 1, i) * gathered_rows(x, Wu, i, c)              ->   gathered_rows(x, Wu, i, c, times=g)
    silu(gemv(x, [W], [b]))                                         ->   gemv(x, [W], [b], "silu")

A saving of launches, not of bytes: an activation without a fused form stays a pointwise op, which
Inductor compiles. Reshapes in between are looked through. A value that is read twice is left alone.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from .emit import Emitter
from .glu import activation_of
from .separable import aten

ops = torch.ops.dejavu
RESHAPES = {aten.reshape.default, aten.view.default}
ROWS = ops.gathered_rows.default
GLU = ops.gathered_glu.default
GEMV = ops.gemv.default
ACTIVATION = {ROWS: 5, GEMV: 3}  # position of the activation among the arguments


@dataclass(frozen=True, slots=True)
class Fused:
    """How many launches were saved."""

    activations: int
    pairs: int
    products: int = 0

    @property
    def modified(self) -> bool:
        """Whether the graph changed."""
        return bool(self.activations or self.pairs or self.products)


def _behind(node: object, *targets: object) -> fx.Node | None:
    """The projection of one of these kinds behind single-use reshapes, or None."""
    while isinstance(node, fx.Node) and node.target in RESHAPES and len(node.users) == 1:
        node = node.args[0]
    if isinstance(node, fx.Node) and node.target in targets and len(node.users) == 1:
        return node
    return None


def _has_product(rows: fx.Node) -> bool:
    """Ends with a product already: nothing else can come before that."""
    return len(rows.args) > ACTIVATION[ROWS] + 1


def _activation(node: fx.Node, rows: fx.Node) -> str | None:
    """The name of the fused form of `node`, an op on `rows`, given what `rows` ends with already."""
    if rows.target is ROWS and _has_product(rows):
        return None
    before = rows.args[ACTIVATION[rows.target]]
    if before == "relu" and (
        node.target is aten.square.default
        or (node.target is aten.pow.Tensor_Scalar and node.args[1] == 2)
    ):
        return "relu2"
    if before != "identity":
        return None
    return activation_of(node)


def _fuse_activation(emit: Emitter, node: fx.Node) -> bool:
    rows = _behind(node.args[0], ROWS, GEMV) if node.args else None
    activation = _activation(node, rows) if rows is not None else None
    if activation is None:
        return False
    rows.update_arg(ACTIVATION[rows.target], activation)
    node.replace_all_uses_with(node.args[0])
    node.graph.erase_node(node)
    return True


def _fuse_pair(emit: Emitter, node: fx.Node) -> bool:
    if node.target is not aten.mul.Tensor:
        return False
    first, second = (_behind(arg, ROWS) for arg in node.args)
    if first is None or second is None or first is second:
        return False
    if _has_product(first) or _has_product(second):
        return False
    if second.args[ACTIVATION[ROWS]] != "identity":
        first, second = second, first
    # The same reshape has to follow both, and both have to read the same tokens and units.
    shapes = {arg.meta["val"].shape for arg in node.args}
    if (
        second.args[ACTIVATION[ROWS]] != "identity"
        or len(shapes) > 1
        or not _same_source(first, second)
    ):
        return False
    x, gate, gate_bias, index, count, activation = first.args
    with emit.before(node):
        pair = emit.call(GLU, x, gate, gate_bias, *second.args[1:3], index, count, activation)
        result = emit.call(aten.reshape.default, pair, list(node.meta["val"].shape))
    node.replace_all_uses_with(result)
    return True


def _fuse_product(emit: Emitter, node: fx.Node) -> bool:
    """A gathered projection times a value that is known for every unit, gathered alike."""
    if node.target is not aten.mul.Tensor or len(node.all_input_nodes) != 2:
        return False
    for value, product in (node.args, node.args[::-1]):
        rows = _behind(product, ROWS)
        if rows is None or _has_product(rows) or value.target is not aten.index_select.default:
            continue
        every, dim, index = value.args
        known, got, units = every.meta["val"], product.meta["val"], rows.meta["val"].shape[1]
        alike = known.shape == got.shape and known.dtype is got.dtype and known.shape[-1] == units
        if not alike or dim % known.dim() != known.dim() - 1 or index is not rows.args[3]:
            continue
        if rows < every:
            continue
        with emit.before(rows):
            times = emit.call(aten.reshape.default, every, [-1, units])
        rows.args = (*rows.args, times)
        node.replace_all_uses_with(product)
        return True
    return False


def _same_source(first: fx.Node, second: fx.Node) -> bool:
    def root(node: fx.Node) -> fx.Node:
        while node.target in RESHAPES:
            node = node.args[0]
        return node

    return root(first.args[0]) is root(second.args[0]) and first.args[3:5] == second.args[3:5]


def fuse(gm: fx.GraphModule) -> Fused:
    """Fuse activations first, then pairs and products, in place."""
    emit = Emitter(gm)

    def apply(rule: Callable[[Emitter, fx.Node], bool]) -> int:
        nodes = [node for node in gm.graph.nodes if node.op == "call_function"]
        done = sum(rule(emit, node) for node in nodes)
        gm.graph.eliminate_dead_code()
        return done

    result = Fused(apply(_fuse_activation), apply(_fuse_pair), apply(_fuse_product))
    if result.modified:
        gm.graph.lint()
        gm.recompile()
    return result
