"""Issue each predictor where its source is made, one layer ahead of its site.

    h = norm(r); ...layer...; index, count = select(h, ...); gathered_rows(x, W, index, count)
        ->
    h = norm(r); index, count = select(h, ...); ...layer...; gathered_rows(x, W, index, count)

On CUDA the selection can be issued on a side stream instead: `select_begin` launches it there and
`select_join`, just before the site, makes the current stream wait. Inductor emits no stream contexts,
so both are opaque ops (facts: streams). Either way Inductor must not sink the node again:
`reorder_for_locality` is off in our compile options, and a test reads the generated code.
"""

import operator
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import fx

from .emit import Emitter

ops = torch.ops.dejavu


class Issue(StrEnum):
    """How a predictor runs."""

    INLINE = "inline"
    SIDE_STREAM = "side_stream"


@dataclass(frozen=True, slots=True)
class Scheduled:
    """`moved` counts predictors; `distance` is how many nodes each now runs ahead of its first use."""

    moved: int
    distance: tuple[int, ...]


def _hoist(node: fx.Node) -> None:
    """Move `node` up to just after the last of its inputs, taking views of its source along."""
    for source in node.all_input_nodes:
        if source.op == "get_attr" or source.target is torch.ops.aten.reshape.default:
            _hoist(source)
    inputs = [i for i in node.all_input_nodes if i.op == "call_function"]
    if inputs:
        max(inputs).append(node)
    else:
        next(n for n in node.graph.nodes if n.op != "placeholder").prepend(node)


def _on_side_stream(emit: Emitter, select: fx.Node, ticket: int, early: bool) -> None:
    """Replace a `select` by begin where it stands and join before its first reader."""
    with emit.before(select):
        begun = emit.call(ops.select_begin.default, *select.args, ticket, early)
        parts = [emit.call(operator.getitem, begun, i) for i in range(len(begun.meta["val"]))]
    picks = {user.args[1]: user for user in select.users}
    first = min(min(pick.users) for pick in picks.values())
    with emit.before(first):
        # The join reads the source too: its memory stays in use until the side stream is done with it.
        emit.call(ops.select_join.default, parts[0], parts[1], parts[2:], select.args[0], ticket)
    for i, pick in picks.items():
        pick.replace_all_uses_with(parts[i])
        select.graph.erase_node(pick)
    select.graph.erase_node(select)


def schedule(
    gm: fx.GraphModule, selects: tuple[fx.Node, ...], issue: Issue, early: bool = False
) -> Scheduled:
    """Hoist `selects` (see `rewrite`) to their sources, in place. `early`: on a side stream their first two launches overlap,
    which the device has to know (`_compat.has_early_launch`)."""
    emit = Emitter(gm)
    for select in selects:
        _hoist(select)
        for pick in sorted(select.users, reverse=True):
            select.append(pick)
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    distance = tuple(
        min(order[use] for pick in select.users for use in pick.users) - order[select]
        for select in selects
    )
    if issue is Issue.SIDE_STREAM:
        for ticket, select in enumerate(selects):
            _on_side_stream(emit, select, ticket, early)
    if selects:
        gm.graph.lint()
        gm.recompile()
    return Scheduled(len(selects), distance)
