"""Spell an einsum of two values as the projection or the matrix product that it is.

    einsum("btd,fd->btf", x, W)             ->      linear(x, W)
    einsum("bthd,bshd->bhts", q, k)         ->      matmul(permute(q), permute(k))

Letters are told apart by where they occur: in both operands and the result (`batch`), in both operands only
(`contracted`), or in one operand and the result (`rows`, `columns`). An einsum that repeats a letter in one
operand, sums over a letter of one alone, or uses an ellipsis stays as it is.
"""

from dataclasses import dataclass

from torch import fx

from .emit import Emitter
from .separable import aten


@dataclass(frozen=True, slots=True)
class _Letters:
    """The letters of left operand, right operand and result, and of the four roles."""

    left: str
    right: str
    result: str

    def of(self, *, left: bool, right: bool, result: bool) -> str:
        """Those that occur in just these, in the result's order, or in the left operand's."""
        order = self.result + self.left
        return "".join(
            letter
            for letter in dict.fromkeys(order)
            if (letter in self.left, letter in self.right, letter in self.result)
            == (left, right, result)
        )

    @property
    def batch(self) -> str:
        return self.of(left=True, right=True, result=True)

    @property
    def contracted(self) -> str:
        return self.of(left=True, right=True, result=False)

    @property
    def rows(self) -> str:
        return self.of(left=True, right=False, result=True)

    @property
    def columns(self) -> str:
        return self.of(left=False, right=True, result=True)

    @property
    def readable(self) -> bool:
        """Each letter has one of the roles, and occurs once in an operand."""
        each = (self.left, self.right, self.result)
        roles = self.batch + self.contracted + self.rows + self.columns
        return (
            all(text.isalpha() and len(set(text)) == len(text) for text in each if text)
            and set(roles) == set(self.left + self.right + self.result)
            and len(self.contracted) == 1
        )


def _letters(node: fx.Node) -> _Letters | None:
    equation, operands = node.args[0].replace(" ", ""), node.args[1]
    if "->" not in equation or len(operands) != 2:
        return None
    inputs, result = equation.split("->")
    found = _Letters(*inputs.split(","), result)
    return found if found.readable else None


def _permuted(emit: Emitter, node: fx.Node, letters: str, order: str) -> fx.Node:
    """`node`, whose dims are `letters`, with its dims in `order`, and ones for letters that it lacks."""
    there = [letter for letter in order if letter in letters]
    dims = [letters.index(letter) for letter in there]
    swapped = [*range(len(dims) - 2), len(dims) - 1, len(dims) - 2]
    if dims == swapped and len(dims) > 1:
        node = emit.call(aten.transpose.int, node, -2, -1)
    elif dims != sorted(dims):
        node = emit.call(aten.permute.default, node, dims)
    for at, letter in enumerate(order):
        if letter not in letters:
            node = emit.call(aten.unsqueeze.default, node, at)
    return node


def _projection(emit: Emitter, found: _Letters, x: fx.Node, weight: fx.Node) -> fx.Node | None:
    """The einsum as a linear of `x`, if `weight` is a matrix parameter."""
    if weight.op not in ("placeholder", "get_attr") or len(found.right) != 2 or found.batch:
        return None
    if len(found.columns) != 1:
        return None
    if found.right.index(found.contracted) == 0:
        weight = emit.call(aten.t.default, weight)
    x = _permuted(emit, x, found.left, found.rows + found.contracted)
    y = emit.call(aten.linear.default, x, weight)
    return _permuted(emit, y, found.rows + found.columns, found.result)


def _product(emit: Emitter, found: _Letters, left: fx.Node, right: fx.Node) -> fx.Node | None:
    """The einsum as a matmul, if each operand has rows of its own in one dim, or the left in several."""
    if not found.rows or len(found.columns) != 1 or not found.batch:
        return None
    shared, last = found.batch + found.rows[:-1], found.rows[-1]
    left = _permuted(emit, left, found.left, shared + last + found.contracted)
    right = _permuted(emit, right, found.right, shared + found.contracted + found.columns)
    y = emit.call(aten.matmul.default, left, right)
    return _permuted(emit, y, shared + last + found.columns, found.result)


def spell_out_einsum(gm: fx.GraphModule) -> int:
    """Replace what can be read, in place; how many there were."""
    emit, done = Emitter(gm), 0
    for node in gm.graph.find_nodes(op="call_function", target=aten.einsum.default):
        found = _letters(node)
        if found is None:
            continue
        left, right = node.args[1]
        turned = _Letters(found.right, found.left, found.result)
        with emit.before(node):
            new = _projection(emit, found, left, right)
            new = _projection(emit, turned, right, left) if new is None else new
            new = _product(emit, found, left, right) if new is None else new
            new = _product(emit, turned, right, left) if new is None else new
        if new is None:
            continue
        emit.replace(node, new)
        gm.graph.erase_node(node)
        done += 1
    return done
