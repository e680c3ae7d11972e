"""Find the residual stream behind a site: the sum that its output goes into.

    y = linear(h, Wo); r = add(x, dropout(y))           ->      r

Asks only. Norms between the output and the sum are passed (Gemma-2 has one), since whatever the output goes
through alone is a part of what is added.
"""

import torch
from torch import fx

from .separable import ADD

FURTHEST = 16  # ops between an output projection and the sum


def residual_after(output: fx.Node) -> fx.Node | None:
    """The first sum of `output`, or of what it alone becomes, with another value of its size; None if none is near."""
    frontier, seen = [output], {output}
    for _ in range(FURTHEST):
        following = []
        for node in frontier:
            for user in node.users:
                if _is_residual(user, seen):
                    return user
                if user not in seen:
                    seen.add(user)
                    following.append(user)
        frontier = following
    return None


def _is_residual(node: fx.Node, branch: set[fx.Node]) -> bool:
    """A sum of the branch with a value from before it; a bias or an epsilon is smaller than the sum."""
    if node.target not in ADD:
        return False
    others = [n for n in node.all_input_nodes if n not in branch]
    return any(_shape(other) == _shape(node) for other in others)


def _shape(node: fx.Node) -> torch.Size | None:
    value = node.meta.get("val")
    return value.shape if isinstance(value, torch.Tensor) else None
