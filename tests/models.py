"""Toy modules, one for each spelling of an MLP, and what the tests of passes and kernels measure with.

Each toy takes `keep`, a mask of its units: `toy.double()(x.double(), keep)` is the oracle for a graph
that runs only those units.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from dejavu_compile.passes.find_sites import find_sites
from dejavu_compile.passes.normalize import normalize
from dejavu_compile.passes.site import Decision, Execution, Policy, PredictorWeights, Site

WIDTH = 12
UNITS = 20
TOKENS = 3


def masked(hidden: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    return hidden if keep is None else hidden * keep.to(hidden.dtype)


def handspelled_gelu(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044715 * x**3)))


def relu_squared(x: torch.Tensor) -> torch.Tensor:
    return F.relu(x).square()


class Plain(nn.Module):
    """down(act(up(x)))."""

    def __init__(self, act: Callable = F.relu, width=WIDTH, units=UNITS, bias=True) -> None:
        super().__init__()
        self.act = act
        self.up = nn.Linear(width, units, bias)
        self.down = nn.Linear(units, width, bias)

    def hidden(self, x):
        return self.act(self.up(x))

    def forward(self, x, keep=None):
        return self.down(masked(self.hidden(x), keep))


class Gated(Plain):
    """down(act(gate(x)) * up(x)): SwiGLU."""

    def __init__(self, act: Callable = F.silu, width=WIDTH, units=UNITS, bias=False) -> None:
        super().__init__(act, width, units, bias)
        self.gate = nn.Linear(width, units, bias)

    def hidden(self, x):
        return self.act(self.gate(x)) * self.up(x)


class Chunked(Plain):
    """One projection for gate and up, cut in two halves (Phi3)."""

    def __init__(self, act: Callable = F.silu, width=WIDTH, units=UNITS, bias=False) -> None:
        super().__init__(act, width, units, bias)
        self.up = nn.Linear(width, 2 * units, bias)

    def hidden(self, x):
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.act(gate) * up


class Interleaved(Chunked):
    """One projection for gate and up, which take turns (gpt-oss)."""

    def hidden(self, x):
        both = self.up(x)
        return self.act(both[..., ::2]) * both[..., 1::2]


class Conv1D(nn.Module):
    """addmm on transposed weights (GPT-2)."""

    def __init__(self, act: Callable = F.gelu, width=WIDTH, units=UNITS, bias=True) -> None:
        super().__init__()
        self.act = act
        self.up = nn.Parameter(torch.randn(width, units) / width**0.5)
        self.down = nn.Parameter(torch.randn(units, width) / units**0.5)
        self.up_bias = nn.Parameter(torch.randn(units))
        self.down_bias = nn.Parameter(torch.randn(width))

    def forward(self, x, keep=None):
        flat = torch.addmm(self.up_bias, x.view(-1, x.shape[-1]), self.up)
        h = masked(self.act(flat.view(*x.shape[:-1], -1)), keep)
        flat = torch.addmm(self.down_bias, h.view(-1, h.shape[-1]), self.down)
        return flat.view(*x.shape[:-1], -1)


class MatmulT(Plain):
    """x @ W.T (Falcon)."""

    def forward(self, x, keep=None):
        h = masked(self.act(torch.matmul(x, self.up.weight.T)), keep)
        return torch.matmul(h, self.down.weight.T)


class Parallel(nn.Module):
    """Attention and an MLP on the same input, added up (GPT-NeoX)."""

    def __init__(self, act: Callable = F.gelu, width=WIDTH, units=UNITS, bias=True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias)
        self.out = nn.Linear(width, width, bias)
        self.mlp = Plain(act, width, units, bias)

    def forward(self, x, keep=None):
        y = self.norm(x)
        q, k, v = self.qkv(y).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return x + self.out(attended.reshape(x.shape)) + self.mlp(y, keep)


class Decoder(nn.Module):
    """Two pre-norm MLP layers with a residual stream; `keep` is for the second."""

    def __init__(self, act: Callable = F.relu, width=WIDTH, units=UNITS, bias=True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Plain(act, width, units, bias) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, x, keep=None):
        first, second = self.layers
        x = x + first(self.norms[0](x))
        return x + second(self.norms[1](x), keep)


class Escaping(Plain):
    """The hidden value is a result too."""

    def forward(self, x, keep=None):
        h = self.hidden(x)
        return self.down(masked(h, keep)), h


class EscapingUp(Gated):
    """The up value is a result too; the gate is not."""

    def forward(self, x, keep=None):
        up = self.up(x)
        return self.down(masked(self.act(self.gate(x)) * up, keep)), up


class SharedView(Chunked):
    """A view of the fused gate and up is read outside as well."""

    def forward(self, x, keep=None):
        both = self.up(x).view(-1, self.up.out_features)
        gate, up = both.chunk(2, dim=-1)
        return self.down(masked(self.act(gate) * up, keep)), both.sum(-1)


@dataclass(frozen=True)
class Toy:
    """A module and the sites that it holds: (kind, offset, step) of the leaves, the zero carrier."""

    make: Callable[[], nn.Module]
    leaves: frozenset
    exact: bool
    gated: bool = False


def _rows(*places: tuple[int, int]) -> frozenset:
    return frozenset(("rows", *place) for place in places)


ONE = _rows((0, 1))
TOYS = {
    "relu": Toy(Plain, ONE, True),
    "gelu": Toy(lambda: Plain(F.gelu), ONE, False),
    "relu2": Toy(lambda: Plain(relu_squared, bias=False), ONE, True),
    "handspelled_gelu": Toy(lambda: Plain(handspelled_gelu), ONE, False),
    "glu": Toy(Gated, ONE, False, gated=True),
    "glu_bias": Toy(lambda: Gated(bias=True), ONE, False, gated=True),
    "reglu": Toy(lambda: Gated(F.relu), ONE, True, gated=True),
    "chunked": Toy(Chunked, _rows((0, 1), (UNITS, 1)), False, gated=True),
    "chunked_reglu_bias": Toy(
        lambda: Chunked(F.relu, bias=True), _rows((0, 1), (UNITS, 1)), True, gated=True
    ),
    "interleaved": Toy(Interleaved, _rows((0, 2), (1, 2)), False, gated=True),
    "interleaved_bias": Toy(
        lambda: Interleaved(bias=True), _rows((0, 2), (1, 2)), False, gated=True
    ),
    "conv1d": Toy(Conv1D, ONE, False),
    "conv1d_relu": Toy(lambda: Conv1D(F.relu), ONE, True),
    "matmul_t": Toy(MatmulT, ONE, True),
    "parallel": Toy(Parallel, ONE, False),
    "escaping_up": Toy(EscapingUp, _rows((0, 1)) | {("dense", 0, 1)}, False, gated=True),
}
EXACT = [name for name, toy in TOYS.items() if toy.exact]
GATED = [name for name, toy in TOYS.items() if toy.gated]


def tokens(seed: int = 0, count: int = TOKENS, width: int = WIDTH) -> torch.Tensor:
    """[1, count, width]."""
    return torch.randn(1, count, width, generator=torch.Generator().manual_seed(seed))


# --- a backend that records --------------------------------------------------------------------------


class GraphRecorder:
    """Normalises each graph, applies `passes` to it and runs it eagerly; keeps what they returned."""

    def __init__(self, *passes: Callable[[fx.GraphModule], Any]) -> None:
        self.passes = passes
        self.gm: fx.GraphModule | None = None
        self.before: list[str] = []  # the normalised graph's nodes
        self.results: list[Any] = []
        self.calls = 0

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable:
        """The backend."""
        self.calls += 1
        self.normalized = normalize(gm, example_inputs)
        self.gm, self.before = gm, listing(gm)
        self.results = [run(gm) for run in self.passes]
        return gm.forward

    @property
    def targets(self) -> list[str]:
        """The ops of the graph as it is now: `aten.linear`, `dejavu.select`, ..."""
        return [op(node) for node in self.gm.graph.nodes if node.op == "call_function"]


def op(node: fx.Node) -> str:
    return str(node.target).removesuffix(".default")


def listing(gm: fx.GraphModule) -> list[str]:
    return [node.format_node() for node in gm.graph.nodes]


@torch.no_grad()
def record(model: nn.Module, *inputs: torch.Tensor, passes: Sequence[Callable] = ()):
    """Compile and call `model` once: what it returned, and the recorder."""
    recorder = GraphRecorder(*passes)
    torch.compiler.reset()
    result = torch.compile(model, backend=recorder, fullgraph=True)(*inputs)
    assert recorder.calls == 1
    return result, recorder


def sites_of(model: nn.Module, *inputs: torch.Tensor):
    """What `find_sites` says of `model`, and the recorder."""
    _, recorder = record(model, *inputs, passes=(find_sites,))
    return recorder.results[0], recorder


def forced(site: Site, keep: torch.Tensor, execution=Execution.GATHERED, source=None) -> Decision:
    """A predictor that selects exactly `keep`, whatever its source says."""
    source = site.input if source is None else source
    width, dtype = source.meta["val"].shape[-1], source.meta["val"].dtype
    predictor = PredictorWeights(
        down=torch.zeros(2, width, dtype=dtype),
        up=torch.zeros(site.units, 2, dtype=dtype),
        bias=torch.where(keep, 1.0, -1.0),
    )
    return Decision(site, Policy.PREDICT, execution, source=source, predictor=predictor)


# --- oracles -----------------------------------------------------------------------------------------


@torch.no_grad()
def oracle(model: nn.Module, x: torch.Tensor, keep: torch.Tensor | None = None):
    """The dense module in float64, with every unit outside `keep` zeroed."""
    return copy.deepcopy(model).double()(x.double(), keep)


def first(result):
    """The MLP's own result, of those that a toy returns."""
    return result[0] if isinstance(result, tuple) else result


def assert_as_exact_as(
    plain: torch.Tensor,
    got: torch.Tensor,
    exact: torch.Tensor,
    among: torch.Tensor | None = None,
    others: Sequence[tuple[torch.Tensor, torch.Tensor]] = (),
) -> None:
    """`got` errs at most twice as much as `plain`, the same in plain PyTorch, plus one rounding.

    `among`: the values that `exact` is a part of. A part of one or two may be near zero by chance, where
    a sum's rounding is that of its terms. `others`: more (plain, exact) of the same computation; a single small result may
    be rounded well by luck.
    """
    assert got.shape == exact.shape
    among = exact if among is None else among
    scale = among.abs().max() if among.numel() else torch.tensor(0.0)
    error = max((p.double() - e).abs().max() for p, e in ((plain, exact), *others))
    allowed = 2 * error + torch.finfo(plain.dtype).eps * scale
    assert (got.double() - exact).abs().max() <= allowed


def assert_near(got: torch.Tensor, exact: torch.Tensor, relative: float = 2e-6) -> None:
    """`got`, a short fp32 computation, is `exact` but for rounding."""
    assert got.shape == exact.shape
    assert (got.double() - exact).abs().max() <= relative * exact.abs().max().clamp_min(1)
