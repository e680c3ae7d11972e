"""Block sizes by a search on this machine: what is looked up, what is kept, and when a search ends."""

import json
import logging

import pytest
import torch
from launched import operations
from tiny import texts, tiny

import dejavu_compile as dv
from dejavu_compile import autotune, backend, launches
from dejavu_compile.autotune import ConfigFile, Origin, Timed, find_best, in_table, look_up
from dejavu_compile.kernels import tuning
from dejavu_compile.options import Options, split_options
from dejavu_compile.passes.site import SiteKind

DENSITIES = {SiteKind.MLP: 0.1, SiteKind.ATTENTION: 0.5}


def graph_of(*names, tokens=1, times=1):
    """A graph that calls operations by their names in `launched`."""
    graph = torch.fx.Graph()

    def node(value):
        if isinstance(value, list):
            return [node(v) for v in value]
        if not isinstance(value, torch.Tensor):
            return value
        placeholder = graph.placeholder("x")
        placeholder.meta["val"] = value
        return placeholder

    for name in names * times:
        op, *args = operations(tokens)[name]
        graph.call_function(op, tuple(node(arg) for arg in args))
    return graph


def launches_named(*names, densities=DENSITIES, **kwargs):
    return launches.launches_of(graph_of(*names, **kwargs), densities)


def result(launch, number):
    """What a search might find: that candidate."""
    return {launch: Timed(launch.candidates[number], 1.0, 2.0, 3)}


@pytest.fixture
def file(tmp_path):
    return ConfigFile(tmp_path / "made" / "block_sizes.json")


# --- the launches of a graph ------------------------------------------------------------------------------


def test_launches_of_one_key_are_counted_together():
    found = launches_named("rows", "sum", times=3)
    assert [launch.count for launch in found] == [3, 3]
    assert [launch.key.split()[0] for launch in found] == ["rows", "sum"]


@pytest.mark.parametrize(
    ("name", "density"),
    [("rows", 0.1), ("sum", 0.1), ("gemv", None), ("gemv of heads", 0.5), ("head_sum", 0.5), ("attention", None),
     ("attention of heads", 0.5)],
)  # fmt: skip
def test_a_launch_is_known_by_the_density_that_its_time_depends_on(name, density):
    (launch,) = launches_named(name)
    if density is None:
        assert launch.density is None
        assert launch.name == launch.key
    else:
        assert density / 2**0.25 <= launch.density <= density * 2**0.25
        (other,) = launches_named(name, densities=dict.fromkeys(SiteKind, 1.0))
        assert other.key == launch.key
        assert other.name != launch.name


@pytest.mark.parametrize("density", [0.0, 1e-9, 0.02, 0.1, 0.5, 0.9, 1.0])
def test_steps_of_density_are_few_and_their_own(density):
    step = launches.step_of(density)
    assert 0 < step <= 1
    assert launches.step_of(step) == step
    assert len({launches.step_of(i / 1000) for i in range(1001)}) <= 12


def test_launches_of_symbolic_shapes_keep_their_rule():
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    graph = graph_of("attention")
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        for node in graph.find_nodes(op="placeholder"):
            node.meta["val"] = mode.from_tensor(node.meta["val"], static_shapes=False)
        assert launches.launches_of(graph, DENSITIES) == ()


@pytest.mark.parametrize("tokens", [1, 3], ids=["m1", "m3"])
@pytest.mark.parametrize("name", operations(1))
def test_made_up_arguments_lie_as_the_graphs_do_and_no_weight_is_met_again(name, tokens):
    (launch,) = launches_named(name, tokens=tokens)
    needed = launches.CACHES * 4096
    calls = launches.made_up(launch, 4096)
    assert len(calls) >= 4
    assert len(calls) * launch.read_bytes >= needed or len(calls) == launches.SETS
    read = set()
    for call in calls:
        assert vars(call).keys() == vars(launch.arguments).keys()
        for name, given in vars(launch.arguments).items():
            made = vars(call)[name]
            pairs = zip(made, given, strict=True) if isinstance(given, list) else [(made, given)]
            for a, b in pairs:
                if isinstance(b, torch.Tensor):
                    assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
                else:
                    assert a == b
        weights = [id(value) for key, value in vars(call).items() if key in launches.WEIGHTS]
        chosen = ()
        if "index" in vars(call):
            units = call.index[: int(call.count)]
            assert len(units.unique()) == max(1, round(launch.density * len(call.index)))
            chosen = tuple(units.tolist())
        read.add((*weights, chosen))
    sets = {key[:-1] for key in read}
    assert len(read) == len(calls) or len(sets) * launch.weight_bytes >= needed


# --- look-up ----------------------------------------------------------------------------------------------


def test_a_searchs_result_comes_before_the_rule(file):
    rows, total = launches_named("rows", "sum")
    file.add("here", result(rows, 2))
    chosen = look_up((rows, total), "here", file)
    assert [c.origin for c in chosen] == [Origin.SEARCH, Origin.RULE]
    assert [c.config for c in chosen] == [rows.candidates[2], total.candidates[0]]
    assert in_table(chosen) == {rows.key: rows.candidates[2]}


def test_another_machine_and_another_density_are_not_meant(file):
    (rows,) = launches_named("rows")
    file.add("here", result(rows, 2))
    (denser,) = launches_named("rows", densities=dict.fromkeys(SiteKind, 0.9))
    for launch, machine in ((rows, "there"), (denser, "here")):
        (choice,) = look_up((launch,), machine, file)
        assert choice.origin is Origin.RULE


def test_the_rule_found_best_is_not_searched_again_and_changes_no_table(file):
    (rows,) = launches_named("rows")
    file.add("here", result(rows, 0))
    chosen = look_up((rows,), "here", file)
    assert chosen[0].origin is Origin.SEARCH
    assert in_table(chosen) == {}


@pytest.mark.parametrize(
    "entry",
    [None, 7, [], {}, {"config": None}, {"config": {"BLOCK_J": 3}}, {"config": {"BLOCK_J": "2"}}, {"config": [1]}],
    ids=str,
)  # fmt: skip
def test_what_is_no_candidate_is_passed_by_and_replaced(file, entry):
    (rows,) = launches_named("rows")
    file.path.parent.mkdir()
    content = {"format": autotune.FORMAT, "machines": {"here": {rows.name: entry}}}
    file.path.write_text(json.dumps(content))
    (choice,) = look_up((rows,), "here", file)
    assert choice.origin is Origin.RULE
    file.add("here", result(rows, 2))
    (choice,) = look_up((rows,), "here", ConfigFile(file.path))
    assert choice.config == rows.candidates[2]


# --- the file ---------------------------------------------------------------------------------------------


def test_a_new_process_finds_what_was_kept(file):
    (rows,) = launches_named("rows")
    file.add("here", result(rows, 1))
    file.add("there", result(rows, 2))
    again = ConfigFile(file.path)
    assert look_up((rows,), "here", again)[0].config == rows.candidates[1]
    assert look_up((rows,), "there", again)[0].config == rows.candidates[2]
    assert list(file.path.parent.iterdir()) == [file.path], "nothing is left of writing it"


def test_what_was_found_first_stays(file):
    (rows,) = launches_named("rows")
    file.add("here", result(rows, 1))
    other = ConfigFile(file.path)
    other.add("here", result(rows, 2))
    for same in (file, other):
        assert look_up((rows,), "here", same)[0].config == rows.candidates[1]


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "7", "null", '{"format": 1}', '{"format": 1, "machines": 3}', '{"format": 99, "machines": {}}',
     '{"format": 1, "machines": {"here": 5}}', '{"format": 1, "machines": {"here": [1, 2]}}', "\x00\xff"],
    ids=range(11),
)  # fmt: skip
def test_a_corrupt_file_counts_as_empty_and_is_replaced(file, content):
    (rows,) = launches_named("rows")
    file.path.parent.mkdir()
    file.path.write_bytes(content.encode("latin-1"))
    assert look_up((rows,), "here", file)[0].origin is Origin.RULE
    file.add("here", result(rows, 1))
    assert look_up((rows,), "here", ConfigFile(file.path))[0].config == rows.candidates[1]


def test_a_file_that_cannot_be_written_is_kept_in_memory(tmp_path, caplog):
    (tmp_path / "made").write_text("a file where a folder has to be")
    unwritable = ConfigFile(tmp_path / "made" / "block_sizes.json")
    (rows,) = launches_named("rows")
    with caplog.at_level(logging.WARNING):
        unwritable.add("here", result(rows, 1))
    assert "can't be written" in caplog.text
    assert look_up((rows,), "here", unwritable)[0].config == rows.candidates[1]


# --- search -----------------------------------------------------------------------------------------------


class Clock:
    """Moves when something is timed."""

    def __init__(self, us, seconds=1.0):
        self.now, self.us, self.seconds, self.timed = 0.0, us, seconds, []

    def __call__(self):
        return self.now

    def timer(self, launch):
        def time_us(config):
            self.now += self.seconds
            self.timed.append((launch.name, launch.candidates.index(config)))
            return self.us(launch, launch.candidates.index(config))

        return time_us


def search(clock, *names, budget_s=1e9):
    found = launches_named(*names)
    return found, find_best(found, clock.timer, budget_s, clock)


def test_the_fastest_candidate_wins():
    clock = Clock(lambda launch, number: [10.0, 9.0, 5.0, 6.0, 8.0][min(number, 4)])
    (rows,), found = search(clock, "rows")
    timed = found[rows]
    assert (timed.config, timed.us, timed.rule_us) == (rows.candidates[2], 5.0, 10.0)
    assert timed.tried == len(rows.candidates)
    assert len(clock.timed) == len(rows.candidates) + 2, (
        "the winner is timed again beside the rule"
    )


def test_a_gain_within_the_noise_is_none():
    (rows,), found = search(Clock(lambda _, number: 10.0 if number == 0 else 9.9), "rows")
    assert found[rows].config == rows.candidates[0]


def test_a_gain_that_does_not_repeat_is_none():
    seen = []

    def us(_, number):
        seen.append(number)
        return 5.0 if number == 2 and seen.count(2) == 1 else 10.0

    (rows,), found = search(Clock(us), "rows")
    assert seen.count(2) == 2
    assert found[rows].config == rows.candidates[0]


def test_candidates_that_fail_are_passed_by():
    (rows,), found = search(Clock(lambda _, number: None if number in {1, 2} else 10.0 - number), "rows")  # fmt: skip
    assert found[rows].config == rows.candidates[-1]
    assert found[rows].tried == len(rows.candidates) - 2


@pytest.mark.parametrize("budget_s", [0.0, 3.0, 12.0, 18.0])
def test_a_search_ends_in_time_and_says_what_is_left(budget_s, caplog):
    clock = Clock(lambda _, number: 10.0 - number)
    with caplog.at_level(logging.WARNING):
        given, found = search(clock, "rows", "sum", "gemv", budget_s=budget_s)
    assert clock.now <= budget_s + 3 * clock.seconds  # what was begun, and the winner once more
    assert len(found) < 3
    left = [launch.name for launch in given if launch not in found]
    assert all(name in caplog.text for name in left)
    for launch in given:
        tried = {number for name, number in clock.timed if name == launch.name}
        assert (launch in found) == (len(tried) == len(launch.candidates))


def test_what_reads_most_is_searched_first():
    clock = Clock(lambda _, number: 10.0)
    given, found = search(clock, "rows", "gemv", "sum")
    order = list(dict.fromkeys(name for name, _ in clock.timed))
    assert order == [x.name for x in sorted(given, key=lambda x: -x.read_bytes * x.count)]
    assert len(found) == 3


def test_full_memory_leaves_a_launch_to_its_rule():
    def timer(launch):
        if launch.key.startswith("rows"):
            raise torch.OutOfMemoryError("no room")
        return lambda config: 1.0

    given = launches_named("rows", "sum")
    assert list(find_best(given, timer)) == [given[1]]


# --- the backend ------------------------------------------------------------------------------------------


@pytest.fixture
def searchable(monkeypatch, tmp_path):
    """This machine as one where our Triton kernels run, the third candidate being the fastest. What was timed."""
    clock = Clock(lambda _, number: 1.0 if number == 2 else 10.0)
    file = ConfigFile(tmp_path / "block_sizes.json")
    monkeypatch.setattr(autotune, "can_search", lambda device: True)
    monkeypatch.setattr(autotune, "machine", lambda device: "here")
    monkeypatch.setattr(autotune, "config_file", lambda: file)
    monkeypatch.setattr(autotune, "GraphTimer", clock.timer)
    return clock


@pytest.fixture(scope="module")
def predicted():
    model = tiny("opt", layers=3)
    dv.calibrate(model, texts(), policy="predict", density=0.3, progress=False)
    return model


def compile_step(model, monkeypatch, **kwargs):
    """What Inductor is given: the cache key of our pass, and the table that is in force meanwhile."""
    seen = []

    def compile_fx(gm, example_inputs, config_patches=None):
        slot = config_patches["post_grad_custom_post_pass"]
        seen.append((slot.uuid(), dict(tuning._in_force.get({}))))
        return gm.forward

    monkeypatch.setattr(backend, "compile_fx", compile_fx)
    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(model.forward, backend="dejavu", **kwargs)(
            torch.tensor([[5]]), use_cache=False
        )
    ((uuid, table),) = seen
    return uuid, table


SEARCH = {"options": {"dejavu.autotune": True}}


def test_nothing_is_searched_unless_asked_for(predicted, monkeypatch, searchable):
    _, table = compile_step(predicted, monkeypatch)
    assert searchable.timed == []
    assert table == {}


def test_a_search_is_made_once_and_used_from_then_on(predicted, monkeypatch, searchable, prepared):
    before, _ = compile_step(predicted, monkeypatch)
    searched, table = compile_step(predicted, monkeypatch, **SEARCH)
    number = len(searchable.timed)
    assert number > 0
    assert len(table) >= 2
    wanted = {launch.key: launch.candidates[2] for launch in prepared[-1].launches}
    assert table == wanted
    assert compile_step(predicted, monkeypatch, **SEARCH) == (searched, table)
    # Without the option too: what a machine computes doesn't depend on who asked.
    assert compile_step(predicted, monkeypatch) == (searched, table)
    assert len(searchable.timed) == number
    assert before != searched, "the caches on disk hold code of the rules"


def test_caches_on_disk_are_kept_where_the_rules_were_best(predicted, monkeypatch, searchable):
    searchable.us = lambda launch, number: 1.0
    before = compile_step(predicted, monkeypatch)
    assert compile_step(predicted, monkeypatch, **SEARCH) == before
    assert searchable.timed


def test_the_key_of_the_caches_tells_tables_apart():
    def uuid(configs, **options):
        return backend._CacheKey(Options(**options), configs).uuid()

    a, b = {"rows": {"BLOCK_J": 2}, "sum": {"splits": 1}}, {"rows": {"BLOCK_J": 4}, "sum": {"splits": 1}}  # fmt: skip
    assert len({uuid({}), uuid(a), uuid(b), uuid({"rows": a["rows"]})}) == 4
    assert uuid(a) == uuid(dict(reversed(a.items())))
    assert uuid(a, autotune=True) == uuid(a)
    assert uuid(a, max_tokens=2) != uuid(a)


def test_the_mean_density_of_the_sites_is_that_of_the_search(
    predicted, monkeypatch, searchable, prepared
):
    compile_step(predicted, monkeypatch)
    plans = [s for s in prepared[-1].plan.sites if s.decision.policy == "predict"]
    mean = sum(s.density for s in plans) / len(plans)
    rows = [launch for launch in prepared[-1].launches if launch.key.startswith("rows")]
    assert rows
    assert {launch.density for launch in rows} == {launches.step_of(mean)}


def test_explain_says_what_runs_and_why(predicted, monkeypatch, searchable):
    step = {"input_ids": torch.tensor([[5]]), "use_cache": False}
    report = dv.explain(predicted, **step)
    assert {entry.origin for entry in report.block_sizes} == {"rule"}
    compile_step(predicted, monkeypatch, **SEARCH)
    report = dv.explain(predicted, **step)
    assert {entry.origin for entry in report.block_sizes} == {"search"}
    for entry in report.block_sizes:
        assert f"{entry.launches} x {entry.launch}" in str(report)
    assert "(by search)" in str(report)
    assert json.dumps(report.to_dict()["block_sizes"])


def test_on_a_cpu_there_is_nothing_to_search(predicted, monkeypatch):
    monkeypatch.setattr(autotune, "machine", None)
    _, table = compile_step(predicted, monkeypatch, **SEARCH)
    assert table == {}
    assert dv.explain(predicted, torch.tensor([[5]]), use_cache=False).block_sizes == []


# --- options ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "options", "searches"),
    [(None, None, False), ("default", None, False), ("reduce-overhead", None, False), ("max-autotune", None, True),
     ("max-autotune-no-cudagraphs", None, True), (None, {"dejavu.autotune": True}, True),
     ("max-autotune", {"dejavu.autotune": False}, False)],
)  # fmt: skip
def test_modes_that_autotune_search(mode, options, searches):
    own, _ = split_options(mode, options)
    assert own.autotune is searches


@pytest.mark.parametrize("value", [1, "on", None])
def test_the_option_is_true_or_false(value):
    with pytest.raises(dv.OptionError, match=r"dejavu\.autotune"):
        split_options(None, {"dejavu.autotune": value})


# --- on a GPU ---------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["rows", "sum", "gemv of heads", "attention of heads"])
def test_every_launch_can_be_searched_on_a_gpu(name):
    graph = graph_of(name)
    for node in graph.find_nodes(op="placeholder"):
        node.meta["val"] = node.meta["val"].cuda()
    (launch,) = launches.launches_of(graph, DENSITIES)
    timed = find_best([launch], autotune.GraphTimer)[launch]
    assert timed.config in launch.candidates
    assert timed.tried > len(launch.candidates) // 2
    assert 0 < timed.us <= timed.rule_us


@pytest.mark.gpu
def test_a_model_compiled_after_a_search_gives_the_same_logits(monkeypatch, tmp_path):
    file = ConfigFile(tmp_path / "block_sizes.json")
    monkeypatch.setattr(autotune, "config_file", lambda: file)
    model = tiny("opt", layers=3).cuda()
    token = torch.tensor([[5]], device="cuda")
    with torch.no_grad():
        expected = model(token, use_cache=False).logits
        torch.compile(model.forward, backend="dejavu")(token, use_cache=False)
        torch.compiler.reset()
        compiled = torch.compile(model.forward, backend="dejavu", **SEARCH)
        for _ in range(2):  # columns become contiguous after the first
            got = compiled(token, use_cache=False).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert file.path.exists()
