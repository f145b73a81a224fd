"""A one-shot chain of two methods, killed or interrupted in either and called again."""

import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import espalier
from espalier.artefacts.partial import resumable_work, work_folder
from espalier.checkpoints import shards
from espalier.checkpoints.checkpoint import Checkpoint
from espalier.errors import UserError
from killing import contents, killed_each
from tiny import save_tiny

STEPS = ["frequency: collect", "frequency: apply", "naee_skip: collect", "naee_skip: apply"]


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A model and a token file."""
    base = tmp_path_factory.mktemp("given")
    save_tiny("mixtral", base / "model", max_shard_size="20KB", num_hidden_layers=4)
    np.savez(base / "tokens.npz", input_ids=np.random.default_rng(0).integers(3, 95, (8, 24)))
    return base / "model", base / "tokens.npz"


@pytest.fixture(scope="module")
def uninterrupted(given, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    compress(*given, out)
    return contents(out)


def compress(model, tokens, out, **changes):
    """Two methods, each with a pass over the calibration, layer by layer."""
    torch.set_num_threads(1)
    settings = {"ratio": 0.25, "then": "naee_skip", "prove": False, "stream": "always", "batch_size": 1}
    return espalier.compress(model, "frequency", tokens, out, **settings | changes)


def interrupt(at, after=0.5):
    """Return a progress function that interrupts where the part `after` of `at` is done."""

    def progress(what, done, total):
        if what == at and total and done >= after * total:
            raise KeyboardInterrupt

    return progress


def names_around(path):
    return sorted(p.name for p in path.iterdir())


def test_killed_at_random_moments_it_ends_with_the_same_bytes(given, uninterrupted, tmp_path):
    out, steps = tmp_path / "outs", set()
    for target in killed_each(compress, given, out, 12):
        steps |= {path.name.removeprefix(".").partition(".")[0] for path in work_folder(target).glob("files/*")}
        if target.exists():
            with pytest.raises(UserError, match="exists already"):
                compress(*given, target)
        else:
            compress(*given, target)
        assert contents(target) == uninterrupted
    assert steps == {"0-frequency", "1-naee_skip"}  # both were killed on the way
    assert names_around(out) == sorted(["whole", *map(str, range(12))])


@pytest.mark.parametrize("number", range(4))
def test_what_is_finished_is_not_done_again(number, given, uninterrupted, tmp_path):
    out, heard = tmp_path / "out", {}
    with pytest.raises(KeyboardInterrupt):
        compress(*given, out, progress=interrupt(STEPS[number]))
    assert not out.exists()
    report = compress(*given, out, progress=lambda what, *part: heard.setdefault(what, []).append(part))
    assert [step for step in STEPS if step in heard] == STEPS[number:]
    done, total = heard[STEPS[number]][0]
    assert done > 0.25 * total  # nor the layers and shards of the step that was interrupted
    assert [step["name"] for step in report["methods"]] == ["frequency", "naee_skip"]
    assert [set(step) >= {"counts", "tensors", "bytes"} for step in report["apply"]] == [True, True]
    assert contents(out) == uninterrupted
    assert names_around(tmp_path) == ["out"]


def test_a_full_disk_keeps_what_is_finished(given, uninterrupted, tmp_path, monkeypatch):
    out, fsync, heard = tmp_path / "out", os.fsync, set()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards.os, "fsync", full)
    with pytest.raises(UserError, match="no space left on the disk"):
        compress(*given, out)
    monkeypatch.setattr(shards.os, "fsync", fsync)
    assert names_around(tmp_path) == [".out.work"]
    compress(*given, out, progress=lambda what, done, total: heard.add(what))
    assert "frequency: collect" not in heard
    assert contents(out) == uninterrupted
    assert names_around(tmp_path) == ["out"]


@pytest.mark.parametrize("number", range(4))
def test_too_little_memory_keeps_what_is_finished(number, given, uninterrupted, tmp_path):
    out, heard = tmp_path / "out", {}

    def progress(what, done, total):
        if what == STEPS[number] and total and 2 * done >= total:
            torch.empty(10**15)  # as torch says it on a processor: a RuntimeError

    with pytest.raises(RuntimeError, match="can't allocate memory"):
        compress(*given, out, progress=progress)
    written = [".out.partial"] if number == len(STEPS) - 1 else []  # the last step writes `out` itself
    assert names_around(tmp_path) == [*written, ".out.work"]
    compress(*given, out, progress=lambda what, *part: heard.setdefault(what, []).append(part))
    assert [step for step in STEPS if step in heard] == STEPS[number:]
    done, total = heard[STEPS[number]][0]
    assert done > 0.25 * total
    assert contents(out) == uninterrupted
    assert names_around(tmp_path) == ["out"]


@pytest.mark.parametrize("changed", ["ratio", "tokens", "batch_size", "code"])
def test_what_another_call_left_is_discarded(changed, given, tmp_path, monkeypatch):
    model, tokens = given
    out, changes, heard = tmp_path / "out", {}, set()
    with pytest.raises(KeyboardInterrupt):
        compress(model, tokens, out, progress=interrupt("naee_skip: collect"))
    if changed == "tokens":
        tokens = tmp_path / "other.npz"
        np.savez(tokens, input_ids=np.full((8, 24), 5))
    elif changed == "code":
        monkeypatch.setattr("espalier.oneshot.code_version", lambda: "another")
    else:
        changes = {"ratio": 0.5} if changed == "ratio" else {"batch_size": 2}
    compress(model, tokens, out, progress=lambda what, done, total: heard.add(what), **changes)
    assert set(STEPS) <= heard
    assert not work_folder(out).exists()


def test_an_error_that_the_next_call_would_meet_again_leaves_nothing(given, tmp_path):
    model = shutil.copytree(given[0], tmp_path / "model")
    name = "model.layers.3.self_attn.q_proj.weight"
    shard = model / Checkpoint(model).entries[name].file
    tensors = load_file(shard)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(UserError, match=f"{name} holds 1 NaN"):
        compress(model, given[1], tmp_path / "new" / "folder" / "out")
    assert names_around(tmp_path) == ["model"]


def test_a_second_call_is_refused_and_the_first_goes_on(given, uninterrupted, tmp_path):
    out, refused = tmp_path / "out", []

    def progress(what, done, total):
        if what == "naee_skip: collect" and not refused:
            with pytest.raises(UserError, match=r"out: another run is writing it .*Wait for it or choose") as error:
                compress(*given, out)
            refused.append(str(error.value))

    compress(*given, out, progress=progress)
    assert "\n" not in refused[0]
    assert contents(out) == uninterrupted
    assert names_around(tmp_path) == ["out"]


def test_the_folder_of_a_run_that_was_killed_at_its_end_is_put_away(tmp_path):
    out = tmp_path / "out"
    with resumable_work(out, 1) as work:
        (work / "file").write_text("")
        left = shutil.copytree(work_folder(out), tmp_path / "left")
    left.replace(work_folder(out))
    out.mkdir()
    (out / "config.json").write_text("{}")
    with pytest.raises(UserError, match="exists already"), resumable_work(out, 1):
        pytest.fail("entered")
    assert names_around(tmp_path) == ["out"]
