"""Counters that a step advances, all in one launch.

    add_(seen_0, 1) ... add_(seen_1, 1) ...     ->      ... _foreach_add_([seen_0, seen_1], 1)

A static cache counts its tokens on the device, layer by layer: a launch each, of a microsecond and more.
"""

from collections import defaultdict

from torch import fx

from .in_place import computes, has_one_name
from .separable import aten


def _counts(node: fx.Node) -> bool:
    """Adds a number to an input of one integer, and nothing reads that input afterwards, under any name."""
    counter, *added = node.args
    value = counter.meta["val"] if isinstance(counter, fx.Node) else None
    if counter.op != "placeholder" or node.users or node.kwargs or not isinstance(added[0], int):
        return False
    if value.dim() or value.dtype.is_floating_point or any(u > node for u in counter.users):
        return False
    return has_one_name(counter) and all(computes(u) for u in counter.users if u is not node)


def count_together(gm: fx.GraphModule) -> int:
    """Advance them at the end of the graph, in place; how many there are, 0 where that saves nothing."""
    alike = defaultdict(list)
    for node in gm.graph.find_nodes(op="call_function", target=aten.add_.Tensor):
        if _counts(node):
            alike[node.args[1]].append(node)
    alike = {number: nodes for number, nodes in alike.items() if len(nodes) > 1}
    for number, nodes in alike.items():
        with gm.graph.inserting_before(gm.graph.output_node()):
            counters = [node.args[0] for node in nodes]
            gm.graph.call_function(aten._foreach_add_.Scalar, (counters, number))
        for node in nodes:
            gm.graph.erase_node(node)
    if alike:
        gm.graph.lint()
        gm.recompile()
    return sum(map(len, alike.values()))
