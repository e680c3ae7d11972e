"""Calibration in a folder: the same artifact as in memory, whatever stops it and wherever it goes on."""

import contextlib
import errno
import logging
import resource
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny import text, texts, tiny

import dejavu_compile as dv
from dejavu_compile import collect as collecting
from dejavu_compile import workdir
from dejavu_compile.attachments import make_unit_major, model_fingerprint
from dejavu_compile.batches import check_batches
from dejavu_compile.collect import collect
from dejavu_compile.workdir import Memory, Rows, Workdir, replacing

WITH_HEADS = {"density": 0.5, "head_density": 0.5}
SHARDS = ("collect-00000", "collect-00001", "sensitivity-00000", "sensitivity-00001", "predictors",
          "quality-chosen")  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def few_steps():
    """The bits count here, not the fit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["dejavu_compile.calibrate"], "FIT_STEPS", 10)
        yield


def calibrated(name="opt", folder=None, **options):
    """As a new process would: a model as it was loaded, and nothing compiled."""
    torch.compiler.reset()
    model = tiny(name)
    return dv.calibrate(model, texts(), progress=False, workdir=folder, **options)


def saved(calibration, folder):
    calibration.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


@pytest.fixture(scope="module")
def in_memory(few_steps, tmp_path_factory):
    """The artifact's files, made without a folder."""
    return saved(calibrated(**WITH_HEADS), tmp_path_factory.mktemp("artifact"))


class StopsAfter:
    """A `save_file` that writes half a file and stops, once it has written `count`."""

    def __init__(self, count, error):
        self.left, self.error, self.written = count, error, []

    def __call__(self, tensors, path):
        save_file(tensors, path)
        if self.left == 0:
            whole = path.read_bytes()
            path.write_bytes(whole[: len(whole) // 2])
            raise self.error
        self.left -= 1
        self.written.append(path.name.split(".")[0])


# --- what is recorded, read from files -------------------------------------------------------------


@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 5), width=st.integers(1, 3))
def test_rows_are_those_of_the_pieces_as_one(seed, count, width):
    draw = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high + 1, (), generator=draw))

    pieces = [torch.randn(number(0, 7), width, generator=draw) for _ in range(count)]
    whole, rows = torch.cat(pieces), Rows(pieces, torch.device("cpu"))
    for _ in range(3):
        assert rows.shape == whole.shape
        assert rows.numel() == whole.numel()
        part = slice(number(0, 30), number(0, 30), number(1, 4))
        assert torch.equal(rows[part], whole[part])
        assert torch.equal(rows[:], whole)
        if len(whole):
            chosen = torch.randint(len(whole), (9,), generator=draw)
            assert torch.equal(rows[chosen], whole[chosen])
        start = number(0, len(whole))
        length = number(0, len(whole) - start)
        whole, rows = whole.narrow(0, start, length), rows.narrow(0, start, length)


def test_recorded_values_are_mapped_from_the_shards_and_equal_those_in_memory(tmp_path):
    model = tiny("llama")
    batches = check_batches(model, texts(2))
    options = {"max_tokens": 10**6, "progress": lambda *_: None}
    expected = collect(model, batches, **options)
    found = collect(model, batches, **options, store=Workdir(tmp_path, {}))
    if sys.platform == "linux":
        spans = [
            [int(end, 16) for end in line.split()[0].split("-")]
            for line in Path("/proc/self/maps").read_text().splitlines()
            if line.endswith(".safetensors") and str(tmp_path) in line
        ]
        for value in (v for r in found for v in (*r.source, *r.hidden, *r.carrier)):
            assert any(start <= value.data_ptr() < stop for start, stop in spans)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.name == theirs.name
        for which in ("source", "hidden", "carrier"):
            assert len(getattr(ours, which)) == len(getattr(theirs, which))
            if getattr(theirs, which):
                assert isinstance(ours.stacked(which), Rows)
                assert torch.equal(ours.stacked(which)[:], theirs.stacked(which))


def test_memory_cuts_the_text_with_a_warning_and_a_folder_takes_all(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(collecting, "MEMORY_BUDGET", 1)
    model = tiny("opt")
    batches = check_batches(model, texts(3))
    options = {"max_tokens": 10**6, "progress": lambda *_: None}
    with caplog.at_level(logging.WARNING):
        (first, *_) = collect(model, batches, **options)
        assert "workdir" in caplog.text
        caplog.clear()
        (other, *_) = collect(model, batches, **options, store=Workdir(tmp_path, {}))
        assert not caplog.text
    assert len(first.stacked("source")) == batches[0]["input_ids"].numel()
    assert len(other.stacked("source")) == 3 * batches[0]["input_ids"].numel()


# --- the same artifact -----------------------------------------------------------------------------


def test_a_folder_changes_no_bit_of_the_artifact(tmp_path):
    options = {"policy": "gate", "density": 0.5}
    expected = saved(calibrated("llama", **options), tmp_path / "memory")
    assert saved(calibrated("llama", tmp_path / "work", **options), tmp_path / "disk") == expected


def test_interrupted_at_every_shard_it_goes_on_to_the_same_artifact(
    in_memory, tmp_path, monkeypatch
):
    written, result = [], None
    for _ in SHARDS:
        stops = StopsAfter(1, KeyboardInterrupt())
        monkeypatch.setattr(workdir, "save_file", stops)
        with contextlib.suppress(KeyboardInterrupt):
            result = calibrated(folder=tmp_path / "work", **WITH_HEADS)
        assert not list((tmp_path / "work").glob("*.partial"))
        written += stops.written
    assert tuple(written) == SHARDS, "each is made once"
    stops = StopsAfter(0, AssertionError("nothing was left to do"))
    monkeypatch.setattr(workdir, "save_file", stops)
    again = calibrated(folder=tmp_path / "work", **WITH_HEADS)
    monkeypatch.undo()
    assert saved(result, tmp_path / "artifact") == in_memory
    assert saved(again, tmp_path / "again") == in_memory


def test_after_an_interrupted_forward_pass_and_a_full_disk_it_goes_on(
    in_memory, tmp_path, monkeypatch
):
    take, calls = collecting.Collector._take, []

    def stop(self, record, which, value, **more):
        calls.append(which)
        if len(calls) == 12:  # in the second batch: two values each of four sites
            raise KeyboardInterrupt
        take(self, record, which, value, **more)

    def shards():
        return sorted(path.stem for path in (tmp_path / "work").glob("*.safetensors"))

    monkeypatch.setattr(collecting.Collector, "_take", stop)
    with pytest.raises(KeyboardInterrupt):
        calibrated(folder=tmp_path / "work", **WITH_HEADS)
    assert shards() == ["collect-00000"]

    monkeypatch.setattr(collecting.Collector, "_take", take)
    full = StopsAfter(1, OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(workdir, "save_file", full)
    with pytest.raises(
        dv.DiskFullError, match=r"(?s)sensitivity-00000.*No space left.*call again"
    ):
        calibrated(folder=tmp_path / "work", **WITH_HEADS)
    assert shards() == ["collect-00000", "collect-00001"]

    monkeypatch.undo()
    result = calibrated(folder=tmp_path / "work", **WITH_HEADS)
    assert saved(result, tmp_path / "artifact") == in_memory


# --- nothing half-written, nothing of another calibration ------------------------------------------


def test_what_a_killed_process_left_half_written_is_removed_unread(tmp_path):
    Workdir(tmp_path, {})
    (tmp_path / "a.safetensors.partial").write_bytes(b"half")
    store = Workdir(tmp_path, {})
    assert not list(tmp_path.glob("*.partial"))
    assert store.once("a", lambda: {"x": torch.ones(2)})["x"].tolist() == [1, 1]


@pytest.mark.parametrize("bytes_left", [0, 5, 60])
def test_a_truncated_shard_is_made_again(bytes_left, tmp_path, caplog):
    store = Workdir(tmp_path, {})
    store.once("a", lambda: {"x": torch.ones(4)})
    path = tmp_path / "a.safetensors"
    path.write_bytes(path.read_bytes()[:bytes_left])
    assert store.once("a", lambda: {"x": torch.zeros(4)})["x"].tolist() == [0] * 4
    assert "made again" in caplog.text
    assert store.once("a", lambda: pytest.fail("it is whole"))["x"].tolist() == [0] * 4


def test_shards_without_a_manifest_are_refused(tmp_path):
    save_file({"x": torch.ones(2)}, tmp_path / "collect-00000.safetensors")
    with pytest.raises(dv.WorkdirError, match=r"no readable manifest\.json"):
        Workdir(tmp_path, {})


def test_an_unreadable_manifest_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(dv.WorkdirError, match="emptied"):
        Workdir(tmp_path, {})


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder in which a calibration was interrupted before it recorded anything."""
    folder = tmp_path_factory.mktemp("begun")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workdir.Workdir, "once", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            dv.calibrate(tiny("opt"), texts(), seed=3, workdir=folder, progress=False)
    return folder


def changed(model):
    with torch.no_grad():
        model.model.decoder.layers[1].fc1.bias.add_(0.5)
    return model


@pytest.mark.parametrize(
    ("model", "batches", "options", "words"),
    [
        (lambda: tiny("opt"), texts(), {"seed": 4}, r"seed 4 \(asked for\)\n.* seed 3 \(manifest"),
        (lambda: tiny("opt"), texts(), {"density": 0.5}, r"density 0\.5 .*\n.* density None"),
        (lambda: tiny("opt"), texts(), {"policy": "predict"}, "policy predict"),
        (lambda: tiny("opt"), texts(), {"lookahead": 2}, "lookahead 2"),
        (lambda: tiny("opt"), texts(), {"max_ppl_increase": 0.5}, r"max_ppl_increase 0\.5"),
        (lambda: tiny("opt"), texts(), {"head_density": 0.5}, r"head_density 0\.5"),
        (lambda: tiny("opt"), texts()[::-1], {}, "batches "),
        (lambda: tiny("opt"), [{"input_ids": t, "attention_mask": t.ne(5)} for t in texts()], {}, "batches "),
        (lambda: tiny("opt", layers=3), texts(), {}, "model OPTForCausalLM"),
        (lambda: tiny("opt").double(), texts(), {}, "model OPTForCausalLM"),
        (lambda: tiny("llama"), texts(), {}, r"model LlamaForCausalLM .*\n.* OPTForCausalLM"),
        (lambda: changed(tiny("opt")), texts(), {}, "model OPTForCausalLM"),
    ],
    ids=["seed", "density", "policy", "lookahead", "budget", "heads", "order", "mask", "layers", "dtype", "class",
         "weights"],
)  # fmt: skip
def test_another_calibrations_folder_is_refused_by_what_differs(begun, model, batches, options, words):  # fmt: skip
    with pytest.raises(dv.WorkdirError, match=words) as caught:
        dv.calibrate(model(), batches, workdir=begun, progress=False, **{"seed": 3, **options})
    assert "emptied" in str(caught.value)


def test_the_fingerprint_of_a_model_is_independent_of_strides():
    model, other = tiny("opt"), tiny("opt")
    for layer in other.model.decoder.layers:
        make_unit_major(layer.fc2.weight, 1, produces_units=False)
    assert other.model.decoder.layers[0].fc2.weight.stride(0) == 1
    assert model_fingerprint(other) == model_fingerprint(model)
    assert model_fingerprint(changed(other)) != model_fingerprint(model)


# --- full disks ------------------------------------------------------------------------------------


def test_a_limit_on_files_is_a_clear_error_and_leaves_nothing(tmp_path):
    store = Workdir(tmp_path, {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
        with pytest.raises(dv.DiskFullError, match=r"no room to write .*a\.safetensors") as caught:
            store.once("a", lambda: {"x": torch.ones(1 << 16)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert isinstance(caught.value, OSError)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
    assert len(store.once("a", lambda: {"x": torch.ones(1 << 16)})["x"]) == 1 << 16


def test_other_errors_of_the_disk_stay_what_they_are(tmp_path):
    with pytest.raises(PermissionError), replacing(tmp_path / "a"):
        raise PermissionError(errno.EACCES, "not yours")


def test_an_artifact_that_finds_no_room_leaves_the_old_one(tmp_path, monkeypatch):
    model = tiny("opt")
    calibration = dv.calibrate(model, texts(2), policy="dense", progress=False)
    before = saved(calibration, tmp_path)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(workdir.os, "fsync", full)
    with pytest.raises(dv.DiskFullError, match="free some"):
        dv.calibrate(model, texts(3), policy="dense", progress=False).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# --- little memory ---------------------------------------------------------------------------------


class Small:
    """Memory for so many sequences: `Collector._take` with more runs out of it."""

    def __init__(self, monkeypatch, sequences):
        self.tried, take = [], collecting.Collector._take

        def limited(collector, record, which, value, **more):
            running = collector._keep.numel() // 48
            if not collector._values:
                self.tried.append(running)
            if running > sequences:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            take(collector, record, which, value, **more)

        monkeypatch.setattr(collecting.Collector, "_take", limited)


@pytest.mark.parametrize("store", [Memory(), None], ids=["memory", "folder"])
def test_out_of_memory_a_batch_is_recorded_in_parts(store, tmp_path, monkeypatch, caplog):
    model, options = tiny("opt"), {"max_tokens": 10**6, "progress": lambda *_: None}
    masks = torch.ones(4, 48, dtype=torch.long)
    masks[1, 30:] = 0
    batches = check_batches(
        model, [{"input_ids": text(seed), "attention_mask": masks} for seed in range(2)]
    )
    expected = collect(model, batches, **options)
    small = Small(monkeypatch, 1)
    found = collect(model, batches, **options, store=store or Workdir(tmp_path, {}))
    assert small.tried == [4, 2, 1, 1, 1, 1, 1, 1, 1, 1], "what was too much isn't tried again"
    assert "1 sequences" in caplog.text
    for ours, theirs in zip(found, expected, strict=True):
        for which in ("source", "hidden"):
            torch.testing.assert_close(
                ours.stacked(which)[:].float(), theirs.stacked(which).float(), rtol=1e-2, atol=1e-5
            )


def test_no_memory_for_one_sequence_is_a_clear_error(monkeypatch):
    Small(monkeypatch, 0)
    with pytest.raises(dv.CalibrationError, match=r"one sequence of 48 tokens(.|\n)*workdir="):
        dv.calibrate(tiny("opt"), texts(), progress=False)


def test_a_gpu_keeps_a_third_of_what_the_model_leaves_of_it(monkeypatch):
    weight = SimpleNamespace(
        device=torch.device("cuda", 0), numel=lambda: 1000, element_size=lambda: 2
    )
    model = SimpleNamespace(parameters=lambda: iter([weight, weight]))
    card = SimpleNamespace(total_memory=10_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    assert collecting.memory_budget(model) == 2000
    assert collecting.memory_budget(tiny("opt")) == collecting.MEMORY_BUDGET
