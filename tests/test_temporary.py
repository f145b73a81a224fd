"""Checkpoints that score jobs make for themselves: which they are, and that none outlives its job."""

import signal
import subprocess
import sys

import pytest

from espalier.artefacts import temporary
from espalier.artefacts.store import Node, Store
from espalier.errors import UserError

MODEL = Node("fetch", {"id": "embedded:moe", "revision": "sha256:0"})


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "results")


def nodes(*extra):
    """A model, a plan, its checkpoint and a task on each, and what `extra(checkpoint)` adds."""
    plan = Node("plan", {"name": "reap"}, (MODEL.id,))
    apply = Node("apply", {}, (MODEL.id, plan.id))
    tasks = [Node("task", {"task": "boolq"}, (of.id,)) for of in (MODEL, apply)]
    return apply, [MODEL, plan, apply, *tasks, *(Node(stage, {}, (apply.id,)) for stage in extra)]


def test_only_what_nothing_but_tasks_reads_is_temporary():
    apply, plain = nodes()
    assert temporary.only_scored(plain) == [apply.id]
    for reader in ("probe", "plan", "apply", "tune", "speed", "fit"):
        assert temporary.only_scored(nodes(reader)[1]) == []
    assert temporary.only_scored([MODEL, apply]) == []  # nobody asks for it


def test_a_score_job_reads_what_its_checkpoint_is_made_of(store):
    apply, made = nodes()
    teacher = Node("teacher", {}, (MODEL.id,))
    score = Node("score", {"tasks": []}, (apply.id, teacher.id))
    for node in (*made, teacher, score):
        store.write_node(node)
    job = store.read_node(score.id)
    names = [MODEL.id, apply.parents[1], teacher.id]
    assert temporary.inputs(job, store, {apply.id}) == [store.path(name) for name in names]
    assert temporary.inputs(job, store, ()) == [store.path(apply.id), store.path(teacher.id)]
    store.path(apply.id).mkdir(parents=True)  # kept by an earlier run
    assert temporary.inputs(job, store, {apply.id}) == [store.path(apply.id), store.path(teacher.id)]


def test_it_goes_with_its_context(tmp_path):
    with temporary.checkpoint("abc", tmp_path / "new", lambda out: out.mkdir()) as made:
        assert made.is_dir()
        assert made.name == "abc"
    assert not any((tmp_path / "new").iterdir())
    with pytest.raises(ValueError, match="no"), temporary.checkpoint("abc", tmp_path / "new", lambda out: out.mkdir()):
        raise ValueError("no")
    assert not any((tmp_path / "new").iterdir())


def test_scratch_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for base in (tmp_path / "$NOT_SET_HERE", tmp_path / "file"):
        with pytest.raises(UserError, match=r"runtime\.scratch="), temporary.checkpoint("abc", base, lambda out: None):
            pass


def holder(folder):
    """A process that has made a checkpoint in `folder` and waits."""
    code = (
        "import sys, time; from pathlib import Path; from espalier.artefacts import temporary\n"
        "from espalier.errors import InterruptedWork\n"
        "try:\n"
        f"    with temporary.checkpoint('abc', Path({str(folder)!r}), lambda out: out.mkdir()):\n"
        "        print('made', flush=True); time.sleep(60)\n"
        "except InterruptedWork: sys.exit(7)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "made\n"
    return process


def test_a_terminated_job_removes_it_and_a_killed_ones_is_removed_by_the_next(tmp_path):
    alive, terminated, killed = (holder(tmp_path) for _ in range(3))
    assert len(list(tmp_path.iterdir())) == 3
    terminated.send_signal(signal.SIGTERM)
    assert terminated.wait(20) == 7
    assert len(list(tmp_path.iterdir())) == 2
    killed.kill()
    killed.wait()
    assert len(list(tmp_path.iterdir())) == 2
    with temporary.checkpoint("def", tmp_path, lambda out: out.mkdir()):
        assert len(list(tmp_path.iterdir())) == 2  # its own and that of the job which is alive
    alive.kill()
    alive.wait()
