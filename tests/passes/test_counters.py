"""Counters that a step advances are advanced together, where nothing reads them afterwards."""

import models
import pytest
import torch
from torch import nn

from dejavu_compile.passes.counters import count_together


class Steps(nn.Module):
    """Each counter is read, then advanced: a static cache's way. `after`: what reads one later."""

    def __init__(self, numbers, after=None):
        super().__init__()
        self.numbers, self.after = numbers, after

    def forward(self, x, *counters):
        for counter, number in zip(counters, self.numbers, strict=True):
            view = counter.view(1)
            x = x + counter * 2
            counter.add_(number)
        if self.after == "value":
            x = x * counters[0]
        if self.after == "view":
            x = x * view
        return x


def run(numbers, *, after=None, counters=None):
    """How many were advanced together; the result and the counters are those of the eager model."""
    model = Steps(numbers, after)
    counters = counters or [torch.tensor(10 * i) for i in range(len(numbers))]
    want_counters = [c.clone() for c in counters]
    want = model(torch.ones(3), *want_counters)
    got, recorder = models.record(model, torch.ones(3), *counters, passes=(count_together,))
    assert torch.equal(got, want)
    assert counters == want_counters
    return recorder.results[0], recorder.targets.count("aten._foreach_add_.Scalar")


def test_together():
    assert run([1, 1, 1]) == (3, 1)


def test_those_of_one_number_together():
    assert run([1, 2, 1, 2, 3]) == (4, 2)


def test_one_alone_stays_where_it_is():
    assert run([1]) == (0, 0)


@pytest.mark.parametrize("after", ["value", "view"])
def test_what_is_read_afterwards_is_left_alone(after):
    count, launches = run([1, 1, 1], after=after)
    assert (count, launches) == (2, 1)


def test_two_names_of_one_counter_are_left_alone():
    both = torch.zeros(2, dtype=torch.long)
    counters = [both[0], both[1], torch.tensor(5), torch.tensor(7)]
    model = Steps([1, 1, 1, 1])
    copies = [c.clone() for c in counters]
    want = model(torch.ones(3), *copies)
    got, recorder = models.record(model, torch.ones(3), *counters, passes=(count_together,))
    assert torch.equal(got, want)
    assert [int(c) for c in counters] == [int(c) for c in copies]
    assert recorder.results[0] == 2


def test_floating_point_is_left_alone():
    assert run([1, 1], counters=[torch.tensor(1.0), torch.tensor(2.0)])[0] == 0
