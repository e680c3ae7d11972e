"""What is written in place is made functional, or left alone: never read as it was before."""

import models
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from models import UNITS, WIDTH, Plain, forced, record, tokens
from torch import nn

from dejavu_compile.passes.find_sites import find_sites
from dejavu_compile.passes.in_place import written
from dejavu_compile.passes.rewrite import rewrite

KEEP = torch.arange(UNITS) % 3 == 0


class Steps(Plain):
    """down(h), after `steps` had their way with h = up(x); `steps` may return another value."""

    def __init__(self, steps):
        super().__init__()
        self.steps = steps

    def hidden(self, x):
        h = self.up(x)
        result = self.steps(h)
        return h if result is None else result


def relu_(h):
    F.relu(h, inplace=True)


def twice_(h):
    h.relu_().mul_(2.0)


def returned_(h):
    return h.clamp_(min=0.0).square_()


def after_(h):
    """The activation is functional; what is written comes after it, and is read by its old name."""
    a = torch.relu(h)
    a.mul_(3.0)
    return a


def through_a_view_(h):
    a = torch.relu(h)
    a.view(-1).mul_(3.0)
    return a


def under_two_names_(h):
    a = torch.relu(h)
    b = a[..., ::2]
    a.mul_(3.0)
    b.add_(1.0)
    return a


FUNCTIONAL = [relu_, twice_, returned_, after_]
LEFT = [through_a_view_, under_two_names_]


def sparse(model, *inputs, keep=KEEP):
    """The model's result with the selected units of each MLP, and the recorder."""

    def rewriting(gm):
        sites = find_sites(gm).sites
        rewrite(gm, tuple(forced(site, keep) for site in sites))
        return sites

    return record(model, *inputs, passes=(rewriting,))


@pytest.mark.parametrize("steps", FUNCTIONAL, ids=lambda s: s.__name__)
def test_a_value_without_another_name_is_made_functional(steps):
    model = Steps(steps).eval()
    _, recorder = record(model, tokens(), passes=(find_sites,))
    assert len(recorder.results[0].sites) == 1
    assert not written(recorder.gm.graph)
    keep = KEEP
    got, _ = sparse(model, tokens())
    hidden = model.double().hidden(tokens().double())
    models.assert_near(got, model.down(hidden * keep))


@pytest.mark.parametrize("steps", LEFT, ids=lambda s: s.__name__)
def test_a_value_with_two_names_is_no_site(steps):
    model = Steps(steps).eval()
    got, recorder = sparse(model, tokens())
    assert recorder.results[0] == ()
    reasons = [u.reason for u in find_sites(recorder.gm).unmatched]
    assert any("written in place" in reason for reason in reasons)
    models.assert_near(got, model.double()(tokens().double()))


class WrittenInput(Plain):
    """The input of `up` is written after `up` has read it."""

    def forward(self, x, keep=None):
        x = x * 2.0
        v = x.view(-1, WIDTH)
        h = self.act(self.up(x))
        v.add_(1.0)
        return self.down(h) + v.sum()


def test_an_input_that_is_written_later_is_not_read_again():
    model = WrittenInput().eval()
    got, _ = sparse(model, tokens(), keep=torch.ones(UNITS, dtype=torch.bool))
    models.assert_near(got, model.double()(tokens().double()))


class Cached(nn.Module):
    """A state that is written, as a static cache is."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, UNITS), nn.Linear(UNITS, WIDTH)
        self.register_buffer("state", torch.zeros(UNITS))

    def forward(self, x):
        h = self.up(x).relu()
        self.state.copy_(h.mean((0, 1)))
        return self.down(h) + self.state.sum()


@torch.no_grad()
def test_a_write_to_a_buffer_is_kept():
    model = Cached().eval()
    got, recorder = sparse(model, tokens(), keep=torch.ones(UNITS, dtype=torch.bool))
    state = model.state.clone()
    assert "aten.copy_" in recorder.targets
    want = model(tokens())
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(state, model.state)


OPS = {
    "relu_": lambda h: h.relu_(),
    "mul_": lambda h: h.mul_(-1.5),
    "view": lambda h: h.view(h.shape),
    "slice": lambda h: h[..., ::2],
    "flat mul_": lambda h: h.view(-1).mul_(2.0),
    "half add_": lambda h: h[..., 1::2].add_(0.5),
    "tanh": lambda h: h.tanh(),
    "square_": lambda h: h.square_(),
}


@given(
    st.lists(st.tuples(st.sampled_from(sorted(OPS)), st.integers(0, 5)), min_size=1, max_size=6),
    st.integers(0, 2**16),
)
def test_any_mixture_of_writes_and_views_keeps_its_meaning(steps, seed):
    """Each step acts on one of the values so far; then the last two of full width are multiplied."""

    def mixed(h):
        values = [h]
        for name, which in steps:
            values.append(OPS[name](values[which % len(values)]))
        wide = [v for v in values if v.shape[-1] == UNITS and v.dim() == 3]
        return wide[-1] * wide[len(wide) // 2]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Steps(mixed).eval()
    x = tokens(seed)
    got, _ = sparse(model, x, keep=torch.ones(UNITS, dtype=torch.bool))
    with torch.no_grad():
        want = model.double()(x.double())
    models.assert_near(got, want, 1e-4)
