"""Insert nodes that carry their value's shape, so that later passes can read what earlier ones wrote."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from dejavu_compile._compat import FakeTensor, add_static_buffer, unset_fake_temporarily


def _fake_mode(graph: fx.Graph) -> Any:
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return None


class Emitter:
    """Inserts calls into a GraphModule before a moving point, and propagates fake values through them."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.graph = gm.graph
        self._mode = _fake_mode(self.graph)
        self._replaced: dict[fx.Node, fx.Node] = {}

    @contextmanager
    def before(self, node: fx.Node) -> Iterator[None]:
        """Insert before `node`."""
        with self.graph.inserting_before(node):
            yield

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call_function node with `meta["val"]` set."""
        args, kwargs = fx.map_arg((args, kwargs), self.current)
        node = self.graph.call_function(target, args, kwargs)
        self.infer(node)
        return node

    def current(self, node: fx.Node) -> fx.Node:
        """What stands for `node` now: records made before a rewrite name nodes that it has replaced."""
        while node in self._replaced:
            node = self._replaced[node]
        return node

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Give `old`'s users to `new`, and remember it."""
        old.replace_all_uses_with(new)
        self._replaced[old] = new

    def copy(self, node: fx.Node, mapping: dict[fx.Node, fx.Node]) -> fx.Node:
        """The same op on mapped inputs."""
        new = self.graph.node_copy(node, lambda n: mapping.get(n, n))
        self.infer(new)
        return new

    def buffer(self, name: str, tensor: torch.Tensor) -> fx.Node:
        """A get_attr of a new static buffer."""
        with unset_fake_temporarily():
            add_static_buffer(self.gm, name, tensor)
        node = self.graph.get_attr(name)
        # Static: a symbol made here would have no source for Dynamo to guard on.
        node.meta["val"] = (
            tensor if self._mode is None else self._mode.from_tensor(tensor, static_shapes=True)
        )
        return node

    def arrived(self, needed: int) -> fx.Node:
        """Zeroed int32 counters for ops whose programs share a sum; ops that run one after another share them."""
        size = max(256, 1 << (needed - 1).bit_length())
        name = f"dejavu_arrived_{size}"
        node = next((n for n in self.graph.find_nodes(op="get_attr", target=name)), None)
        if node is None:
            first = next(n for n in self.graph.nodes if n.op != "placeholder")
            with self.before(first):
                node = self.buffer(name, torch.zeros(size, dtype=torch.int32, device=self.device))
        return node

    @property
    def device(self) -> torch.device:
        """Of the graph's tensors."""
        values = (node.meta.get("val") for node in self.graph.nodes)
        return next(v.device for v in values if isinstance(v, torch.Tensor) and v.dim() > 1)

    def infer(self, node: fx.Node) -> None:
        """Compute `meta["val"]` from the inputs' values."""
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        with self._mode or torch.no_grad(), torch.no_grad():
            node.meta["val"] = node.target(*args, **kwargs)
