"""A predictor stands right behind its source, a layer ahead of its site, and the result is the same."""

import models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import specs

from dejavu_compile.passes.find_sites import find_sites
from dejavu_compile.passes.fuse import fuse
from dejavu_compile.passes.rewrite import rewrite
from dejavu_compile.passes.schedule import Issue, schedule

KEEP = torch.arange(models.UNITS) % 4 == 1


def scheduled(model, x, keep, issue):
    """Site by site as in the pipeline; the last is predicted from the first site's input."""
    sources = []

    def run(gm):
        sites = find_sites(gm).sites
        sources.append(sites[0].input)
        done = rewrite(gm, (models.forced(sites[-1], keep, source=sites[0].input),))
        fuse(gm)
        result = schedule(gm, done.selects, issue)
        gm.graph.lint()
        return result

    got, recorder = models.record(model, x, passes=(run,))
    return got, recorder, sources[0]


@pytest.mark.parametrize("issue", Issue)
def test_result_is_the_same(issue):
    model, x = models.Decoder(), models.tokens()
    got, _, _ = scheduled(model, x, KEEP, issue)
    models.assert_near(got, models.oracle(model, x, KEEP))


@pytest.mark.parametrize("issue", Issue)
def test_select_sits_right_behind_its_source(issue):
    _, recorder, source = scheduled(models.Decoder(), models.tokens(), KEEP, issue)
    wanted = "dejavu.select" if issue is Issue.INLINE else "dejavu.select_begin"
    node, between = source.next, []
    while models.op(node) != wanted:
        between.append(models.op(node) if node.op == "call_function" else node.op)
        node = node.next
    assert set(between) <= {"aten.reshape", "get_attr"}
    (result,) = recorder.results
    assert result.moved == 1
    assert result.distance[0] > 8  # the whole first layer lies in between


def test_side_stream_joins_before_the_first_reader():
    _, recorder, _ = scheduled(models.Decoder(), models.tokens(), KEEP, Issue.SIDE_STREAM)
    assert "dejavu.select" not in recorder.targets
    nodes = list(recorder.gm.graph.nodes)
    (join,) = [n for n in nodes if models.op(n) == "dejavu.select_join"]
    (begin,) = [n for n in nodes if models.op(n) == "dejavu.select_begin"]
    index, count = join.args[:2]
    for part in (index, count):
        assert part.args[0] is begin
        readers = [user for user in part.users if user is not join]
        assert readers
        assert all(nodes.index(join) < nodes.index(reader) for reader in readers)
    assert join.args[3] is begin.args[0]


@pytest.mark.parametrize("early", [False, True])
def test_the_side_stream_is_told_whether_its_launches_overlap(early):
    def run(gm):
        one, two = find_sites(gm).sites
        done = rewrite(gm, (models.forced(two, KEEP, source=one.input),))
        return schedule(gm, done.selects, Issue.SIDE_STREAM, early)

    _, recorder = models.record(models.Decoder(), models.tokens(), passes=(run,))
    (begin,) = recorder.gm.graph.find_nodes(
        op="call_function", target=torch.ops.dejavu.select_begin.default
    )
    assert begin.args[5] is early


def test_source_that_is_an_input_of_the_graph():
    for issue in Issue:
        model, x = models.Plain(), models.tokens()
        got, _, _ = scheduled(model, x, KEEP, issue)
        models.assert_near(got, models.oracle(model, x, KEEP))


def test_several_predictors_from_one_source():
    model, x = models.Decoder(), models.tokens()

    def run(gm):
        one, two = find_sites(gm).sites
        every = torch.ones(models.UNITS, dtype=torch.bool)
        done = rewrite(gm, (models.forced(one, every), models.forced(two, KEEP, source=one.input)))
        return schedule(gm, done.selects, Issue.SIDE_STREAM)

    got, recorder = models.record(model, x, passes=(run,))
    assert recorder.results[0].moved == 2
    models.assert_near(got, models.oracle(model, x, KEEP))
    # A join that waited for whatever was begun would wait for the next layer's predictor too.
    nodes = recorder.gm.graph.nodes
    begun = {n: n.args[4] for n in nodes if models.op(n) == "dejavu.select_begin"}
    joined = {n.args[0].args[0]: n.args[4] for n in nodes if models.op(n) == "dejavu.select_join"}
    assert begun == joined
    assert set(begun.values()) == {0, 1}


def test_nothing_to_schedule_changes_no_node():
    _, recorder = models.record(
        models.Decoder(), models.tokens(), passes=(lambda gm: schedule(gm, (), Issue.SIDE_STREAM),)
    )
    assert recorder.results[0].moved == 0
    assert models.listing(recorder.gm) == recorder.before


@given(issue=st.sampled_from(Issue), spec=specs(spellings=("decoder", "parallel", "gated")))
def test_any_units(issue, spec):
    model, x, keep = spec.model(), spec.input(), spec.keep()
    got, _, _ = scheduled(model, x, keep, issue)
    models.assert_near(got, models.oracle(model, x, keep))
