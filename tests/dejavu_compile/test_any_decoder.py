"""Decoders that transformers doesn't have, and graphs that Dynamo didn't capture from a model."""

import copy
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import dejavu_compile as dv
from dejavu_compile.attachments import Attachment, attach, fingerprint, make_unit_major
from dejavu_compile.passes.find_sites import find_sites
from dejavu_compile.passes.normalize import normalize
from dejavu_compile.passes.rewrite import rewrite
from dejavu_compile.passes.site import Decision, Execution, Policy, PredictorWeights

WIDTH, HEADS, UNITS, VOCABULARY, LAYERS = 128, 4, 256, 64, 3


def ids(seed=0, batch=2, length=24):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator)


# --- as people write them ----------------------------------------------------------------------------------


class Attention(nn.Module):
    """Karpathy's: one projection for q, k and v, a causal buffer, softmax spelled out."""

    def __init__(self):
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("bias", torch.tril(torch.ones(64, 64)).view(1, 1, 64, 64))

    def forward(self, x):
        b, t, c = x.size()
        q, k, v = self.c_attn(x).split(WIDTH, dim=2)
        q, k, v = (y.view(b, t, HEADS, c // HEADS).transpose(1, 2) for y in (q, k, v))
        weights = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        weights = weights.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf"))
        y = F.softmax(weights, dim=-1) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(b, t, c))


class NewGELU(nn.Module):
    def forward(self, x):
        inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
        return 0.5 * x * (1.0 + torch.tanh(inner))


class Block(nn.Module):
    def __init__(self, act=None):
        super().__init__()
        self.ln_1, self.ln_2, self.attn = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), Attention()
        act = NewGELU() if act is None else act
        self.mlp = nn.Sequential(nn.Linear(WIDTH, UNITS), act, nn.Linear(UNITS, WIDTH))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Decoder(nn.Module):
    """Embeddings, layers, a head that shares the embedding's weight."""

    def __init__(self, layers, between=lambda x: x):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(64, WIDTH)
        self.layers, self.norm = nn.ModuleList(layers), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight, self.between = self.wte.weight, between

    def forward(self, input_ids):
        x = self.wte(input_ids) + self.wpe(torch.arange(input_ids.size(1)))
        for layer in self.layers:
            x = self.between(layer(x))
        return self.head(self.norm(x))


class MultiheadBlock(nn.Module):
    """`nn.MultiheadAttention`, whose weights of q, k and v are one parameter."""

    def __init__(self):
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.up, self.down = nn.Linear(WIDTH, UNITS), nn.Linear(UNITS, WIDTH)

    def forward(self, x):
        y = self.norm(x)
        mask = nn.Transformer.generate_square_subsequent_mask(x.size(1))
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.down(F.relu(self.up(self.norm2(x))))


class TransformerDecoderBlock(nn.TransformerDecoderLayer):
    """`nn.TransformerDecoderLayer` with a learned memory: cross-attention too."""

    def __init__(self):
        super().__init__(WIDTH, HEADS, UNITS, batch_first=True, norm_first=True)
        self.memory = nn.Parameter(torch.randn(1, 5, WIDTH))

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.size(1))
        return super().forward(x, self.memory.expand(x.size(0), -1, -1), tgt_mask=mask)


class Differential(Attention):
    """Differential attention by two calls, each of half of the values: a unit is the difference of two heads."""

    def forward(self, x):
        b, t, c = x.size()
        q, k, v = (y.view(b, t, HEADS, c // HEADS).transpose(1, 2)
                   for y in self.c_attn(x).split(WIDTH, dim=2))  # fmt: skip
        both = [
            F.scaled_dot_product_attention(q, k, half.repeat(1, 2, 1, 1), is_causal=True)
            for half in v.chunk(2, dim=1)
        ]
        one, two = torch.cat([y.transpose(1, 2) for y in both], dim=-1).chunk(2, dim=2)
        y = F.rms_norm(one - 0.4 * two, (one.shape[-1],))
        return self.c_proj(y.reshape(b, t, c))


class DifferentialBlock(Block):
    def __init__(self):
        super().__init__()
        self.attn = Differential()


class EinsumBlock(nn.Module):
    """Every projection an einsum; those of attention with weights [width, heads, head_dim]."""

    def __init__(self, matrices=True):
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        d, self.matrices = WIDTH // HEADS, matrices
        shape = (WIDTH, WIDTH) if matrices else (WIDTH, HEADS, d)
        self.q, self.k, self.v = (nn.Parameter(torch.randn(shape) / 11) for _ in range(3))
        self.o = nn.Parameter(torch.randn((WIDTH, WIDTH) if matrices else (HEADS, d, WIDTH)) / 11)
        self.gate, self.up = (nn.Parameter(torch.randn(WIDTH, UNITS) / 11) for _ in range(2))
        self.down = nn.Parameter(torch.randn(UNITS, WIDTH) / 11)

    def heads(self, x, weight):
        if not self.matrices:
            return torch.einsum("btd,dhk->bthk", x, weight)
        return torch.einsum("btd,df->btf", x, weight).unflatten(-1, (HEADS, -1))

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (self.heads(y, w) for w in (self.q, self.k, self.v))
        logits = torch.einsum("bqhk,bshk->bhqs", q, k) / 6
        t = x.size(1)
        logits = logits + torch.full((t, t), float("-inf")).triu(1)
        y = torch.einsum("bhqs,bshk->bqhk", logits.softmax(-1), v)
        if self.matrices:
            x = x + torch.einsum("btf,fd->btd", y.flatten(2), self.o)
        else:
            x = x + torch.einsum("bqhk,hkd->bqd", y, self.o)
        y = self.norm2(x)
        h = F.silu(torch.einsum("btd,df->btf", y, self.gate)) * torch.einsum(
            "btd,df->btf", y, self.up
        )
        return x + torch.einsum("btf,fd->btd", h, self.down)


def shared():
    return [Block()] * LAYERS


def graph_break(x):
    torch._dynamo.graph_break()
    return x


DECODERS = {
    "nanogpt": lambda: Decoder([Block() for _ in range(LAYERS)]),
    "nanogpt relu": lambda: Decoder([Block(nn.ReLU()) for _ in range(LAYERS)]),
    "multihead attention": lambda: Decoder([MultiheadBlock() for _ in range(LAYERS)]),
    "transformer decoder layer": lambda: Decoder([TransformerDecoderBlock() for _ in range(LAYERS)]),
    "differential": lambda: Decoder([DifferentialBlock() for _ in range(LAYERS)]),
    "einsum": lambda: Decoder([EinsumBlock() for _ in range(LAYERS)]),
    "einsum heads": lambda: Decoder([EinsumBlock(matrices=False) for _ in range(LAYERS)]),
    "shared layers": lambda: Decoder(shared()),
    "graph breaks": lambda: Decoder([Block() for _ in range(LAYERS)], graph_break),
}  # fmt: skip
# (MLPs, attentions) of a pass through the model, where not one of each a layer
SITES = {"einsum heads": (3, 0)}
# What reads the attention of each layer that is in no site
LONE = {"einsum heads": "o", "transformer decoder layer": "multihead_attn.out_proj.weight"}


def make(name):
    torch.manual_seed(0)
    return DECODERS[name]().eval().requires_grad_(False)


def assert_near(got, want):
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("name", DECODERS)
def test_nothing_attached_is_lossless(name, prepared):
    model = make(name)
    compiled = torch.compile(model, backend="dejavu_eager")
    for length in (1, 9):
        assert_near(compiled(ids(length=length)), model(ids(length=length)))
    assert prepared


@pytest.mark.parametrize("name", DECODERS)
def test_what_was_found_is_told(name):
    report = dv.explain(make(name), ids(batch=1, length=1))
    kinds = [site.kind for site in report.sites]
    assert (kinds.count("mlp"), kinds.count("attention")) == SITES.get(name, (LAYERS, LAYERS))
    named = {site.name for site in report.sites} | {entry.name for entry in report.unmatched}
    assert all(entry.reason for entry in (*report.sites, *report.unmatched))
    weights = {n for n, p in make(name).named_parameters() if p.dim() > 1}
    assert named <= weights
    lone = [entry.name for entry in report.lone_attention]
    assert lone == [f"layers.{i}.{LONE[name]}" for i in range(LAYERS) if name in LONE]
    if name == "einsum heads":
        assert {f"layers.{i}.{w}" for i in range(LAYERS) for w in "qkvo"} <= named
        assert all("stack of matrices" in entry.reason for entry in report.lone_attention)


@pytest.mark.parametrize("name", ["differential", "nanogpt"])
def test_every_attention_of_a_layer_belongs_to_its_site(name, prepared):
    torch.compile(make(name), backend="dejavu_eager")(ids(batch=1, length=1))
    sites = [s for p in prepared for s in p.found.sites if s.kind == "attention"]
    calls, units = (2, HEADS // 2) if name == "differential" else (1, HEADS)
    assert [(s.units, len(s.attended)) for s in sites] == [(units, calls)] * LAYERS


def attach_half(model, found):
    """A predictor a site that always selects the same units; the model with the other columns zeroed."""
    zeroed = copy.deepcopy(model)
    parameters, theirs = dict(model.named_parameters()), dict(zeroed.named_parameters())
    for number, site in enumerate({s.name: s for s in found}.values()):
        keep = torch.arange(site.units) % 3 == number % 2
        for projection in (*site.projections, site.output):
            weight, into = parameters[projection.name], projection is not site.output
            make_unit_major(weight, projection.contracted, produces_units=into)
        width, heads = site.input.meta["val"].shape[-1], site.kind == "attention"
        down, up = torch.zeros(2, width), torch.zeros(site.units, width if heads else 2)
        predictor = PredictorWeights(None if heads else down, up, torch.where(keep, 1.0, -1.0))
        out = parameters[site.name]
        attach(out, Attachment(Policy.PREDICT, 0.01, fingerprint(out), predictor=predictor,
                               source=weakref.ref(out)))  # fmt: skip
        columns = theirs[site.name] if site.output.contracted == 0 else theirs[site.name].T
        columns[~keep.repeat_interleave(site.width)] = 0
    return zeroed


@pytest.mark.parametrize("name", [n for n in DECODERS if n != "graph breaks"])
def test_selected_units_and_heads_equal_eager_with_the_other_columns_zeroed(name, prepared):
    model = make(name)
    with torch.no_grad():
        torch.compile(model, backend="dejavu_eager")(ids(batch=1, length=1))
        zeroed = attach_half(model, [site for p in prepared for site in p.found.sites])
        for execution, batch, length in (("masked", 2, 9), ("auto", 1, 1)):
            del prepared[:]
            torch.compiler.reset()
            options = {"dejavu.execution": execution, "dejavu.exact": False}
            text = ids(batch=batch, length=length)
            got = torch.compile(model, backend="dejavu_eager", options=options)(text)
            sparse = sum(p.plan.num_sparse for p in prepared)
            assert sparse == sum(SITES.get(name, (LAYERS, LAYERS)))
            assert_near(got, zeroed(text))
            assert (got - model(text)).abs().max() > 1e-3 * got.abs().max()


def test_predictors_of_a_graph_that_breaks_are_for_each_layer_and_say_why_they_do_not_run():
    """Layers of one class are one graph to Dynamo, of whichever weights."""
    model = make("graph breaks")
    texts = [ids(seed, batch=8, length=48) for seed in range(3)]
    done = dv.calibrate(model, texts, policy="predict", density=0.3, progress=False)
    names = [site.name for site in done.sites if site.kind == "mlp"]
    assert [site.layer for site in done.sites if site.kind == "mlp"] == [0, 1, 2]
    assert names == [f"layers.{i}.mlp.2.weight" for i in range(LAYERS)]
    report = dv.explain(model, ids(batch=1, length=1))
    mlps = [site for site in report.sites if site.kind == "mlp"]
    assert [site.name for site in mlps] == names
    reasons = {site.reason for site in mlps if site.layer > 0}
    assert reasons == {"the site that its predictor reads is not in the same graph"}
    compiled = torch.compile(model, backend="dejavu_eager")
    assert_near(compiled(ids()), model(ids()))


# --- graphs from elsewhere ---------------------------------------------------------------------------------


class Traceable(nn.Module):
    """Nothing that depends on a shape, so that `symbolic_trace` takes it."""

    def __init__(self):
        super().__init__()
        self.wte, self.norm = nn.Embedding(VOCABULARY, WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, UNITS), nn.Linear(UNITS, WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, input_ids):
        x = self.wte(input_ids)
        q, k, v = (
            p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(self.norm(x))))


FRONT_DOORS = {
    "symbolic_trace": lambda model, x: fx.symbolic_trace(model),
    "export": lambda model, x: torch.export.export(model, (x,)).module(),
    "make_fx": lambda model, x: make_fx(model)(x),
    "make_fx before dispatch": lambda model, x: make_fx(model, pre_dispatch=True)(x),
}
# `make_fx` decomposes attention to an op of one backend.
HEADLESS = {"make_fx"}


@pytest.fixture
def traceable():
    return Traceable().eval().requires_grad_(False)


@pytest.mark.parametrize("door", FRONT_DOORS)
def test_passes_run_on_graphs_from_elsewhere(door, traceable):
    """Alone: no Dynamo around them."""
    x = ids(batch=1, length=1)
    gm, want = FRONT_DOORS[door](traceable, x), traceable(x)
    normalize(gm, [x])
    found = find_sites(gm)
    assert [str(s.kind) for s in found.sites] == ["attention", "mlp"][door in HEADLESS :]
    exact = [s for s in found.sites if s.exact is not None]
    rewrite(gm, tuple(Decision(s, Policy.EXACT, Execution.GATHERED) for s in exact))
    gm.graph.lint()
    got = gm(x)
    assert_near(got[0] if isinstance(got, tuple | list) else got, want)
    assert any("gathered_sum" in str(n.target) for n in gm.graph.nodes)


@pytest.mark.parametrize("door", FRONT_DOORS)
def test_backend_takes_graphs_from_elsewhere(door, traceable, prepared):
    x = ids(batch=1, length=1)
    gm, want = FRONT_DOORS[door](traceable, x), traceable(x)
    compiled = torch.compile(gm, backend="dejavu_eager")
    assert_near(compiled(x), want)
    assert [str(s.kind) for s in prepared[0].found.sites] == ["attention", "mlp"][
        door in HEADLESS :
    ]
    assert_near(compiled(x), want)
    assert prepared[-1].plan.num_sparse == 1
