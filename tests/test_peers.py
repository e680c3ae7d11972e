"""The comparison with other projects' kernels: what is missing, fails or is wrong is said, and nothing else stops."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def peers():
    """The benchmark; its siblings are found as when it runs as a script."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import peers
    finally:
        sys.path.remove(str(BENCHMARKS))
    return peers


def case(peers, theirs):
    """y = 2 x, in fp16; ours is right."""
    x = torch.arange(1.0, 9.0, dtype=torch.float16)
    expected = 2 * x.float()
    return peers.Case(
        "double", "8", 1.0, x.dtype, 2,
        peers.Side(lambda i: x + x, expected, 16.0), peers.Side(lambda i: theirs(x), expected, 16.0),
    )  # fmt: skip


def test_a_missing_folder_is_named(peers, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        peers.parse(["--teal", str(tmp_path / "nowhere")])
    assert stopped.value.code == 2
    assert "--teal: no such folder" in capsys.readouterr().err


def test_what_is_not_given_is_skipped(peers, capsys, monkeypatch):
    assert list(peers.run(peers.parse([]))) == []
    monkeypatch.setattr(sys, "argv", ["peers.py"])
    peers.main()
    assert "nothing was measured" in capsys.readouterr().out


def test_each_folder_without_their_files_is_a_row(peers, tmp_path):
    names = ["--dejavu", "--teal", "--polar", "--gpt-fast"]
    args = peers.parse([word for name in names for word in (name, str(tmp_path))])
    rows = list(peers.run(args))
    assert [row.what.partition(",")[0] for row in rows] == [
        "Deja Vu", "Polar Sparsity", "TEAL", "Polar Sparsity", "gpt-fast",
    ]  # fmt: skip
    for row in rows:
        assert "is no checkout of" in row.theirs.failed
        assert row.ratio is None
    assert peers.table(rows).count("FAILED, theirs") == len(rows)


def test_both_right_gives_a_ratio(peers):
    row = peers.compare(case(peers, lambda x: 2 * x))
    assert row.ours.error == row.theirs.error == 0
    assert row.ratio == row.theirs.us / row.ours.us
    assert json.loads(json.dumps(row.to_dict()))["ratio"] == row.ratio


def test_sides_are_timed_in_turns_of_which_the_middle_one_counts(peers, monkeypatch):
    times = iter([(9.0, 9.0), (1.0, 6.0), (3.0, 4.0), (2.0, 5.0)])
    order, pending = [], []

    def layer_us(run, layers):
        pending[:] = pending or list(next(times))
        order.append(run(0).sum().item())
        return pending.pop(0), "CPU"

    monkeypatch.setitem(peers.compare.__globals__, "layer_us", layer_us)
    row = peers.compare(case(peers, lambda x: 2 * x))
    assert (row.ours.us, row.theirs.us) == (2.0, 5.0)
    assert len(order) == 8


def test_a_failing_peer_is_a_row_beside_our_time(peers):
    def theirs(x):
        raise ValueError("no such kernel\nand a long story")

    row = peers.compare(case(peers, theirs))
    assert row.ours.us > 0
    assert row.theirs.failed == "ValueError: no such kernel"
    assert row.ratio is None


@pytest.mark.parametrize(
    "wrong", [lambda x: 2.1 * x, lambda x: x / 0 * 0, lambda x: x[:4]], ids=["off", "nan", "shape"]
)
def test_a_wrong_result_has_no_time(peers, wrong):
    row = peers.compare(case(peers, wrong))
    assert row.ours.us > 0
    assert row.theirs.us is None
    assert "wrong result" in row.theirs.failed


def test_a_result_that_turns_wrong_has_no_time(peers):
    calls = []

    def theirs(x):
        calls.append(x)
        return 2 * x if len(calls) < 4 else 3 * x

    assert peers.compare(case(peers, theirs)).theirs.us is None


def test_a_case_that_fails_to_be_made_ends_its_project_only(peers):
    def cases():
        yield case(peers, lambda x: 2 * x)
        raise RuntimeError("out of memory")

    good, bad = peers.rows_of("theirs", cases())
    assert good.ratio > 0
    assert bad.theirs.failed == "RuntimeError: out of memory"


def test_what_cannot_be_captured_is_queued_and_said(peers, monkeypatch):
    import peer_rows

    def refused(run, layers):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(peer_rows, "graph_us", refused)
    monkeypatch.setattr(peer_rows, "time_us", lambda call, repeats: call() or {"p50": 12.0})
    ran = []
    us, timed = peer_rows.layer_us(ran.append, 3)
    assert us == 4.0
    assert ran == [0, 1, 2]
    assert timed.startswith("queued events, no CUDA graph (RuntimeError: operation not permitted")


def test_stand_ins_last_for_the_import(peers, tmp_path, monkeypatch):
    import peer_imports

    monkeypatch.setattr(peer_imports, "UNUSED", {"unheard_of"})
    (tmp_path / "theirs.py").write_text(
        "import sys\n"
        "from unheard_of.plots import Plot\n"
        "sys.path.append('/elsewhere')\n"
        "class Mine(Plot): answer = 42\n",
        encoding="utf-8",
    )
    before = list(sys.path)
    module, missing = peers.load_file(tmp_path, "theirs.py", "peer_of_this_test")
    assert module.Mine().answer == 42
    assert missing == ["unheard_of"]
    assert sys.path == before
    assert "unheard_of" not in sys.modules
    (tmp_path / "other.py").write_text("import never_heard_of\n", encoding="utf-8")
    with pytest.raises(ModuleNotFoundError, match="never_heard_of"):
        peers.load_file(tmp_path, "other.py", "peer_of_this_test_too")
    assert "peer_of_this_test_too" not in sys.modules


def test_pairs_rotate_as_halves_do(peers):
    weight, x = torch.randn(12, 5), torch.randn(5)
    angle = torch.randn(3)
    turn = torch.polar(torch.ones(3), angle)
    halves = (weight @ x).view(2, 2, 3)
    pairs = (peers.interleaved(weight, 2) @ x).view(2, 3, 2)
    turned = torch.complex(halves[:, 0], halves[:, 1]) * turn
    assert torch.equal(torch.view_as_complex(pairs.contiguous()) * turn, turned)


def test_enough_layers_to_leave_the_cache(peers):
    import peer_rows

    for num_bytes in (1e6, 3e7, 1e9):
        layers = peers.layers_for(num_bytes)
        assert layers == peer_rows.MOST_LAYERS or layers * num_bytes >= peer_rows.READ
        assert layers >= 2


# What each of their functions takes and gives, in PyTorch
THEIRS = {
    "dejavu/Dejavu/src/ops/triton/gather_gemv.py": """
import torch
def mlp_sparse(x, W1, W2t, idx, bias1=None, bias2=None):
    h = torch.relu(x.float() @ W1[idx].float().T + bias1[idx].float())
    return (h @ W2t[idx].float()).to(x.dtype)
""",
    "polar/HybridTensor/triton/gather_gemm_col.py": """
import torch
from types import SimpleNamespace
import pandas_that_is_missing
matmul_gather_kernel_col = SimpleNamespace(
    configs=[SimpleNamespace(kwargs={"BLOCK_SIZE_M": m}) for m in (16, 128)])
def gather_matmul_col(a, b, index_vec, bias=None, activations="", out=None):
    assert [c.kwargs["BLOCK_SIZE_M"] for c in matmul_gather_kernel_col.configs] == [16]
    return torch.relu(a.float() @ b[index_vec].float().T + bias[index_vec].float()).half()
""",
    "polar/HybridTensor/triton/gather_gemm_row.py": """
import torch
from types import SimpleNamespace
matmul_gather_kernel_row = SimpleNamespace(configs=[])
def gather_matmul_row(a, b, index_vec, bias=None, activations="", out=None):
    return (a.float() @ b[index_vec].float()).half()
""",
    "polar/HybridTensor/triton/select_attn_v1.py": """
import torch
def select_attn(q, k, v, scale_float, batch_head_index, seq_len=None):
    assert k.is_contiguous() and k.shape[1] == seq_len
    out = torch.zeros_like(q)
    for b, heads in enumerate(batch_head_index.tolist()):
        for h in heads:
            s = scale_float * k[b, :, 0, h].float() @ q[b, 0, 0, h].float()
            out[b, 0, 0, h] = (s.softmax(0) @ v[b, :, 0, h].float()).half()
    return out.view(q.shape[0], q.shape[3], 1, q.shape[4])
""",
    "teal/kernels/sparse_gemv.py": """
import torch
def splitk_sparse_gemv(x, weight, threshold, sparsity_bin):
    assert weight.stride(1) > 1 and x.shape[:2] == (1, 1)
    return ((x * (x.abs() > threshold)).float() @ weight.float().T).half()
""",
}
SCRIPT = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import peer_imports, peers
peer_imports.UNUSED.add("pandas_that_is_missing")
peers.layers_for = lambda num_bytes: 1
root = Path(sys.argv[2])
for cases in (
    peers.dejavu_cases(root / "dejavu", [(64, 40)], 0.2, "cpu"),
    peers.polar_mlp_cases(root / "polar", [(64, 40)], 0.2, "cpu"),
    peers.teal_cases(root / "teal", ((32, 64), (48, 32)), "cpu"),
    peers.polar_attention_cases(root / "polar", ((2, 40),), 4, "cpu"),
):
    for row in peers.rows_of("theirs", cases):
        print(json.dumps(row.to_dict()))
"""


@pytest.mark.interpret
def test_ours_and_theirs_are_given_the_same_work(tmp_path):
    """A process of its own: Triton decides at import whether to interpret."""
    for name, source in THEIRS.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT, str(BENCHMARKS), str(tmp_path)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 8
    for row in rows:
        for side in (row["ours"], row["theirs"]):
            assert side["failed"] == ""
            assert math.isfinite(side["us"])
            assert side["error"] < 1e-3
        assert row["ours"]["num_bytes"] == pytest.approx(row["theirs"]["num_bytes"], rel=0.1)
    assert "stood in for: pandas_that_is_missing" in rows[1]["note"]
