"""What the passes say to each other: projections, leaves and sites of a traced decoder."""

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import fx

from dejavu_compile.kernels.nibbles import columns


class Policy(StrEnum):
    """Which units of a site run. (design: "policies")"""

    DENSE = "dense"  # all of them
    EXACT = "exact"  # those that the graph's own ReLU did not set to zero: loses nothing
    GATE = "gate"  # those whose activated gate passes a threshold (CATS)
    PREDICT = (
        "predict"  # those whose predictor score passes a threshold, one layer ahead (Deja Vu)
    )
    SKETCH = "sketch"  # those of a gated MLP of which a sketch of gate and up says so, from its own input


class Execution(StrEnum):
    """How a selection is carried out."""

    GATHERED = "gathered"  # read only the selected units' weights: decode
    CACHE = "cache"  # read only the selected heads' keys and values, all weights: decode of large batches
    MASKED = "masked"  # compute all, zero the others, each token on its own: measuring quality


class SiteKind(StrEnum):
    """What the units of a site are."""

    MLP = "mlp"
    ATTENTION = "attention"


class LeafKind(StrEnum):
    """How the values of the selected units are obtained where a site begins."""

    ROWS = "rows"  # a projection owns rows per unit: read only the selected ones
    DENSE = "dense"  # needed elsewhere too, or not sliceable: computed in full, then gathered
    VECTOR = "vector"  # a parameter with one element per unit: gathered


class NoSite(StrEnum):
    """Why a projection is not the output projection of a site."""

    RESIDUAL = "residual"
    ATTENTION = "attention"
    NOT_SEPARABLE = "not_separable"
    LINEAR = "linear"
    SHARED = "shared"
    DYNAMIC = "dynamic"


@dataclass(frozen=True, slots=True)
class Projection:
    """`input @ weight` over the last axis of `input`, in any of its spellings.

    `weight` is the parameter's own node (a placeholder or `get_attr`), 2-D; `contracted` is the dim of the
    parameter that pairs with the last axis of `input` (1 for `linear`, 0 for `addmm`).
    """

    node: fx.Node
    input: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    contracted: int
    in_features: int
    out_features: int
    name: str

    @property
    def operands(self) -> frozenset[fx.Node]:
        """What it reads: input, weight, and bias where there is one."""
        return frozenset({self.input, self.weight, self.bias} - {None})

    @property
    def num_bytes(self) -> int:
        """Bytes of the weight that a dense evaluation reads."""
        return self.in_features * self.out_features * self.weight.meta["val"].element_size()


@dataclass(frozen=True, slots=True)
class Leaf:
    """A value where a site begins: `node` holds every unit along `dim`.

    For ROWS, unit u owns row `offset + step * u` of `projection`'s output features.
    """

    kind: LeafKind
    node: fx.Node
    dim: int
    projection: Projection | None = None
    offset: int = 0
    step: int = 1


@dataclass(frozen=True, slots=True)
class Carrier:
    """An interior value `a` such that a unit with a == 0 contributes nothing to the site.

    Computing `a` for every unit needs the leaves in `needs`; the others can be skipped where a is zero
    (policy `exact`) or small (policy `gate`).
    """

    node: fx.Node
    dim: int
    needs: frozenset[fx.Node]


@dataclass(frozen=True, slots=True, eq=False)
class OwnedRows:
    """A projection of whose output rows some are read by one unit alone.

    `owner` [out_features / block] int32, on the CPU: the unit that each block of adjacent rows is for, -1
    for rows that are needed whatever is selected (keys and values that go to a cache, say).
    """

    projection: Projection
    owner: torch.Tensor
    block: int

    @property
    def per_unit(self) -> int:
        """Rows that one unit owns."""
        return self.block * int((self.owner == 0).sum())


@dataclass(frozen=True, slots=True)
class Core:
    """An attention op each of whose heads is needed by one unit alone: `units[head]`."""

    node: fx.Node
    units: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Site:
    """A region between leaves and an output projection that is separable along one unit axis.

    Invariant, which every rewrite keeps for any set S of units: the rewritten graph with S equals the
    dense graph with every unit outside S zeroed. (design: "the separable axis"; Deja Vu, section 3)

    `interior` is in topological order; `dims[node]` is the unit dim of an interior value. `hidden` is the
    input of the output projection. `exact` is a carrier whose zeros the graph itself produces (ReLU...),
    `gate` the carrier that spares most weights (the activated gate of a GLU).

    A site of attention has `owned` projections for leaves, `attended`, its attention ops, and `cores`, those of
    them whose heads can be left out; `interior` and `dims` are empty, since every unit keeps its place. Its units
    are query heads, or what the model makes of several, each `width` elements of `hidden`, also where several heads
    share keys.
    """

    kind: SiteKind
    layer: int
    units: int
    output: Projection
    leaves: tuple[Leaf, ...]
    interior: tuple[fx.Node, ...]
    dims: dict[fx.Node, int]
    exact: Carrier | None
    gate: Carrier | None
    owned: tuple[OwnedRows, ...] = ()
    attended: tuple[fx.Node, ...] = ()
    cores: tuple[Core, ...] = ()

    @property
    def name(self) -> str:
        """Qualified name of the output projection's weight."""
        return self.output.name

    @property
    def hidden(self) -> fx.Node:
        """The value that the output projection contracts, [..., units]."""
        return self.output.input

    @property
    def row_leaves(self) -> tuple[Leaf, ...]:
        """The leaves that read only the selected units' weight rows."""
        return tuple(leaf for leaf in self.leaves if leaf.kind is LeafKind.ROWS)

    @property
    def width(self) -> int:
        """Elements of `hidden` that belong to one unit."""
        return self.output.in_features // self.units

    @property
    def projections(self) -> tuple[Projection, ...]:
        """The projections into the units, of whose rows some can be skipped."""
        rows = [leaf.projection for leaf in self.row_leaves] + [o.projection for o in self.owned]
        return tuple({projection.node: projection for projection in rows}.values())

    @property
    def input(self) -> fx.Node:
        """The value that the site's projections read: the natural source of a later site's predictor."""
        return self.projections[0].input

    @property
    def num_tokens(self) -> int | None:
        """Tokens that the graph runs through this site, or None where that is symbolic."""
        tokens = 1
        for size in self.hidden.meta["val"].shape[:-1]:
            if not isinstance(size, int):
                return None
            tokens *= size
        return tokens

    @property
    def bytes_per_unit(self) -> int:
        """Weight bytes that one more selected unit costs: its row of each leaf and its column."""
        itemsize = self.output.weight.meta["val"].element_size()
        features = sum(leaf.projection.in_features for leaf in self.row_leaves)
        features += sum(o.per_unit * o.projection.in_features for o in self.owned)
        return (features + self.width * self.output.out_features) * itemsize

    @property
    def bytes_dense(self) -> int:
        """Weight bytes that the dense site reads."""
        return self.bytes_per_unit * self.units


@dataclass(frozen=True, slots=True)
class Unmatched:
    """A projection that stays dense, and why."""

    projection: Projection
    code: NoSite
    reason: str


@dataclass(frozen=True, slots=True)
class Other:
    """A weight that something other than a projection multiplies by: experts, a convolution, ..."""

    name: str
    reason: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class LoneAttention:
    """An attention op that is in no site, and why. `name`: the weight that what it computes meets first."""

    node: fx.Node
    name: str | None
    reason: str


@dataclass(frozen=True, slots=True)
class Found:
    """Result of `find_sites`: every projection of the graph is in `sites` or in `unmatched`.

    `others` are the weights that no projection reads; `lone` the attention that no site holds.
    """

    sites: tuple[Site, ...] = ()
    unmatched: tuple[Unmatched, ...] = ()
    others: tuple[Other, ...] = ()
    lone: tuple[LoneAttention, ...] = ()


@dataclass(frozen=True, slots=True)
class PredictorWeights:
    """score = up @ (down @ source) + bias; a unit is selected where the score is above zero.

    down [rank, source width] and up [units, rank] in the model's dtype, int8, or packed (`kernels/nibbles.py`);
    bias [units] fp32, with the calibrated threshold already subtracted. Of heads there are so few that the rank
    is full: `down` is None, and up [units, source width]. (Deja Vu, section 4.1; the bias is ours)
    """

    down: torch.Tensor | None
    up: torch.Tensor
    bias: torch.Tensor

    @property
    def num_bytes(self) -> int:
        """Bytes that one evaluation reads."""
        parts = (t for t in (self.down, self.up, self.bias) if t is not None)
        return sum(t.numel() * t.element_size() for t in parts)

    @property
    def source_width(self) -> int:
        """Elements of the source, per token."""
        return columns(self.up if self.down is None else self.down)


@dataclass(frozen=True, slots=True)
class SketchWeights:
    """What `kernels/sketch.py` takes: gate [units, width / 2] and up [units, width / 4] packed, numbers [5, units]."""

    gate: torch.Tensor
    up: torch.Tensor
    numbers: torch.Tensor

    @property
    def num_bytes(self) -> int:
        """Bytes that one evaluation reads."""
        return sum(t.numel() * t.element_size() for t in (self.gate, self.up, self.numbers))


@dataclass(frozen=True, slots=True)
class Decision:
    """What the plan decided for one site. `source` feeds `predictor`; `sensitivity` is for `gate`.

    `threshold` is for `gate` and `sketch`.

    A unit runs where |gate| * sensitivity is above the threshold; sensitivity [units] fp32, None for ones.
    """

    site: Site
    policy: Policy
    execution: Execution
    source: fx.Node | None = None
    predictor: PredictorWeights | None = None
    threshold: float = 0.0
    sensitivity: torch.Tensor | None = None
    sketch: SketchWeights | None = None
