"""Ops that write into their input: made functional where nothing can tell, known where something can.

    h = up(x); h.relu_(); y = down(h)           ->      r = relu(up(x)); y = down(r)
    h = up(x); v = h.view(-1); v.mul_(2)        ->      left as it is: h and v are `written`

The analyses read a graph as if every node kept the value that it was made with. What is written in place
doesn't, so they take it as it is, where it is. (A cache is written too, but nothing looks through it.)
"""

import torch
from torch import fx

from dejavu_compile._compat import storage_id

from .separable import IDENTITY, VIEWS, aten

NOTHING_WRITTEN = {aten.detach_.default}  # in place only for autograd


def make_functional(graph: fx.Graph) -> int:
    """Replace ops that write into a value which has no other name yet; how many there were."""
    made = 0
    for node in tuple(graph.nodes):
        functional = _functional(node)
        if functional is None:
            continue
        value = node.args[0]
        later = [user for user in value.users if user > node]
        with graph.inserting_before(node):
            new = graph.call_function(functional, node.args, node.kwargs)
        new.meta = dict(node.meta)
        for user in later:
            user.replace_input_with(value, new)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        made += 1
    return made


def _functional(node: fx.Node) -> torch._ops.OpOverload | None:
    """`aten.relu` for an `aten.relu_` of a value that is read under this name alone."""
    if [t for t in targets_of(node) if t is not node.args[0]] or not targets_of(node):
        return None
    value, packet = node.args[0], node.target.overloadpacket.__name__
    if value.op != "call_function" or _may_alias(value) or not packet.endswith("_"):
        return None
    if any(user < node and _may_alias(user) for user in value.users):
        return None
    # What is written keeps its dtype and shape; a functional op may promote or broadcast.
    if value.meta["val"].dtype is not torch.result_type(*_operands(node)):
        return None
    found = getattr(getattr(aten, packet[:-1], None), node.target._overloadname, None)
    pointwise = isinstance(found, torch._ops.OpOverload) and torch.Tag.pointwise in found.tags
    return found if pointwise else None


def _operands(node: fx.Node) -> tuple[object, object]:
    values = [a.meta["val"] if isinstance(a, fx.Node) else a for a in node.args[:2]]
    values = [v for v in values if isinstance(v, torch.Tensor | int | float)]
    return values[0], values[-1]


def written(graph: fx.Graph) -> frozenset[fx.Node]:
    """The nodes whose storage an op writes into, its aliases among them."""
    base: dict[fx.Node, fx.Node] = {}
    dirty: set[fx.Node] = set()
    for node in graph.nodes:
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        base[node] = base[source] if source is not None and _may_alias(node) else node
        dirty |= {base[target] for target in targets_of(node)}
    return frozenset(node for node, root in base.items() if root in dirty)


def targets_of(node: fx.Node) -> list[fx.Node]:
    """The inputs that `node` writes into."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target in NOTHING_WRITTEN:
        return []
    found = []
    for argument, value in zip(node.target._schema.arguments, node.args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += [v for v in (value if isinstance(value, list | tuple) else [value])
                      if isinstance(v, fx.Node)]  # fmt: skip
    return found


def has_one_name(given: fx.Node) -> bool:
    """Whether no other input of the graph is the memory of this one."""
    storage = storage_id(given.meta["val"])
    others = (
        n.meta.get("val") for n in given.graph.find_nodes(op="placeholder") if n is not given
    )
    return all(storage_id(o) != storage for o in others if isinstance(o, torch.Tensor))


def computes(node: fx.Node) -> bool:
    """An op that by its schema gives a value of its own, not another name of its input."""
    return isinstance(node.target, torch._ops.OpOverload) and not any(
        result.alias_info is not None for result in node.target._schema.returns
    )


def _may_alias(node: fx.Node) -> bool:
    """The result can share storage with the first input, as a getitem of what a split returned does."""
    return node.op == "call_function" and (node.target in IDENTITY | VIEWS or not computes(node))
