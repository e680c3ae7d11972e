"""Run the projections of a decode step that stay dense as GEMVs, those of one input together.

    q = linear(x, Wq, bq); k = linear(x, Wk, bk); v = linear(x, Wv)
        ->
    y = gemv(reshape(x), [Wq, Wk, Wv], [bq, bk, None], "identity"); q, k, v = slices of y

At one token a projection only reads its weight. Library GEMMs reach half of the H200's bandwidth there
when there is a bias or the weight is small (facts: H200 numbers), and each launch fills the chip anew. A
GEMV that skips rows of heads (rewrite_heads.py) takes in what else reads its input, the predictor of a later
layer's heads among it.

On a CPU also a weight whose columns lie together, as those of a site that was meant to be sparse do:

    y = linear(x, W, b)        ->        y = to(gathered_sum_cpu(x, W.T, every unit) + b)

PyTorch takes six times as long for it as for rows (bf16, 2048 x 8192).
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import fx

from dejavu_compile.kernels import cpu
from dejavu_compile.kernels.gemv import MOST

from .emit import Emitter
from .find_sites import as_projection
from .in_place import written
from .separable import aten, computed_from, shape_of
from .site import Projection

ops = torch.ops.dejavu

# On a CPU the call into C++ takes some 20 us, in which it reads a few hundred KB.
CPU_FROM = 1 << 20


@dataclass(frozen=True, slots=True)
class Replaced:
    """How many projections became GEMVs, in how many launches."""

    count: int
    launches: int


@dataclass(frozen=True, slots=True)
class _Member:
    """A projection that can be part of a launch. Where `owned`, `node` is a GEMV that skips rows of heads."""

    node: fx.Node
    input: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    owned: tuple[fx.Node, fx.Node] | None = None

    @property
    def rows(self) -> int:
        """Its output features."""
        return shape_of(self.node)[-1]


def _owned(node: fx.Node) -> _Member | None:
    """The member for a GEMV of one weight that skips rows."""
    if node.target is not ops.gemv.default or len(node.args) < 6 or len(node.args[1]) != 1:
        return None
    x, (weight,), (bias,), _, *owned = node.args
    source = x.args[0] if x.target is aten.reshape.default else x
    return _Member(node, source, weight, bias, tuple(owned))


def _fits(projection: Projection, max_tokens: int) -> bool:
    """Whether a GEMV can run it; whether one should, on its own, is `_pays`."""
    weight = projection.weight.meta["val"]
    tokens = 1
    for size in shape_of(projection.input)[:-1]:
        if not isinstance(size, int):
            return False
        tokens *= size
    if tokens > max_tokens or projection.contracted != 1:
        return False
    if weight.is_cuda:
        return weight.stride(1) == 1 and weight.is_floating_point()
    form = "rows" if weight.stride(1) == 1 else "sum" if weight.stride(0) == 1 else None
    return form is not None and cpu.function(form, weight.dtype) is not None


def _pays(weight: fx.Node) -> bool:
    value = weight.meta["val"]
    return value.is_cuda or value.numel() * value.element_size() >= CPU_FROM


def _shared(member: _Member) -> tuple[object, ...]:
    """Members go together if this is equal: one input, one dtype, and a bias that is there already."""
    computed = member.bias is not None and member.bias.op not in {"placeholder", "get_attr"}
    return member.input, member.node if computed else None, member.weight.meta["val"].dtype


def _launches(group: list[_Member]) -> list[list[_Member]]:
    """The members of each launch: one that skips rows comes first, and a launch has one of these.

    What decides about the rows must be known before: the predictor that does isn't in the same launch.
    """
    first = [m for m in group if m.owned is not None]
    rest = [m for m in group if m.owned is None]
    decides = {n for m in first for n in computed_from(m.owned[1], m.input)}
    early = [m for m in rest if m.node in decides]
    rest = [m for m in rest if m.node not in decides]
    if not first:
        rest = [m for m in rest if _pays(m.weight)]
    launches = [[m] for m in first] or [[]]
    room = MOST - len(launches[0])
    launches[0] += rest[:room]
    launches += [rest[i : i + MOST] for i in range(room, len(rest), MOST)]
    launches += [[m] for m in early if _pays(m.weight)]
    return [launch for launch in launches if launch]


def _hoist(node: fx.Node, before: fx.Node) -> None:
    """Move a weight, or a view of one, to where it is needed earlier."""
    if node.op == "placeholder" or node < before:
        return
    for source in node.all_input_nodes:
        _hoist(source, before)
    before.prepend(node)


def _as_one(emit: Emitter, group: list[_Member]) -> None:
    """Replace the members of `group`, which share their input, by slices of one GEMV."""
    first = min(m.node for m in group)
    owned = group[0].owned or ()
    for member in group:
        for node in (member.weight, member.bias):
            if node is not None:
                _hoist(node, first)
    for node in owned[:1]:
        _hoist(node, first)
    with emit.before(first):
        x = emit.call(aten.reshape.default, group[0].input, [-1, shape_of(group[0].input)[-1]])
        y = emit.call(
            ops.gemv.default, x, [m.weight for m in group], [m.bias for m in group], "identity",
            *owned,
        )  # fmt: skip
        start = 0
        for member in group:
            part = y
            if len(group) > 1:
                stop = start + member.rows
                part, start = emit.call(aten.slice.Tensor, y, 1, start, stop), stop
            part = emit.call(aten.reshape.default, part, list(shape_of(member.node)))
            emit.replace(member.node, part)


def _by_columns(emit: Emitter, projection: Projection) -> None:
    """Replace a projection on a CPU by the sum of its weight's columns, each times its element of the input."""
    units, node = projection.in_features, projection.node
    where = {"dtype": torch.int32, "device": torch.device("cpu")}
    with emit.before(node):
        x = emit.call(aten.reshape.default, projection.input, [-1, units])
        columns = emit.call(aten.t.default, projection.weight)
        every = emit.call(aten.arange.default, units, **where)
        count = emit.call(aten.full.default, [], units, **where)
        y = emit.call(ops.gathered_sum_cpu.default, x, columns, every, count, False)
        if projection.bias is not None:
            y = emit.call(aten.add.Tensor, y, projection.bias)
        y = emit.call(aten.to.dtype, y, node.meta["val"].dtype)
        emit.replace(node, emit.call(aten.reshape.default, y, list(shape_of(node))))


def use_gemv(gm: fx.GraphModule, max_tokens: int = 1) -> Replaced:
    """Replace what fits, in place."""
    groups, in_place, by_columns = defaultdict(list), written(gm.graph), []
    for node in gm.graph.nodes:
        member = _owned(node)
        if member is None:
            projection = as_projection(node)
            if projection is None or projection.operands & in_place:
                continue
            if not _fits(projection, max_tokens):
                continue
            if projection.weight.meta["val"].stride(1) != 1:
                if _pays(projection.weight):
                    by_columns.append(projection)
                continue
            member = _Member(node, projection.input, projection.weight, projection.bias)
        groups[_shared(member)].append(member)
    emit, count, launches = Emitter(gm), 0, 0
    for group in groups.values():
        for launch in _launches(group):
            _as_one(emit, launch)
            count += sum(member.owned is None for member in launch)
            launches += 1
    for projection in by_columns:
        _by_columns(emit, projection)
    count, launches = count + len(by_columns), launches + len(by_columns)
    if launches:
        gm.graph.eliminate_dead_code()
        gm.graph.lint()
        gm.recompile()
    return Replaced(count, launches)
