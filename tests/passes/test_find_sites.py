"""Each spelling of an MLP is a site with the right leaves and carriers, or says why it is none."""

import models
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from models import TOYS, UNITS, WIDTH
from strategies import EXACT, specs
from torch import nn

from dejavu_compile.passes import gemv
from dejavu_compile.passes.find_sites import find_sites
from dejavu_compile.passes.in_place import targets_of
from dejavu_compile.passes.normalize import normalize
from dejavu_compile.passes.rewrite import rewrite
from dejavu_compile.passes.site import Decision, Execution, NoSite, Policy, SiteKind


def only_site(model, *inputs):
    found, _ = models.sites_of(model, *(inputs or (models.tokens(),)))
    (site,) = [site for site in found.sites if site.kind is SiteKind.MLP]
    return site


def reasons(model, *inputs):
    """By the projection's name, why it has no site; there is no site."""
    found, recorder = models.sites_of(model, *(inputs or (models.tokens(),)))
    assert not found.sites
    assert models.listing(recorder.gm) == recorder.before
    return {unmatched.projection.name: unmatched.code for unmatched in found.unmatched}


@pytest.mark.parametrize("name", TOYS)
def test_units_and_leaves(name):
    toy = TOYS[name]
    site = only_site(toy.make())
    assert (site.kind, site.units, site.num_tokens) == (SiteKind.MLP, UNITS, models.TOKENS)
    assert {(leaf.kind, leaf.offset, leaf.step) for leaf in site.leaves} == toy.leaves
    assert len(site.leaves) == 1 + toy.gated
    assert all(leaf.projection.in_features == WIDTH for leaf in site.row_leaves)
    assert site.output.out_features == WIDTH


@pytest.mark.parametrize("name", TOYS)
def test_exact_carrier_only_where_zeros_are_made(name):
    site = only_site(TOYS[name].make())
    assert (site.exact is not None) == TOYS[name].exact


@pytest.mark.parametrize("name", models.EXACT)
def test_exact_carrier_is_the_activation_or_behind_it(name):
    site = only_site(TOYS[name].make())
    expected = {"relu2": "aten.square"}.get(name, "aten.relu")
    node = site.exact.node
    while models.op(node) in ("aten.view", "aten.reshape"):
        node = node.args[0]
    assert models.op(node) == expected
    assert len(site.exact.needs) == 1  # not the up projection of a gated MLP


@pytest.mark.parametrize("name", [n for n in models.GATED if n != "escaping_up"])
def test_gate_carrier_spares_the_up_projection(name):
    site = only_site(TOYS[name].make())
    assert models.op(site.gate.node) in ("aten.silu", "aten.relu")
    (needed,) = site.gate.needs
    assert needed in {leaf.node for leaf in site.leaves}
    assert site.gate.node is not site.hidden


@pytest.mark.parametrize("name", TOYS)
def test_every_other_projection_is_unmatched(name):
    found, recorder = models.sites_of(TOYS[name].make(), models.tokens())
    inside = {site.output.node for site in found.sites}
    inside |= {projection.node for site in found.sites for projection in site.projections}
    inside |= {leaf.projection.node for s in found.sites for leaf in s.leaves if leaf.projection}
    others = {unmatched.projection.node for unmatched in found.unmatched}
    projections = {
        node
        for node in recorder.gm.graph.nodes
        if models.op(node) in ("aten.linear", "aten.addmm")
        or (models.op(node) == "aten.matmul" and node.args[1].target is not None)
    }
    assert projections == inside | others
    assert all(unmatched.reason for unmatched in found.unmatched)


def test_gate_carrier_with_a_dense_up_is_the_product():
    site = only_site(models.EscapingUp())
    assert site.gate.node is site.hidden
    assert len(site.gate.needs) == 1


def test_fused_leaves_share_a_projection():
    site = only_site(models.Chunked())
    first, second = site.leaves
    assert first.projection.node is second.projection.node
    assert first.projection.out_features == 2 * UNITS


def test_conv1d_contracts_the_first_dim():
    site = only_site(models.Conv1D())
    assert site.output.contracted == 0
    assert site.leaves[0].projection.contracted == 0
    assert site.name == "down"


def test_names_and_layers_come_from_the_module():
    found, _ = models.sites_of(models.Decoder(), models.tokens())
    assert [site.name for site in found.sites] == [
        "layers.0.down.weight",
        "layers.1.down.weight",
    ]
    assert [site.layer for site in found.sites] == [0, 1]


def test_attention_is_a_site_of_heads():
    found, _ = models.sites_of(models.Parallel(), models.tokens())
    heads, mlp = found.sites
    assert (heads.kind, heads.units, heads.width) == (SiteKind.ATTENTION, 2, WIDTH // 2)
    assert mlp.kind is SiteKind.MLP
    (owned,) = heads.owned
    # Without a cache nothing else reads a head's keys and values: they are its own, too.
    assert owned.projection.name == "qkv.weight"
    assert owned.per_unit == 3 * heads.width
    assert heads.bytes_dense == 4 * (3 + 1) * WIDTH * WIDTH
    assert found.unmatched == ()


def test_bytes():
    site = only_site(models.Gated())
    assert site.bytes_per_unit == 3 * WIDTH * 4
    assert site.bytes_dense == UNITS * site.bytes_per_unit


def test_symbolic_number_of_tokens_is_none():
    found = []

    def backend(gm, example_inputs):
        found.append(find_sites(normalize(gm, example_inputs).gm))
        return gm.forward

    with torch.no_grad():
        torch.compile(models.Plain(), backend=backend, dynamic=True)(models.tokens())
    assert [site.num_tokens for site in found[0].sites] == [None]


# --- no site -----------------------------------------------------------------------------------------


def test_escaping_hidden_is_no_site():
    assert reasons(models.Escaping())["down.weight"] in (NoSite.RESIDUAL, NoSite.SHARED)


def test_escaping_up_becomes_a_dense_leaf():
    site = only_site(models.EscapingUp())
    assert sorted(leaf.kind for leaf in site.leaves) == ["dense", "rows"]


def test_shared_view_is_kept():
    assert reasons(models.SharedView())["down.weight"] == NoSite.SHARED


def test_no_activation_is_linear():
    assert reasons(models.Plain(lambda x: x * 2.0))["down.weight"] == NoSite.LINEAR
    assert reasons(models.Plain(lambda x: x))["down.weight"] == NoSite.LINEAR


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: F.softmax(F.relu(x), -1),
        lambda x: F.layer_norm(F.relu(x), (UNITS,)),
        lambda x: F.relu(x).cumsum(-1),
        lambda x: F.relu(x).flip(-1),
        lambda x: F.relu(x) / F.relu(x).sum(-1, keepdim=True),
        lambda x: F.relu(x).roll(1, -1),
    ],
    ids=["softmax", "layer_norm", "cumsum", "flip", "normalised", "roll"],
)
def test_ops_that_mix_units_end_the_walk(mix):
    model = models.Plain(mix)
    found, _ = models.sites_of(model, models.tokens())
    # A sum over the units is a value that every unit sees; but one that changes with the units kept.
    assert not [site for site in found.sites if site.name == "down.weight"]


def test_inplace_activation_is_one_like_any_other():
    found, _ = models.sites_of(models.Plain(lambda x: F.relu_(x + 1)), models.tokens())
    assert [site.name for site in found.sites] == ["down.weight"]
    assert found.sites[0].exact is not None


class _SoftmaxHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 7)

    def forward(self, x):
        return F.softmax(self.head(self.norm(x)), -1)


def test_graph_without_a_site_is_unchanged():
    assert reasons(_SoftmaxHead()) == {"head.weight": NoSite.RESIDUAL}


class _NoProjection(nn.Module):
    def forward(self, x):
        return F.relu(x) * 2


def test_graph_without_a_projection():
    assert reasons(_NoProjection()) == {}


# --- equal meanings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda: models.Plain(F.relu, bias=False), lambda: models.MatmulT(F.relu, bias=False)),
        (lambda: models.Plain(F.relu), lambda: models.Plain(lambda x: x.clamp(min=0))),
        (lambda: models.Plain(F.relu), lambda: models.Plain(nn.Threshold(0.0, 0.0))),
        (lambda: models.Plain(F.gelu), lambda: models.Plain(models.handspelled_gelu)),
        (lambda: models.Plain(F.silu), lambda: models.Plain(lambda x: x * torch.sigmoid(x))),
        (lambda: models.Chunked(), lambda: models.Interleaved()),
        (
            lambda: models.Plain(models.relu_squared),
            lambda: models.Plain(lambda x: torch.pow(F.relu(x), 2)),
        ),
    ],
    ids=["matmul", "clamp", "threshold", "gelu", "silu", "interleaved", "pow"],
)
def test_spellings_give_equal_sites(one, other):
    a, b = only_site(one()), only_site(other())
    assert (a.units, len(a.leaves), a.bytes_dense) == (b.units, len(b.leaves), b.bytes_dense)
    assert (a.exact is None, a.gate is None) == (b.exact is None, b.gate is None)


@given(specs())
def test_carriers_silence_their_units(spec):
    """Where a carrier is zero the unit contributes nothing: `exact` at threshold 0 loses nothing."""
    model, x = spec.model(), spec.input()

    def exact(gm):
        sites = [site for site in find_sites(gm).sites if site.kind is SiteKind.MLP]
        assert sites
        for site in sites:
            assert site.units == spec.units
            assert (site.exact is not None) == (spec.activation in EXACT)
        return rewrite(
            gm,
            tuple(Decision(s, Policy.EXACT, Execution.GATHERED) for s in sites if s.exact),
        )

    got, _ = models.record(model, x, passes=(exact,))
    models.assert_near(models.first(got), models.first(models.oracle(model, x)))


@pytest.mark.parametrize("index", range(3))
def test_a_weight_that_is_written_between_its_uses_is_in_no_site(index):
    class Fast(nn.Module):
        def forward(self, x, *weights):
            gate, up, down = weights
            hidden = torch.relu(x @ gate.T) * (x @ up.T)
            weights[index].mul_(-3)
            return hidden @ down.T

    make = torch.Generator().manual_seed(0)
    sizes = ((1, 16), (64, 16), (64, 16), (16, 64))
    tensors = [torch.randn(size, generator=make) for size in sizes]
    found, _ = models.sites_of(Fast(), *(t.clone() for t in tensors))
    used = {projection.weight for site in found.sites for projection in site.projections}
    used |= {site.output.weight for site in found.sites}
    assert not any(targets_of(user) for weight in used for user in weight.users)
    # As a whole, at the second step too, when columns lie together.
    compiled = torch.compile(Fast(), backend="dejavu_eager")
    given = [t.clone() for t in tensors]
    expected = [t.clone() for t in tensors]
    with torch.no_grad():
        for _ in range(3):
            models.assert_near(compiled(*given), Fast()(*expected), 1e-5)


@pytest.mark.parametrize("backend", ["dejavu_eager", "dejavu"])
@torch.no_grad()
def test_under_autocast_projections_stay_as_they_are(backend, monkeypatch):
    monkeypatch.setattr(gemv, "CPU_FROM", 0)
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    x, compiled = models.tokens(count=1, width=64), torch.compile(model, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            got, want = compiled(x), model(x)
            assert got.dtype is want.dtype is torch.bfloat16
            torch.testing.assert_close(got, want)
    for _ in range(2):  # and without it they are sparse
        models.assert_near(compiled(x), model.double()(x.double()), 1e-5)
        model.float()
