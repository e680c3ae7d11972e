import pytest
import torch

from dejavu_compile import DejavuError, OptionError
from dejavu_compile.backend import dejavu
from dejavu_compile.options import ExecutionMode, IssueMode, Options, split_options


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("dejavu.exection", "dejavu.execution"),
        ("dejavu.max_token", "dejavu.max_tokens"),
        ("dejavu.exakt", "dejavu.exact"),
        ("dejavu.isue", "dejavu.issue"),
        ("dejavu.Dump", "dejavu.dump"),
    ],
)
def test_unknown_option_names_the_nearest_first(wrong, nearest):
    with pytest.raises(OptionError) as caught:
        split_options(None, {wrong: 1})
    assert wrong in str(caught.value)
    assert f"did you mean {nearest!r}?" in str(caught.value)


def test_unknown_option_far_from_all_still_lists_them_all():
    with pytest.raises(OptionError) as caught:
        split_options(None, {"dejavu.zzz": 1})
    for name in Options.__dataclass_fields__:
        assert f"dejavu.{name}" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", "4"),
        ("max_tokens", 4.0),
        ("max_tokens", True),
        ("exact", 1),
        ("exact", None),
        ("gemv", "off"),
        ("dump", 3),
    ],
)
def test_wrong_type_is_refused_and_named(name, value):
    with pytest.raises(OptionError) as caught:
        split_options(None, {f"dejavu.{name}": value})
    assert f"dejavu.{name}" in str(caught.value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "enum"),
    [("execution", ExecutionMode), ("issue", IssueMode)],
    ids=["execution", "issue"],
)
def test_enum_options_take_each_value_by_name_or_member(name, enum):
    for member in enum:
        for value in (member, str(member)):
            own, _ = split_options(None, {f"dejavu.{name}": value})
            assert getattr(own, name) is member
    with pytest.raises(OptionError) as caught:
        split_options(None, {f"dejavu.{name}": "sometimes"})
    for member in enum:
        assert repr(str(member)) in str(caught.value)


def test_nothing_given_is_the_defaults():
    for mode in (None, "default"):
        assert split_options(mode, None) == (Options(), {})


def test_option_errors_are_value_errors_and_ours():
    with pytest.raises(ValueError, match="unknown option") as caught:
        split_options(None, {"dejavu.x": 1})
    assert isinstance(caught.value, DejavuError)


def test_mode_and_options_both_reach_inductor_and_options_win():
    from_mode = torch._inductor.list_mode_options("max-autotune")
    assert from_mode["max_autotune"] is True
    own, inductor = split_options(
        "max-autotune", {"dejavu.max_tokens": 2, "max_autotune": False, "trace.enabled": False}
    )
    assert own == Options(max_tokens=2, autotune=True)
    assert inductor == {**from_mode, "max_autotune": False, "trace.enabled": False}


@pytest.fixture
def config_seen_by_inductor(monkeypatch):
    """The config patches that reach Inductor, which then doesn't compile."""
    seen = []

    def record(gm, example_inputs, config_patches=None):
        seen.append(config_patches or {})
        return gm.forward

    monkeypatch.setattr("dejavu_compile.backend.compile_fx", record)
    return seen


def relu_mlp():
    return torch.nn.Sequential(
        torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64)
    ).eval()


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"mode": "reduce-overhead"}, {"triton.cudagraphs": True}),
        ({"options": {"triton.cudagraphs": True}}, {"triton.cudagraphs": True}),
        ({"mode": "default"}, {}),
        ({"options": {"dejavu.exact": False, "max_autotune": True}}, {"max_autotune": True}),
    ],
    ids=["mode", "options", "default", "mixed"],
)
def test_backend_hands_mode_and_options_to_inductor(how, expected, config_seen_by_inductor):
    model = relu_mlp()
    compiled = torch.compile(model, backend="dejavu", **how)
    with torch.no_grad():
        for _ in range(3):
            compiled(torch.ones(1, 64))
    assert config_seen_by_inductor
    for config in config_seen_by_inductor:
        assert {key: config.get(key) for key in expected} == expected
        assert not any(key.startswith("dejavu.") for key in config)


def test_sparse_graph_is_compiled_with_ordering_kept(config_seen_by_inductor):
    model = relu_mlp()
    compiled = torch.compile(model, backend="dejavu")
    with torch.no_grad():
        for _ in range(3):
            compiled(torch.ones(1, 64))
    sparse = config_seen_by_inductor[-1]
    assert sparse["reorder_for_locality"] is False
    assert sparse["post_grad_custom_post_pass"].uuid()


def test_cache_key_holds_our_options(config_seen_by_inductor):
    keys = set()
    for most in (1, 2):
        torch.compiler.reset()
        compiled = torch.compile(relu_mlp(), backend="dejavu", options={"dejavu.max_tokens": most})
        with torch.no_grad():
            for _ in range(3):
                compiled(torch.ones(1, 64))
        keys.add(config_seen_by_inductor[-1]["post_grad_custom_post_pass"].uuid())
    assert len(keys) == 2


def test_own_pass_in_inductors_slot_is_kept(config_seen_by_inductor):
    def mine(graph):
        pass

    compiled = torch.compile(
        relu_mlp(), backend="dejavu", options={"post_grad_custom_post_pass": mine}
    )
    with torch.no_grad():
        for _ in range(3):
            compiled(torch.ones(1, 64))
    assert config_seen_by_inductor[-1]["post_grad_custom_post_pass"] is mine


def error_behind(call):
    """The error of ours that `call` raises, which Dynamo may have wrapped."""
    with pytest.raises(Exception) as caught:
        call()
    error = caught.value
    while error is not None and not isinstance(error, DejavuError):
        error = error.__cause__ or error.__context__ or getattr(error, "inner_exception", None)
    assert error is not None, f"no error of ours behind {caught.value!r}"
    return error


@pytest.mark.parametrize("key", ["max_autotun", "not_an_option", "triton.cudagraph"])
def test_unknown_inductor_option_is_refused_by_name(key):
    compiled = torch.compile(relu_mlp(), backend="dejavu", options={key: True})
    with torch.no_grad():
        error = error_behind(lambda: compiled(torch.ones(1, 64)))
    assert isinstance(error, OptionError)
    assert repr(key) in str(error)


def test_unknown_own_option_is_refused_through_torch_compile():
    compiled = torch.compile(relu_mlp(), backend=dejavu, options={"dejavu.exection": "auto"})
    with torch.no_grad():
        error = error_behind(lambda: compiled(torch.ones(1, 64)))
    assert isinstance(error, OptionError)
    assert "did you mean 'dejavu.execution'" in str(error)
