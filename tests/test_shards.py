"""Writing a checkpoint with several threads, killed at any moment and run again."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from espalier.artefacts import partial
from espalier.artefacts.partial import partial_folder, resumable_directory
from espalier.checkpoints import shards
from espalier.checkpoints.checkpoint import Checkpoint
from espalier.checkpoints.shards import OutputTensor, ShardWriter
from espalier.errors import UserError
from espalier.plans.plan import Plan
from espalier.surgery.apply import apply
from example_plans import example_plan
from killing import contents, killed_each

PLAN = example_plan("mixtral", "remap")


@pytest.fixture
def source(tiny_model):
    """A tiny Mixtral in many shards."""
    return tiny_model("mixtral", max_shard_size="20KB")


@pytest.fixture(scope="module")
def uninterrupted(tiny_model, tmp_path_factory):
    """The bytes that PLAN makes of it."""
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    apply(tiny_model("mixtral", max_shard_size="20KB"), PLAN, out, prove=False, workers=1)
    return contents(out)


def names_around(path: Path):
    return sorted(p.name for p in path.iterdir())


def interrupt_after(shards_done: int, out: Path):
    """Return a progress function that interrupts once so many shards are finished."""

    def progress(done: int, total: int) -> None:
        if len(list((partial_folder(out) / "files").glob("*.safetensors"))) >= shards_done:
            raise KeyboardInterrupt

    return progress


def interrupted(source: Path, out: Path, shards_done: int = 5):
    """Interrupt an apply and return the finished shards by name, with inode and time of writing."""
    with pytest.raises(KeyboardInterrupt):
        apply(source, PLAN, out, prove=False, workers=2, progress=interrupt_after(shards_done, out))
    files = partial_folder(out) / "files"
    assert not out.exists()
    assert {p.suffix for p in files.iterdir()} == {".safetensors"}
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in files.iterdir()}


@pytest.mark.parametrize("workers", [2, 4])
def test_the_number_of_workers_changes_no_byte(workers, source, uninterrupted, tmp_path):
    heard, threads = [], set()

    def progress(done, total):
        heard.append((done, total))
        threads.add(threading.get_ident())

    report = apply(source, PLAN, tmp_path / "out", prove=False, workers=workers, progress=progress)
    assert contents(tmp_path / "out") == uninterrupted
    done = [d for d, _ in heard]
    assert done == sorted(set(done))
    assert heard[-1] == (report["bytes"], report["bytes"])
    assert {total for _, total in heard} == {report["bytes"]}
    assert 1 < len(threads) <= workers


def test_as_many_tensors_in_memory_as_workers(tmp_path):
    alive, most, lock = 0, 0, threading.Lock()

    def make():
        nonlocal alive, most
        with lock:
            alive += 1
            most = max(most, alive)
        yield torch.ones(1000)
        with lock:
            alive -= 1

    outputs = [[OutputTensor(f"{s}.{n}", "F32", (1000,), make) for n in range(5)] for s in range(8)]
    ShardWriter(outputs).write(tmp_path, workers=3)
    assert most <= 3


# Forks a child for each moment, so that torch is imported once; the parent uses no thread of torch.
KILLED = """
import json, os, signal, sys, threading
from pathlib import Path
import espalier.surgery.apply, espalier.artefacts.partial, espalier.checkpoints.shards
from espalier.plans.plan import Plan

source, plan, out, moments = Path(sys.argv[1]), Plan.load(Path(sys.argv[2])), Path(sys.argv[3]), json.loads(sys.argv[4])
FILES = {m.__file__ for m in (espalier.surgery.apply, espalier.artefacts.partial, espalier.checkpoints.shards)}

def child(number, moment):
    lines, lock = 0, threading.Lock()
    def trace(frame, event, argument):
        nonlocal lines
        if frame.f_code.co_filename not in FILES:
            return None
        if event == "line":
            with lock:
                lines += 1
                if lines == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
        return trace
    threading.settrace(trace)
    sys.settrace(trace)
    espalier.surgery.apply.apply(source, plan, out / str(number), prove=False, workers=2)
    sys.settrace(None)
    return lines

for number, moment in enumerate(moments):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(write, str(child(number, moment)).encode())
        os._exit(0)
    os.close(write)
    _, status = os.waitpid(pid, 0)
    print(json.dumps([os.WTERMSIG(status), os.read(read, 20).decode()]))
"""


def run_killed(source: Path, plan: Path, out: Path, moments: list[int]):
    """Apply once for each moment, a number of lines of code after which the process kills itself (0: never)."""
    argv = [sys.executable, "-c", KILLED, str(source), str(plan), str(out), json.dumps(moments)]
    run = subprocess.run(argv, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr[-2000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.slow
def test_killed_at_any_moment_and_run_again(source, uninterrupted, tmp_path):
    PLAN.save(tmp_path / "plan.json")
    [[_, lines]] = run_killed(source, tmp_path / "plan.json", tmp_path / "whole", [0])
    assert contents(tmp_path / "whole" / "0") == uninterrupted
    lines = int(lines)
    draw = random.Random(0)
    # Anywhere, and close to the end, where folders are renamed. Two threads do not count alike each time.
    moments = [*draw.sample(range(lines // 2, lines), 16), lines // 4, lines - 100, lines - 40, lines - 20]
    out = tmp_path / "killed"
    ends = run_killed(source, tmp_path / "plan.json", out, moments)
    assert sum(kind == signal.SIGKILL for kind, _ in ends) >= 16
    resumed = 0
    for number, (kind, _) in enumerate(ends):
        target = out / str(number)
        left = list((partial_folder(target) / "files").glob("*.safetensors"))
        resumed += bool(left)
        if target.exists():  # killed after the last rename, or not at all
            with pytest.raises(UserError, match="exists already"):
                apply(source, PLAN, target, prove=False)
        else:
            assert kind == signal.SIGKILL
            apply(source, PLAN, target, prove=False, workers=2)
        assert contents(target) == uninterrupted, number
    assert resumed >= 4
    assert names_around(out) == sorted(map(str, range(len(moments))))


def apply_plan(source, plan, out):
    """What the killed process does."""
    torch.set_num_threads(1)
    apply(source, Plan.load(plan), out, prove=False, workers=2)


def test_killed_at_twenty_random_moments_it_ends_with_the_same_bytes(source, uninterrupted, tmp_path):
    PLAN.save(tmp_path / "plan.json")
    arguments, out, found = (source, tmp_path / "plan.json"), tmp_path / "outs", 0
    for target in killed_each(apply_plan, arguments, out, 20):
        found += any(partial_folder(target).glob("files/*.safetensors"))
        if target.exists():  # killed after the last rename; the next run puts away what is left beside it
            with pytest.raises(UserError, match="exists already"):
                apply_plan(*arguments, target)
        else:
            apply_plan(*arguments, target)
        assert contents(target) == uninterrupted
    assert found >= 5
    assert names_around(out) == sorted(["whole", *map(str, range(20))])


def test_finished_shards_are_not_written_again(source, uninterrupted, tmp_path):
    out = tmp_path / "out"
    before = interrupted(source, out)
    assert 5 <= len(before) < len([name for name in uninterrupted if name.endswith(".safetensors")])
    heard = []
    apply(source, PLAN, out, prove=False, workers=2, progress=lambda *report: heard.append(report))
    assert {name: ((out / name).stat().st_ino, (out / name).stat().st_mtime_ns) for name in before} == before
    assert heard[0][0] >= sum(sum(e.nbytes for e in Checkpoint(out).entries.values() if e.file == n) for n in before)
    assert contents(out) == uninterrupted
    assert names_around(tmp_path) == ["out"]


def test_half_written_and_stray_files_are_redone(source, uninterrupted, tmp_path):
    out = tmp_path / "out"
    before = sorted(interrupted(source, out))
    files = partial_folder(out) / "files"
    (files / before[0]).write_bytes((files / before[0]).read_bytes()[:-1])
    (files / before[1]).write_bytes(b"\0" * 20)
    (files / f".{before[2]}.tmp").write_bytes(b"half")
    (files / "LICENSE").write_text("of a file that the source no longer has")
    (files / "folder").mkdir()
    apply(source, PLAN, out, prove=False)
    assert contents(out) == uninterrupted
    assert names_around(tmp_path) == ["out"]


@pytest.mark.parametrize("changed", ["plan", "source", "code"])
def test_what_another_run_left_is_discarded(changed, source, tmp_path, monkeypatch):
    mine = shutil.copytree(source, tmp_path / "source")
    out, plan = tmp_path / "out", PLAN
    before = sorted(interrupted(mine, out))
    for name in before:  # as if it held other numbers: the header stays
        path = partial_folder(out) / "files" / name
        path.write_bytes(path.read_bytes()[:-4] + b"\1\2\3\4")
    if changed == "plan":
        plan = example_plan("mixtral", "remap_skip")
    elif changed == "source":
        file = mine / Checkpoint(mine).files[0]
        os.utime(file, ns=(0, 0))
    else:
        monkeypatch.setattr("espalier.surgery.apply.code_version", lambda: "another")
    apply(mine, plan, out, prove=False)
    apply(mine, plan, tmp_path / "fresh", prove=False)
    assert contents(out) == contents(tmp_path / "fresh")
    assert names_around(tmp_path) == ["fresh", "out", "source"]


def test_a_second_run_is_refused_and_the_first_goes_on(source, uninterrupted, tmp_path):
    out = tmp_path / "out"
    started, go = threading.Event(), threading.Event()

    def progress(done, total):
        started.set()
        assert go.wait(60)

    first = threading.Thread(target=apply, args=(source, PLAN, out), kwargs={"prove": False, "progress": progress})
    first.start()
    try:
        assert started.wait(60)
        with pytest.raises(UserError, match=r"out: another run is writing it .*Wait for it or choose") as error:
            apply(source, PLAN, out, prove=False)
        assert "\n" not in str(error.value)
    finally:
        go.set()
        first.join()
    assert contents(out) == uninterrupted
    assert names_around(tmp_path) == ["out"]


def test_a_run_that_waited_at_the_lock_of_a_finished_one_is_refused(tmp_path, monkeypatch):
    """Between its opening of the lock file and its locking, the first run finishes and removes both."""
    out, flock = tmp_path / "out", partial.fcntl.flock

    def late(lock, how):
        monkeypatch.setattr(partial.fcntl, "flock", flock)
        shutil.rmtree(partial_folder(out))
        out.mkdir()
        (out / "config.json").write_text("{}")
        flock(lock, how)

    monkeypatch.setattr(partial.fcntl, "flock", late)
    with pytest.raises(UserError, match="exists already"), resumable_directory(out, 1):
        pytest.fail("entered")
    assert names_around(tmp_path) == ["out"]


def test_a_run_that_waited_at_the_lock_of_a_removed_folder_does_not_join_the_next(tmp_path, monkeypatch):
    """Between its opening of the lock file and its locking, one run is over and another begins."""
    out, flock, next_run = tmp_path / "out", partial.fcntl.flock, contextlib.ExitStack()

    def late(lock, how):
        monkeypatch.setattr(partial.fcntl, "flock", flock)
        shutil.rmtree(partial_folder(out))
        files = next_run.enter_context(resumable_directory(out, 2))
        (files / "config.json").write_text("{}")
        flock(lock, how)

    monkeypatch.setattr(partial.fcntl, "flock", late)
    with next_run, pytest.raises(UserError, match="another run is writing it"), resumable_directory(out, 1):
        pytest.fail("entered")
    assert contents(out) == {"config.json": b"{}"}
    assert names_around(tmp_path) == ["out"]


def test_replace_after_a_kill_between_the_two_renames(source, uninterrupted, tmp_path):
    out = tmp_path / "out"
    for folder in (out, partial_folder(out) / "old"):
        folder.mkdir(parents=True)
        (folder / "file").write_text("")
    apply(source, PLAN, out, replace=True, prove=False)
    assert contents(out) == uninterrupted
    assert names_around(tmp_path) == ["out"]


def test_an_error_that_the_next_run_would_meet_again_keeps_nothing(source, tmp_path):
    mine = shutil.copytree(source, tmp_path / "source")
    file = mine / Checkpoint(mine).files[-1]
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\xc0\x7f")
    with pytest.raises(UserError, match="holds 1 NaN"):
        apply(mine, PLAN, tmp_path / "out", prove=False, workers=1)
    assert names_around(tmp_path) == ["source"]


def test_replace_leaves_the_old_one_until_the_new_one_is_whole(source, uninterrupted, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("precious")
    with pytest.raises(KeyboardInterrupt):
        apply(source, PLAN, out, replace=True, prove=False, progress=interrupt_after(3, out))
    assert contents(out) == {"old": b"precious"}
    apply(source, PLAN, out, replace=True, prove=False)
    assert contents(out) == uninterrupted
    assert names_around(tmp_path) == ["out"]


def test_an_existing_output_keeps_what_an_interrupted_run_left(source, uninterrupted, tmp_path):
    out = tmp_path / "out"
    before = interrupted(source, out)
    out.mkdir()
    (out / "file").write_text("precious")
    with pytest.raises(UserError, match="exists already"):
        apply(source, PLAN, out, prove=False)
    shutil.rmtree(out)
    apply(source, PLAN, out, prove=False)
    assert {name: ((out / name).stat().st_ino, (out / name).stat().st_mtime_ns) for name in before} == before
    assert contents(out) == uninterrupted


def test_the_first_error_stops_every_worker(tmp_path):
    made = []

    def make(name):
        made.append(name)
        if name == "s0.2":
            raise UserError("a wrong number")
        return [torch.ones(2)]

    names = [[f"s{s}.{n}" for n in range(200)] for s in range(6)]
    outputs = [[OutputTensor(name, "F32", (2,), lambda name=name: make(name)) for name in shard] for shard in names]
    with pytest.raises(UserError, match="a wrong number"):
        ShardWriter(outputs).write(tmp_path, workers=2)
    assert len(made) < 1200
    assert not [p for p in tmp_path.iterdir() if p.suffix == ".tmp" or p.name.startswith("model-00001")]


def test_a_write_error_keeps_finished_shards_for_the_next_run(source, uninterrupted, tmp_path, monkeypatch):
    out, fsync, calls = tmp_path / "out", os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(shards.os, "fsync", full)
    with pytest.raises(
        UserError, match=r"out: no space left on the disk .* 3 finished shards stay in .*\.out\.partial;"
    ):
        apply(source, PLAN, out, prove=False, workers=1)
    assert names_around(tmp_path) == [".out.partial"]
    assert len(list((tmp_path / ".out.partial" / "files").iterdir())) == 3
    apply(source, PLAN, out, prove=False)
    assert contents(out) == uninterrupted
    assert names_around(tmp_path) == ["out"]


def test_a_relative_path_and_a_link(source, uninterrupted, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    monkeypatch.chdir(tmp_path)
    apply(source, PLAN, Path("new"), prove=False)
    apply(source, PLAN, Path("link"), prove=False)
    assert contents(tmp_path / "new") == contents(tmp_path / "link") == uninterrupted
    assert names_around(tmp_path) == ["empty", "link", "new"]
    assert names_around(tmp_path / "empty") == []
