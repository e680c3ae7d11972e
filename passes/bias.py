"""A bias that is added after a product belongs to the projection.

    x @ W.T + b         ->      linear(x, W, b)
    x @ W + b           ->      linear(x, t(W), b)

So that what cuts the sum into pieces (a fused gate and up, q, k and v) cuts one projection.
"""

from torch import fx

from .emit import Emitter
from .find_sites import as_projection
from .separable import aten, shape_of
from .site import Projection


def _added(node: fx.Node) -> tuple[Projection, fx.Node] | None:
    """The projection, read by `node` alone, and the bias that `node` adds to it."""
    if node.target is not aten.add.Tensor or node.kwargs or len(node.all_input_nodes) != 2:
        return None
    for value, bias in (node.args, node.args[::-1]):
        if bias.op not in ("placeholder", "get_attr") or len(shape_of(bias) or ()) != 1:
            continue
        projection = as_projection(value)
        if projection is None or projection.bias is not None or len(value.users) > 1:
            continue
        same = bias.meta["val"].dtype is value.meta["val"].dtype
        if same and shape_of(bias)[0] == projection.out_features:
            return projection, bias
    return None


def fold_biases(gm: fx.GraphModule) -> int:
    """Replace what can be read, in place; how many there were."""
    emit, done = Emitter(gm), 0
    for node in gm.graph.find_nodes(op="call_function", target=aten.add.Tensor):
        found = _added(node)
        if found is None:
            continue
        projection, bias = found
        with emit.before(node):
            weight = projection.weight
            if projection.contracted == 0:
                weight = emit.call(aten.t.default, weight)
            emit.replace(node, emit.call(aten.linear.default, projection.input, weight, bias))
        gm.graph.erase_node(node)
        done += 1
    return done
