"""The command line: mistakes are one line and exit code 2 and leave nothing behind; results can be looked at."""

import errno
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from espalier import cli, conf, doctor
from espalier.artefacts import lineage
from espalier.artefacts.provenance import run_record
from espalier.artefacts.store import Node, Store, write_json
from espalier.errors import UserError
from espalier.workflow import garbage, launch
from tiny import save_tiny


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    base = tmp_path_factory.mktemp("models")
    save_tiny("mixtral", base / "mixtral", max_shard_size="100KB")
    rng = np.random.default_rng(0)
    np.savez(base / "tokens.npz", input_ids=rng.integers(3, 95, (4, 16)))
    np.savez(base / "beyond.npz", input_ids=np.full((2, 8), 96))
    np.savez(base / "shape.npz", input_ids=np.arange(8))
    np.savez(base / "floats.npz", input_ids=np.ones((2, 8)))
    return base


def listing(folder):
    return sorted((str(p.relative_to(folder)), p.stat().st_size if p.is_file() else -1) for p in folder.rglob("*"))


def main(capsys, *arguments):
    """Run the command line in this process; return its exit code, output and errors."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return stop.value.code or 0, out, err


def refused(capsys, folder, *arguments):
    """The one line with which a command is refused; nothing in `folder` may change."""
    before = listing(folder)
    code, out, err = main(capsys, *arguments)
    assert code == 2, out + err
    errors = [line for line in err.splitlines() if line.startswith("espalier: error: ")]
    assert len(errors) == 1
    assert err.splitlines()[-1] == errors[0]
    assert "Traceback" not in err
    assert listing(folder) == before
    return errors[0].removeprefix("espalier: error: ")


def change_config(models, tmp_path, **changes):
    """A copy of the model with another config.json."""
    copy = tmp_path / "model"
    shutil.copytree(models / "mixtral", copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changes))
    return copy


def compress(model, models, tmp_path, *rest, method="reap", tokens="tokens.npz"):
    return ("compress", model, "-m", method, "-c", models / tokens, "-o", tmp_path / "out", *rest)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (
            "reap",
            ["ratio=0.9"],
            r"conf/method/reap.yaml: ratio=0.9 leaves 1 of 8 experts, but the router picks top_k=2",
        ),
        ("naee", ["ratio=1.5"], r"conf/method/naee.yaml: ratio=1.5 is not a fraction"),
        ("hc_smoe", ["ratio=half"], r"conf/method/hc_smoe.yaml: ratio=half is not a fraction"),
        ("hc_smoe", ["linkage=averag"], r"conf/method/hc_smoe.yaml: linkage=averag"),
        ("raep", [], r"method=raep: no conf/method/raep.yaml; did you mean reap\?"),
        ("reap", ["ration=0.5"], r"conf/method/reap.yaml: unknown key 'ration'; did you mean ratio\?"),
        ("reap", ["0.5"], r"0.5: not a setting. Write KEY=VALUE"),
        ("none", [], r"method=none: leaves the model as it is"),
        ("reap", ["then.beta=0.5"], r"no second method is named"),
    ],
)
def test_method_mistakes(models, tmp_path, capsys, method, settings, message):
    import re

    line = refused(capsys, tmp_path, *compress(models / "mixtral", models, tmp_path, *settings, method=method))
    assert re.search(message, line), line


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ("beyond.npz", "input_ids[0, 0]=96 is beyond the model's vocabulary of 96 (16 such ids)"),
        ("shape.npz", "input_ids has shape [8], expected [N, L]"),
        ("floats.npz", "input_ids is float64, expected integers"),
        ("none.npz", "no such file"),
    ],
)
def test_calibration_mistakes(models, tmp_path, capsys, tokens, message):
    assert message in refused(capsys, tmp_path, *compress(models / "mixtral", models, tmp_path, tokens=tokens))


def test_model_mistakes(models, tmp_path, capsys):
    dense = change_config(models, tmp_path / "a", model_type="gpt2", num_local_experts=None)
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(
        json.dumps(
            {k: v for k, v in config.items() if "expert" not in k and k != "model_type"} | {"model_type": "gpt2"}
        )
    )
    unknown = change_config(models, tmp_path / "b", model_type="dbrx")
    cases = {
        dense: "model_type='gpt2' is a dense model without experts",
        unknown: "model_type='dbrx' is a Mixture-of-Experts family that Espalier does not know",
        "/no/such/model": "/no/such/model: no such directory",
        "mixtrall": "no conf/model/mixtrall.yaml",
        "org/name": "Write the model as org/name@COMMIT",
        "mixtral_8x7b": "Run `espalier pin mixtral_8x7b`",
        f"org/name@{'main'}": "revision=main is a branch or a tag",
    }
    for model, message in cases.items():
        assert message in refused(capsys, tmp_path, *compress(model, models, tmp_path, "ratio=0.5"))


def test_damaged_shards(models, tmp_path, capsys):
    model = change_config(models, tmp_path)
    shards = sorted(model.glob("*.safetensors"))
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:-100])
    line = refused(capsys, tmp_path, *compress(model, models, tmp_path, "ratio=0.5"))
    assert f"{shards[1].name}: truncated shard, {len(whole) - 100} bytes instead of {len(whole)}" in line
    shards[1].unlink()
    line = refused(capsys, tmp_path, *compress(model, models, tmp_path, "ratio=0.5"))
    assert f"1 of {len(shards)} shards are missing: {shards[1].name}" in line
    shards[1].write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    assert "not a safetensors file" in refused(capsys, tmp_path, *compress(model, models, tmp_path, "ratio=0.5"))


@pytest.mark.parametrize("method", ["reap", "random"])
def test_weights_that_are_not_numbers(models, tmp_path, capsys, method):
    model = change_config(models, tmp_path)
    part = "block_sparse_moe.experts.3.w2" if method == "reap" else "self_attn.q_proj"
    name = f"model.layers.1.{part}.weight"
    shard = next(p for p in model.glob("*.safetensors") if name in load_file(p))
    tensors = load_file(shard)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, shard, {"format": "pt"})
    command = compress(model, models, tmp_path, "ratio=0.25", "seed=1" if method == "random" else "weights=model")
    command = [method if word == "reap" else word for word in command]
    line = refused(capsys, tmp_path, *command)
    assert "NaN" in line
    assert f"{shard.name}: tensor {name} holds" in line


def test_output_that_exists_is_refused_before_any_work(models, tmp_path, capsys, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious.txt").write_text("mine")
    monkeypatch.setattr("espalier.inputs.sources.resolve", lambda *_: pytest.fail("work was done"))
    line = refused(capsys, tmp_path, *compress(models / "mixtral", models, tmp_path, "ratio=0.5"))
    assert "out: exists already" in line


@pytest.mark.parametrize("size", ["64k", "184k"])
def test_no_space(models, tmp_path, capsys, size):
    """64 kB are too few for the weights, told before any work; 184 kB are too few for all files beside them."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", disk], capture_output=True).returncode:
        pytest.skip("mounting a small disk is not permitted here")
    try:
        command = ("compress", models / "mixtral", "-m", "random", "-c", models / "tokens.npz", "-o", disk / "out")
        assert "free" in refused(capsys, disk, *command, "ratio=0.5")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_errors_without_a_traceback_and_with(models, tmp_path, capsys, monkeypatch):
    with pytest.raises(UserError, match=r"no such node|starts with this"):
        cli.main(["show", "abc", "--results", str(tmp_path), "--debug"])

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "file"))

    monkeypatch.setattr(lineage, "show", full)
    assert "file: no space left on the disk" in refused(capsys, tmp_path, "show", "abc", "--results", tmp_path)

    for too_much in (lambda *_: torch.empty(10**15), lambda *_: np.empty(10**15), lambda *_: bytearray(10**15)):
        monkeypatch.setattr(lineage, "show", too_much)
        line = refused(capsys, tmp_path, "show", "abc", "--results", tmp_path)
        assert line.startswith("out of memory (")
        assert "runtime.collect_batch_size" in line

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(lineage, "show", interrupted)
    assert main(capsys, "show", "abc")[0] == 130


def test_the_launcher_needs_no_torch():
    """Looking at results and machines from a login node; also that `espalier` is installed as a command."""
    code = (
        "import sys; sys.argv = ['espalier', 'show', 'abc', '--results', '/nonexistent']\n"
        "import runpy\ntry:\n    runpy.run_module('espalier', run_name='__main__')\nexcept SystemExit as stop:\n"
        "    assert stop.code == 2\n"
        "from espalier.costs import estimate\n"
        "from espalier.inputs import sources\nfrom espalier.workflow import forecast, garbage, launch\n"
        "print([m for m in ('torch', 'transformers', 'huggingface_hub', 'datasets') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stdout + run.stderr
    assert run.stderr.startswith("espalier: error: abc: no node in")


def test_help_and_version(capsys):
    from espalier import __version__

    assert main(capsys, "--version") == (0, f"espalier {__version__}\n", "")
    code, out, _ = main(capsys, "--help")
    assert code == 0
    stages = ("fetch", "tokens", "collect", "plan", "apply", "score", "table", "report")
    for command in ("compress", "run", "estimate", "show", "diff", "gc", "doctor", "pin", *stages):
        assert f" {command} " in out
    assert main(capsys, "compress", "x")[0] == 2  # --method and --out are missing


@pytest.fixture
def store(tmp_path):
    """Two experiments that share a model; `old` was replaced by `new`, whose report exists and has a name."""
    store = Store(tmp_path / "results")
    fetch = Node("fetch", {"id": "embedded:moe", "revision": "sha256:0"}, label="embedded:moe")
    tokens = Node("tokens", {"name": "embedded", "samples": 16}, (fetch.id,), "calibration")
    nodes = [fetch, tokens]
    reports = {}
    for name, ratio in (("old", 0.25), ("new", 0.5)):
        collect = Node("collect", {"probes": ["usage"], "dtype": name}, (fetch.id, tokens.id))
        probe = Node("probe", {"probe": "usage", "dtype": name}, (fetch.id, tokens.id), made_by=collect.id)
        plan = Node("plan", {"name": "reap", "ratio": ratio}, (fetch.id, probe.id), f"reap {name}")
        apply = Node("apply", {}, (fetch.id, plan.id), f"reap {name}")
        table = Node("table", {"experiment": "mine", "rows": [name]}, (plan.id, apply.id), "mine")
        reports[name] = Node("report", {"experiment": "mine"}, (table.id,), "mine")
        nodes += [collect, probe, plan, apply, table, reports[name]]
    for n, node in enumerate(nodes):
        store.write_node(node)
        os.utime(store.node_path(node.id), (1000 + n, 1000 + n))
        path = store.path(store.read_node(node.id))
        path.parent.mkdir(parents=True, exist_ok=True)
        if node.stage == "apply":
            path.mkdir()
            (path / "model.safetensors").write_bytes(b"0" * 1000)
        elif node.stage == "fetch":
            write_json(path, {"format": "espalier.model/1", "path": str(store.root / "models/org--used@123456789012")})
        elif node.stage != "probe":
            path.write_text("{}")
    for model in ("used", "unused"):
        (store.root / f"models/org--{model}@123456789012").mkdir()
    link = store.root / "refs/mine/report.html"
    link.parent.mkdir(parents=True)
    link.symlink_to(f"../../reports/{reports['new'].id}.html")
    plans = {node.label: node.id for node in nodes if node.stage == "plan"}
    return store, plans, {node.label + node.stage: node for node in nodes}


def test_show(store, capsys):
    store, plans, nodes = store
    id = plans["reap new"]
    write_json(store.root / f"plans/{id}.run.json", {"format": "espalier.run/1", "seconds": 1.5, "commit": "f" * 40})
    code, out, _ = main(capsys, "show", id[:6], "--results", store.root)
    assert code == 0
    assert f"plan {id}  reap new" in out
    for line in ("ratio = 0.5", "run.seconds = 1.5", f"plans/{id}.json", "parent    probe"):
        assert line in out
    assert " = {}" not in lineage.show(store, nodes["reap newapply"].id)
    probe = nodes["probe"].id
    assert "made by   collect" in lineage.show(store, probe)
    with pytest.raises(UserError, match=r"Give more digits|starts with this"):
        lineage.find(store, "")
    with pytest.raises(UserError, match="starts with this"):
        lineage.find(store, "zzzz")


def test_gc_deletes_what_no_experiment_needs_and_only_when_told(store, capsys):
    store, plans, nodes = store
    (store.root / "plans/.x.json.123.tmp").write_text("half")
    (store.root / "plans/notes.txt").write_text("mine")
    before = listing(store.root)
    code, out, _ = main(capsys, "gc", "--results", store.root)
    assert code == 0
    assert listing(store.root) == before
    assert plans["reap old"] in out
    assert plans["reap new"] not in out
    assert "org--unused" in out
    assert "org--used" not in out
    kept = [path for path, _ in before if plans["reap old"] not in path]
    main(capsys, "gc", "--delete", "--results", store.root)
    left = {path for path, _ in listing(store.root)}
    assert f"plans/{plans['reap new']}.json" in left
    assert f"plans/{plans['reap old']}.json" not in left
    assert not any("unused" in path or path.endswith(".tmp") for path in left)
    shared = [path for path in kept if nodes["embedded:moefetch"].id in path or "notes.txt" in path]
    assert len(shared) == 3
    assert set(shared) <= left
    assert garbage.find(store) == []


def test_gc_waits_for_a_run(store):
    store, _, _ = store
    with launch.run_lock(store.root, "mine"), pytest.raises(UserError, match=r"another run is at work .*mine, process"):
        garbage.delete(store)


def test_a_stage_refuses_a_node_of_another(store, capsys):
    store, plans, _ = store
    line = refused(capsys, store.root, "apply", plans["reap new"], "--results", store.root)
    assert f"is a plan node: run `espalier plan {plans['reap new']}`" in line


def test_doctor_says_what_will_work(capsys, tmp_path):
    code, out, _ = main(capsys, "doctor", "--results", tmp_path)
    assert code == 0
    for what in ("python", "torch", "memory", "disk", "bfloat16", "threads", "slurm", "wandb", "hub", "What will work"):
        assert what in out
    assert list(tmp_path.iterdir()) == []


def test_estimate_of_a_model_and_of_an_experiment(capsys, tmp_path):
    code, out, _ = main(capsys, "estimate", "mixtral_8x7b", "--flops", "1e14", "--results", tmp_path)
    assert code == 0
    for figure in ("46,702,792,704", "93.41 GB", "48.31 GB"):  # 93.41 - 2 x 32 x 4 x (3 x 4096 x 14336 + 4096) bytes
        assert figure in out
    assert "mixtrall" in refused(capsys, tmp_path, "estimate", "mixtrall", "--flops", "1e12")


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """A project with one experiment, and the Snakemake commands that would be called."""
    for name in ("conf", "workflow"):
        shutil.copytree(conf.directory().parent / name, tmp_path / name)
    shutil.copy(conf.directory().parent / "Snakefile", tmp_path)
    (tmp_path / "conf/experiment/mine.yaml").write_text(
        "# @package _global_\nmodel: {id: org/name}\ncalibration: {source: hub, id: a/b, revision: null, file: f}\n"
        "evaluation: {tasks: [hellaswag]}\nsweep: [{method: reap, method.ratio: [0.25, 0.5]}]\n"
    )
    monkeypatch.chdir(tmp_path)
    found = []
    monkeypatch.setattr(launch, "_call", lambda command, lock=None: found.append((command, lock)) or 0)
    return found


def test_run_hands_over_to_snakemake(calls, capsys, tmp_path, monkeypatch):
    command = ["run", "mine", "calibration.samples=2", "--cores", "2", "--results", "elsewhere"]
    assert main(capsys, *command)[0] == 0
    ((command, lock),) = calls
    assert command[:3] == [sys.executable, "-m", "snakemake"]
    assert command[command.index("--cores") + 1] == "2"
    settings = command[command.index("--config") + 1 :]
    assert settings == ['experiments=["mine"]', 'overrides=["calibration.samples=2"]', 'results="elsewhere"']
    assert lock is not None
    cancelled = []
    monkeypatch.setattr(launch, "cancel_orphans", cancelled.append)
    main(capsys, "run", "mine", "--profile", "slurm")
    assert cancelled == [Path("results")]
    assert "--cores" not in calls[1][0]
    assert calls[1][0][calls[1][0].index("--slurm-jobname-prefix") + 1].startswith("espalier-")
    assert any(word.endswith("workflow/profiles/slurm") for word in calls[1][0])


def test_a_dry_run_writes_nothing(calls, capsys, tmp_path):
    before = listing(tmp_path)
    assert main(capsys, "run", "mine", "-n")[0] == 0
    assert "--dry-run" in calls[0][0]
    assert listing(tmp_path) == before


def test_run_mistakes_are_told_before_snakemake_starts(calls, capsys, tmp_path):
    for command, message in (
        (["run", "mime"], "did you mean mine?"),
        (["run", "mine", "calibration=embeded"], "did you mean embedded?"),
        (["run", "mine", "--profile", "slrum"], "did you mean slurm?"),
        (["run", "mine", "sweep=[{method: reap, method.ratoi: 0.5}]"], "ratoi"),
    ):
        assert message in refused(capsys, tmp_path, *command)
    assert calls == []


def test_one_run_at_a_time(calls, capsys, tmp_path):
    results = tmp_path / "results"
    with launch.run_lock(results, "first") as descriptor:
        line = refused(capsys, tmp_path, "run", "mine")
        assert "another run is at work in results (first, process" in line
        # A child that outlives its parent, as Snakemake does after `kill -9`, still holds the lock.
        child = subprocess.Popen(["sleep", "60"], pass_fds=[descriptor])
    try:
        assert "another run" in refused(capsys, tmp_path, "run", "mine")
    finally:
        child.kill()
        child.wait()
    assert main(capsys, "run", "mine")[0] == 0


def test_only_a_stale_lock_of_snakemake_is_removed(calls, capsys, tmp_path):
    locks = tmp_path / ".snakemake/locks"
    locks.mkdir(parents=True)
    assert not launch.stale_lock(tmp_path)
    (locks / "0.input.lock").touch()
    by_hand = subprocess.Popen(["bash", "-c", "exec -a snakemake sleep 60"], cwd=tmp_path)
    try:
        main(capsys, "run", "mine")
        assert ["--unlock" in command for command, _ in calls] == [False]  # Snakemake itself says that it is locked
    finally:
        by_hand.kill()
        by_hand.wait()
    job = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "snakemake", "--nolock"], cwd=tmp_path)
    try:
        main(capsys, "run", "mine")
        assert ["--unlock" in command for command, _ in calls] == [False, True, False]  # a cluster's job holds no lock
    finally:
        job.kill()
        job.wait()


def test_a_run_record_needs_no_git(tmp_path, monkeypatch):
    """As in a container without it: what a job has made is not lost for want of a commit's name."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with run_record(tmp_path / "plan.json"):
        (tmp_path / "plan.json").write_text("{}")
    record = json.loads((tmp_path / "plan.run.json").read_text())
    assert record["commit"] is record["dirty"] is None
    assert doctor._project().state != "missing"
