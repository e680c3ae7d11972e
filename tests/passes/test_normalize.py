"""One spelling of each op, in the same GraphModule, with the placeholders as Dynamo made them."""

import models
import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from dejavu_compile._compat import qualified_name
from dejavu_compile.passes.normalize import normalize


@pytest.mark.parametrize("name", models.TOYS)
@torch.no_grad()
def test_result_is_that_of_eager(name):
    model = models.TOYS[name].make()
    x = models.tokens()
    got, _ = models.record(model, x)
    assert torch.equal(models.first(got), models.first(model(x)))


def test_linear_and_attention_stay_whole():
    _, recorder = models.record(models.Parallel(), models.tokens())
    assert recorder.targets.count("aten.linear") == 4
    assert recorder.targets.count("aten.scaled_dot_product_attention") == 1


@pytest.mark.parametrize(
    ("name", "expected"), [("conv1d", "aten.addmm"), ("matmul_t", "aten.matmul")]
)
def test_spellings_become_aten(name, expected):
    _, recorder = models.record(models.TOYS[name].make(), models.tokens())
    assert recorder.targets.count(expected) == 2
    assert all(target.startswith(("aten.", "<built-in")) for target in recorder.targets)


def test_module_object_and_placeholders_stay():
    before = {}

    def backend(gm, example_inputs):
        old = [node for node in gm.graph.nodes if node.op == "placeholder"]
        before.update({node.name: (dict(node.meta), qualified_name(node)) for node in old})
        done = normalize(gm, example_inputs)
        assert done.gm is gm
        new = [node for node in gm.graph.nodes if node.op == "placeholder"]
        assert [node.name for node in new] == [node.name for node in old]
        for node in new:
            meta, name = before[node.name]
            assert meta.keys() <= node.meta.keys()
            assert all(node.meta[key] is value for key, value in meta.items() if key != "val")
            assert qualified_name(node) == name
        return gm.forward

    with torch.no_grad():
        torch.compile(models.Plain(), backend=backend)(models.tokens())
    names = {name for _, name in before.values()}
    assert {"up.weight", "up.bias", "down.weight", "down.bias", None} == names


def test_every_value_has_a_shape():
    _, recorder = models.record(models.Chunked(), models.tokens())
    nodes = [node for node in recorder.gm.graph.nodes if node.op != "output"]
    assert all("val" in node.meta for node in nodes)


def test_restore_brings_the_graph_back():
    kept = {}

    def backend(gm, example_inputs):
        kept["graph"], kept["listing"] = gm.graph, models.listing(gm)
        done = normalize(gm, example_inputs)
        assert models.listing(gm) != kept["listing"]
        done.restore()
        kept["gm"] = gm
        return gm.forward

    model, x = models.Chunked(), models.tokens()
    with torch.no_grad():
        got = torch.compile(model, backend=backend)(x)
        assert torch.equal(got, model(x))
    assert models.listing(kept["gm"]) == kept["listing"]


def test_symbolic_size_adds_no_guard():
    sizes = []

    def backend(gm, example_inputs):
        normalize(gm, example_inputs)
        sizes.extend(
            node.meta["val"].shape[1]
            for node in gm.graph.nodes
            if models.op(node) == "aten.linear"
        )
        return gm.forward

    model = models.Plain()
    compiled = torch.compile(model, backend=backend, dynamic=True)
    torch._dynamo.config.error_on_recompile = True
    try:
        with torch.no_grad():
            for count in (3, 5, 9):
                x = models.tokens(0, count)
                assert torch.equal(compiled(x), model(x))
    finally:
        torch._dynamo.config.error_on_recompile = False
    assert len(sizes) >= 2
    assert all(isinstance(size, torch.SymInt) for size in sizes)


@torch.no_grad()
def test_works_without_dynamo():
    model, x = nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 4)), torch.randn(2, 4)
    gm = fx.symbolic_trace(model)
    normalize(gm, [x])
    assert torch.equal(gm(x), model(x))
    assert [models.op(node) for node in gm.graph.nodes if node.op == "call_function"] == [
        "aten.linear",
        "aten.silu",
        "aten.linear",
    ]


class _NamedLikeAnOp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(4, 4)

    def forward(self, relu, linear):
        return self.down(F.relu(relu) + linear)


@torch.no_grad()
def test_inputs_named_like_ops():
    model = _NamedLikeAnOp()
    inputs = [torch.randn(2, 4), torch.randn(2, 4)]
    gm = fx.symbolic_trace(model)
    normalize(gm, inputs)
    gm.graph.lint()
    assert torch.equal(gm(*inputs), model(*inputs))
