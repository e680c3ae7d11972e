"""Which MLPs are an activated gate times another projection of the same input, and nothing else.

    h = silu(linear(x, Wg)) * linear(x, Wu)        (SwiGLU, GeGLU, ReGLU; also where Wg and Wu are one weight)

Of such a site a sketch of both projections says what each unit probably adds, from x alone (kernels/sketch.py).
"""

from dataclasses import dataclass

from torch import fx

from dejavu_compile.kernels.pairs import MULTIPLE

from .separable import aten
from .site import Leaf, LeafKind, Site

LEAST_UNITS = 16


@dataclass(frozen=True, slots=True)
class Glu:
    """A site's two projections and the name of its activation (`kernels/activations.py`)."""

    gate: Leaf
    up: Leaf
    activation: str


def activation_of(node: fx.Node) -> str | None:
    """The name of an activation that kernels have."""
    if node.target is aten.gelu.default:
        return "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"
    return {aten.relu.default: "relu", aten.silu.default: "silu"}.get(node.target)


def as_glu(site: Site) -> Glu | None:
    """The site as a gated pair, or None where it is anything else, or too narrow for a sketch."""
    hidden, gate = site.hidden, site.gate
    if gate is None or hidden.target is not aten.mul.Tensor or gate.node not in hidden.args:
        return None
    leaves = {leaf.node: leaf for leaf in site.leaves if leaf.kind is LeafKind.ROWS}
    others = [arg for arg in hidden.args if arg is not gate.node]
    activation = activation_of(gate.node)
    pair = [leaves.get(node) for node in (*gate.node.args[:1], *others)]
    if activation is None or len(pair) != 2 or None in pair:
        return None
    if any(leaf.projection.input is not site.input for leaf in pair) or len(site.leaves) != 2:
        return None
    biases = [leaf.projection.bias for leaf in pair]
    if any(bias is not None and bias.op not in {"placeholder", "get_attr"} for bias in biases):
        return None
    if not all(leaf.projection.weight.meta["val"].is_floating_point() for leaf in pair):
        return None
    if pair[0].projection.in_features % MULTIPLE or site.units < LEAST_UNITS:
        return None
    return Glu(*pair, activation)
