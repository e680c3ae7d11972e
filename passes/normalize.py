"""Bring any traced graph to pre-dispatch ATen, so that the analysis meets one spelling of each op.

    torch.nn.functional.linear(x, w, b)     ->      aten.linear(x, w, b)
    x @ w.T, addmm, Conv1D, ...             ->      aten.matmul(x, aten.numpy_T(w)), aten.addmm, ...
    einsum("btd,fd->btf", x, w)             ->      aten.linear(x, w)
    x @ w.T + b                             ->      aten.linear(x, w, b)
    h.relu_() of a value that is read nowhere else  ->      aten.relu(h)

`linear` and `scaled_dot_product_attention` stay single nodes. The new graph is put INTO the same
GraphModule, and placeholders keep their meta and source: Inductor finds parameters, the compile id and
the shape environment there, and treats a rebuilt module's parameters as copied inputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from dejavu_compile._compat import trace_to_aten

from .bias import fold_biases
from .einsum import spell_out_einsum
from .in_place import make_functional


@dataclass(frozen=True, slots=True)
class Normalized:
    """`before` is the graph that was replaced: `restore` puts it back."""

    gm: fx.GraphModule
    before: fx.Graph

    def restore(self) -> None:
        """Undo: a graph in which nothing was rewritten compiles as Dynamo made it."""
        self.gm.graph = self.before
        self.gm.recompile()


def _adopt_constants(gm: fx.GraphModule, traced: fx.GraphModule) -> None:
    """Move the tensors and submodules that tracing lifted onto `gm`, under names free there."""
    for node in traced.graph.nodes:
        if node.op != "get_attr":
            continue
        value = getattr(traced, node.target)
        name, suffix = node.target, 0
        while hasattr(gm, name) and getattr(gm, name) is not value:
            suffix += 1
            name = f"{node.target}_{suffix}"
        if not hasattr(gm, name):
            setattr(gm, name, value)
        node.target = name


def normalize(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Normalized:
    """Replace `gm.graph` by its pre-dispatch ATen form, in place.

    `example_inputs` match the placeholders in order: tensors (real or fake), ints or SymInts.
    """
    before = gm.graph
    traced = trace_to_aten(gm, example_inputs)
    old_inputs = [node for node in before.nodes if node.op == "placeholder"]
    new_inputs = [node for node in traced.graph.nodes if node.op == "placeholder"]
    taken = {node.name for node in traced.graph.nodes}
    for old, new in zip(old_inputs, new_inputs, strict=True):
        value = new.meta["val"]
        new.meta = {**old.meta, "val": value}
        if old.name not in taken:
            new.name = new.target = old.name
        if (source := getattr(old, "_dynamo_source", None)) is not None:
            new._dynamo_source = source
    _adopt_constants(gm, traced)
    gm.graph = traced.graph
    make_functional(gm.graph)
    spell_out_einsum(gm)
    fold_biases(gm)
    gm.graph.eliminate_dead_code()  # a reader that nothing reads would make a value escape
    gm.recompile()
    return Normalized(gm, before)
