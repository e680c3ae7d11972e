"""What several of our kernels read is one buffer, and nothing else changes."""

import models
import pytest
import torch
from tiny import decode_graph, texts, tiny
from torch import nn

import dejavu_compile as dv
from dejavu_compile.passes import gemv
from dejavu_compile.passes.emit import Emitter
from dejavu_compile.passes.gemv import use_gemv
from dejavu_compile.passes.one_buffer import one_buffer

aten, ops = torch.ops.aten, torch.ops.dejavu


@pytest.fixture(autouse=True)
def every_size(monkeypatch):
    monkeypatch.setattr(gemv, "CPU_FROM", 0)


class Norm(nn.Module):
    """Projections of a normed input, four in a launch; `change` to the norm before them."""

    def __init__(self, change=None, weights=5):
        super().__init__()
        self.change = change
        self.norm = nn.LayerNorm(32)
        self.outs = nn.ModuleList(nn.Linear(32, 16 + 8 * i) for i in range(weights))

    def forward(self, x):
        y = self.norm(x)
        if self.change is not None:
            y = self.change(y)
        return [out(y) for out in self.outs]


def written_under_another_name(y):
    y.view(-1).mul_(2)
    return y


def run(model):
    x = models.tokens(count=1, width=32)
    got, recorder = models.record(model, x, passes=(use_gemv, one_buffer))
    for one, expected in zip(got, model(x), strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-5)
    gemvs = recorder.gm.graph.find_nodes(op="call_function", target=ops.gemv.default)
    return recorder.results[-1], [node.args[0] for node in gemvs]


def test_two_kernels_read_one_value():
    count, inputs = run(Norm())
    assert count == 1
    assert len(inputs) == 2
    assert set(inputs) == {inputs[0]}
    assert inputs[0].target is aten.as_strided.default


def test_one_kernel_is_left_alone():
    count, inputs = run(Norm(weights=2))
    assert count == 0
    assert inputs[0].target is aten.reshape.default


@pytest.mark.parametrize(
    "change",
    [
        lambda y: torch.stack([y, y])[1],  # begins in the middle of its memory
        lambda y: torch.cat([y, y], -1)[..., ::2],  # not contiguous
        written_under_another_name,
    ],
    ids=["offset", "strided", "written"],
)
def test_what_is_not_a_value_of_its_own_is_left_alone(change):
    count, inputs = run(Norm(change))
    assert count == 0
    assert all(one.target is not aten.as_strided.default for one in inputs)


@pytest.mark.parametrize("issue", ["inline", "side_stream"])
@torch.no_grad()
def test_a_predictors_source_is_the_buffer_that_its_site_and_its_join_read(issue):
    model = tiny("opt", layers=3)
    dv.calibrate(model, texts(), density=0.5, progress=False)
    graph = decode_graph(model, issue=issue)

    def calls(op):
        return graph.find_nodes(op="call_function", target=op)

    selects = calls(ops.select.default if issue == "inline" else ops.select_begin.default)
    sources = [select.args[0] for select in selects]
    assert len(sources) == 2
    assert all(source.target is aten.as_strided.default for source in sources)
    if issue == "side_stream":
        assert [join.args[3] for join in calls(ops.select_join.default)] == sources
    # The site that is predicted from, where that is sparse too, reads the very same.
    assert calls(ops.gathered_rows.default)[0].args[0] is sources[1]


def held(graph):
    """Of each predictor on the side stream: what it reads, and what its join keeps."""
    begins = graph.find_nodes(op="call_function", target=ops.select_begin.default)
    joins = graph.find_nodes(op="call_function", target=ops.select_join.default)
    kept = {join.args[4]: join.args[3] for join in joins}
    return [(begin.args[0], kept[begin.args[4]]) for begin in begins]


@torch.no_grad()
def test_a_cast_that_changes_nothing_is_looked_through():
    model = tiny("gemma2", layers=3)  # in fp32 its norms end in a type_as of what they are
    dv.calibrate(model, texts(), density=0.5, policy="predict", progress=False)
    found = held(decode_graph(model, issue="side_stream"))
    assert len(found) == 2
    for source, kept in found:
        assert source is kept
        assert source.target is aten.as_strided.default
        assert source.args[0].target not in {aten.to.dtype, aten.clone.default}


@pytest.mark.parametrize("change", ["slice", "written"])
@torch.no_grad()
def test_a_source_that_is_no_value_of_its_own_is_copied_for_the_side_stream(change):
    model = tiny("opt", layers=3)
    dv.calibrate(model, texts(), density=0.5, progress=False)
    graph = decode_graph(model, issue="side_stream")
    (source, _), *_ = held(graph)
    begin = next(n for n in source.users if n.target is ops.select_begin.default)
    join = next(n for n in source.users if n.target is ops.select_join.default)
    emit = Emitter(graph.owning_module)
    with emit.before(begin):
        if change == "slice":
            both = emit.call(aten.cat.default, [source, source])
            other = emit.call(aten.slice.Tensor, both, 0, 1, 2)
        else:
            other = emit.call(aten.mul.Tensor, source, 1)
            emit.call(aten.add_.Tensor, emit.call(aten.reshape.default, other, [-1]), 1)
    for node in (begin, join):
        node.replace_input_with(source, other)
    one_buffer(graph.owning_module)
    copied, kept = held(graph)[0]
    assert copied is kept
    assert copied.target is aten.as_strided.default
    assert copied.args[0].target is aten.clone.default
    assert copied.args[0].args[0] is other
