"""A step whose selections are given: what its predictors take of a step is the difference.

    index, count = select(source, down, up, bias)        ->        index, count: the units of which bias is above zero

A random predictor's scores are its bias (`attach_random_predictors`), so the same units run. Scores of heads come
out of the launch of queries, keys and values, and stay.
"""

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import fx

from dejavu_compile import backend
from dejavu_compile._compat import unset_fake_temporarily
from dejavu_compile.attachments import attached
from dejavu_compile.passes.emit import Emitter
from dejavu_compile.passes.schedule import Issue, Scheduled


def give(gm: fx.GraphModule, selects: tuple[fx.Node, ...], issue: Issue, early: bool) -> Scheduled:
    """In the place of `schedule`: a list and a count instead of each predictor."""
    emit = Emitter(gm)
    for number, select in enumerate(selects):
        bias = getattr(gm, select.args[3].target)
        with unset_fake_temporarily():
            units = (bias > 0).nonzero().flatten().int()
            index = units.new_zeros(bias.numel())
            index[: units.numel()] = units
            count = torch.tensor(units.numel(), dtype=torch.int32, device=bias.device)
        for pick in list(select.users):
            assert pick.target is operator.getitem
            with emit.before(pick):
                given = (index, count)[pick.args[1]]
                pick.replace_all_uses_with(
                    emit.buffer(f"dejavu_given_{number}_{pick.args[1]}", given)
                )
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    return Scheduled(0, ())


@contextmanager
def selections_given() -> Iterator[None]:
    """Meanwhile graphs are compiled without the predictors of MLPs, for models with random ones."""
    with mock.patch.object(backend, "schedule", give):
        yield


def predictor_bytes(weights: list[torch.nn.Parameter]) -> int:
    """Of what is attached to the weights out of MLPs."""
    attachments = (attached(weight) for weight in weights)
    return sum(a.selector_bytes for a in attachments if a is not None)
