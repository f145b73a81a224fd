"""Results that move: an archive holds what the table is made from, joins what is there, and refuses what is damaged."""

import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from espalier import cli, conf
from espalier.artefacts.store import Store, run_record_path, write_json
from espalier.errors import UserError
from espalier.scoring.samples import save_scores
from espalier.tables.table import make_table
from espalier.workflow import archive, finished, garbage, graph
from espalier.workflow.launch import run_lock

RECORDS = Path(__file__).resolve().parents[1] / "docs/records"
SWEEP = ("method: none", "{method: [reap, ean], method.ratio: 0.5}", "{method: random, method.seed: [0, 1]}")
TASK = "perplexity_maths"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An experiment of five rows as the working directory's."""
    for name in ("conf", "workflow"):
        shutil.copytree(conf.directory().parent / name, tmp_path / name)
    for name in ("Snakefile", "environment.yml"):
        shutil.copy(conf.directory().parent / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ESPALIER_RUNTIME", "")
    sweep = "".join(f"  - {line}\n" for line in SWEEP)
    (tmp_path / "conf/experiment/mine.yaml").write_text(
        f"# @package _global_\nevaluation: {{tasks: [{TASK}]}}\nsweep:\n{sweep}"
    )
    return tmp_path


def known(results, dry=True):
    store = Store(results, dry=dry)
    experiment = graph.expand("mine", [], store)
    graph.save(experiment, store)
    return experiment, store


def score(results, *labels):
    """Write scores of the rows that are called so, and the records of their plans."""
    experiment, store = known(results, dry=False)
    for number, row in enumerate(finished.table_of(experiment).config["rows"]):
        if row["label"] not in labels:
            continue
        path = store.path(row["scores"][TASK])
        draw = np.random.default_rng(number)
        tokens = np.full(9, 50)
        frame = pd.DataFrame({"task": TASK, "item": [f"m/{n}" for n in range(9)], "tokens": tokens, "bytes": tokens})
        frame["nll"] = tokens * (2 + 0.1 * number + draw.random(9))
        result = {"kind": "perplexity", "metric": "perplexity", "bits_per_byte": 1.5, "items": 9, "value": 9.0}
        active = {"tokens": 9, "parameters": 1e6, "experts_per_token": {}}
        parameters = {"stored": 5e6, "unique": 5e6, "experts": 16}
        document = {"tasks": {TASK: result}, "active": active, "parameters": parameters}
        save_scores(path, {"format": "espalier.scores/1"} | document, frame)
        record = {
            "format": "espalier.run/1",
            "commit": f"{number:040d}",
            "dirty": False,
            "versions": {},
            "seconds": 2.0,
        }
        probes = [store.path(node.id) for node in experiment.nodes if node.stage == "probe"]
        for artefact in (path, store.path(row["weights"]), store.path(row["plan"] or row["weights"]), *probes):
            artefact.parent.mkdir(exist_ok=True)
            write_json(run_record_path(artefact), record)


def peek(capsys, results):
    with pytest.raises(SystemExit) as stop:
        cli.main(["peek", "mine", "--results", str(results)])
    assert stop.value.code == 0
    return capsys.readouterr().out


ALL = ("full", "reap 50 %", "ean 50 %", "random 50 %")


def test_two_halves_join_to_the_table_of_the_whole(project, capsys):
    whole, first, second = (project / name for name in ("whole", "first", "second"))
    score(whole, *ALL)
    score(first, "full", "reap 50 %")
    score(second, "full", "ean 50 %", "random 50 %")
    for results, rows in ((first, 2), (second, 4)):
        done = archive.export(*known(results), results.with_suffix(".tar.xz"))
        assert len(done.rows) == rows
        assert len(done.rows) + len(done.waiting) == 5
    joined = project / "joined"
    for name in ("first", "second"):
        restored = archive.restore(project / f"{name}.tar.xz", Store(joined))
        assert restored.experiment == "mine"
    assert restored.known > 0  # the row of both, and the nodes
    again = archive.restore(project / "first.tar.xz", Store(joined))
    assert again.new == 0
    peek(capsys, whole)
    assert "not scored" not in peek(capsys, joined)
    tables = [(results / "refs/mine/table.csv").read_text() for results in (whole, joined)]
    assert tables[0] == tables[1]
    assert tables[0].count("random 50 %") == 2 * 2  # two seeds, two metrics
    # Nothing of it is garbage, and a run scores nothing again.
    assert not [item for item in garbage.find(Store(joined)) if item.path.parent.name != "nodes"]
    command = [sys.executable, "-m", "espalier", "run", "mine", "-n", "--cores", "1", "--results", "joined"]
    planned = subprocess.run(command, capture_output=True, text=True)
    assert planned.returncode == 0, planned.stderr
    counts = dict(re.findall(r"^(\w+) +(\d+)$", planned.stdout + planned.stderr, re.M))
    assert counts == {"report": "1", "all": "1", "total": "2"}  # no model is fetched, no plan made


def test_a_report_of_imported_results_does_without_their_plans(project):
    score(project / "there", *ALL)
    archive.export(*known(project / "there"), project / "mine.tar.xz")
    archive.restore(project / "mine.tar.xz", Store(project / "here"))
    command = [sys.executable, "-m", "espalier", "run", "mine", "--cores", "1", "--results", "here"]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-2000:]
    experiment, store = known(project / "here")
    page = store.path(experiment.target.id).read_text()
    assert "reap 50 %, ean 50 %, random 50 %: their plans are elsewhere" in page
    assert "Quality against parameters" in page
    for folder in ("models", "stats", "plans", "checkpoints"):
        assert all(path.name.endswith(".run.json") for path in (project / "here" / folder).glob("*")), folder


def test_equal_results_give_equal_archives(project):
    score(project / "results", "full")
    for name in ("a", "b"):
        archive.export(*known(project / "results"), project / name)
    assert (project / "a").read_bytes() == (project / "b").read_bytes()
    with pytest.raises(UserError, match="a: exists already"):
        archive.export(*known(project / "results"), project / "a")


def test_the_table_so_far_leaves_out_and_names_what_is_not_scored(project, capsys):
    results = project / "results"
    with pytest.raises(UserError, match="mine: none of 5 rows is scored"):
        finished.so_far(*known(results))
    with pytest.raises(UserError, match="mine: none of 5 rows is scored"):
        archive.export(*known(results), project / "a")
    score(results, "full", "ean 50 %")
    said = peek(capsys, results)
    assert "| ean 50 %" in said
    assert "| reap 50 %" not in said
    assert "3 rows are not scored and left out: reap 50 %, random 50 % (seed 0), random 50 % (seed 1)" in said
    assert not (results / "refs").exists()  # names are of whole tables
    score(results, *ALL)
    peek(capsys, results)
    assert (results / "refs/mine/table.md").exists()


def test_a_score_that_another_job_was_to_make_is_taken(project):
    """Of two tasks at once here, of one alone there: the item's node names another maker."""
    results, other = project / "results", project / "other"
    score(other, "full")
    archive.export(*known(other), project / "one.tar.xz")
    path = project / "conf/experiment/mine.yaml"
    one = path.read_text()
    path.write_text(one.replace(f"[{TASK}]", f"[{TASK}, perplexity_wiki]"))
    known(results, dry=False)
    path.write_text(one)
    archive.restore(project / "one.tar.xz", Store(results))
    rows, waiting = finished.split(*known(results))
    assert [row["label"] for row in rows] == ["full"]
    assert len(waiting) == 4


def rewritten(source, target, change):
    """Copy an archive with its files changed by `change(name, data)`; None leaves one out."""
    with tarfile.open(source) as old, tarfile.open(target, "w:xz") as new:
        for member in old:
            data = change(member.name, old.extractfile(member).read())
            if data is not None:
                member.size = len(data)
                new.addfile(member, io.BytesIO(data))
    return target


def test_what_is_damaged_foreign_or_of_another_version_is_refused(project):
    score(project / "results", "full")
    whole = project / "whole.tar.xz"
    archive.export(*known(project / "results"), whole)
    bad, new = project / "bad.tar.xz", Store(project / "new")

    def refused(match):
        with pytest.raises(UserError, match=match):
            archive.restore(bad, new)
        assert not new.root.exists()

    refused("bad.tar.xz: no such file")
    bad.write_bytes(whole.read_bytes()[:-500])
    refused("no archive of results, or damaged")
    bad.write_text("hello")
    refused("no archive of results, or damaged")
    flipped = bytearray(whole.read_bytes())
    flipped[len(flipped) // 2] ^= 0x55
    bad.write_bytes(flipped)
    refused("or damaged|is damaged or missing")
    rewritten(whole, bad, lambda name, data: data + b" " if name.startswith("scores/") else data)
    refused(r"scores/\w+\.\w+(\.json)? is damaged or missing")
    rewritten(whole, bad, lambda name, data: None if name.endswith(".parquet") else data)
    refused(r"parquet is damaged or missing")

    def manifest(change):
        def changed(name, data):
            return json.dumps(change(json.loads(data))).encode() if name == "manifest.json" else data

        return changed

    rewritten(whole, bad, manifest(lambda said: said | {"format": "espalier.archive/9"}))
    refused("format is 'espalier.archive/9'")
    rewritten(whole, bad, manifest(lambda said: said | {"files": said["files"] | {"../../etc/passwd": "0"}}))
    refused(r"holds '../../etc/passwd', which is no result")
    rewritten(whole, bad, manifest(lambda said: said | {"files": [1]}))
    refused("no archive of results, or damaged")


def test_what_is_no_result_is_not_read_into_memory(project, monkeypatch):
    bad = project / "bad.tar.xz"
    read = []
    monkeypatch.setattr(tarfile.TarFile, "extractfile", lambda tar, member: read.append(member.name))
    for name, size, said in (
        ("scores/a.bin", 8, "which is no result"),
        ("speed/0123456789ab.json", 2**20, "more than"),
    ):
        with tarfile.open(bad, "w:xz") as tar:
            member = tarfile.TarInfo(name)
            member.size = size
            tar.addfile(member, io.BytesIO(bytes(size)))
        monkeypatch.setattr(archive, "LARGEST", 2**19)
        with pytest.raises(UserError, match=said):
            archive.restore(bad, Store(project / "new"))
    assert not read


def renamed_nodes(source, target, change):
    """Copy an archive with its nodes changed, hashes and all, as another version would have written it."""
    import hashlib

    with tarfile.open(source) as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}
    said = json.loads(files.pop("manifest.json"))
    for name in [name for name in files if name.startswith("nodes/")]:
        files[name] = json.dumps(change(json.loads(files[name]))).encode()
    said["files"] = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    with tarfile.open(target, "w:xz") as tar:
        for name, data in {"manifest.json": json.dumps(said).encode(), **files}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def test_nodes_must_mean_here_what_their_ids_say(project):
    score(project / "results", "full")
    whole, bad = project / "whole.tar.xz", project / "bad.tar.xz"
    archive.export(*known(project / "results"), whole)
    renamed_nodes(whole, bad, lambda node: node | {"version": 99} if node["stage"] == "score" else node)
    with pytest.raises(UserError, match=r"stage 'score' of version 99, here it is \d+: results of the two are not"):
        archive.restore(bad, Store(project / "new"))
    renamed_nodes(whole, bad, lambda node: node | {"config": {"n": 1}} if node["stage"] == "score" else node)
    with pytest.raises(UserError, match=r"nodes/\w+\.json is not what its name says"):
        archive.restore(bad, Store(project / "new"))
    assert not (project / "new").exists()


@pytest.mark.parametrize("path", sorted(RECORDS.glob("*.tar.xz")), ids=lambda path: path.name)
def test_published_tables_follow_from_their_records(path, tmp_path):
    store = Store(tmp_path / "results")
    archive.restore(path, store)
    nodes = [store.read_node(node.stem) for node in (store.root / "nodes").glob("*.json")]
    (table,) = (node for node in nodes if node["stage"] == "table")
    made = make_table(table["config"], store)
    made.write(tmp_path / "table")
    name = path.name.removesuffix(".tar.xz")
    page = (RECORDS.parent / "results.md").read_text()
    block = page.split(f"<!-- {name}:begin -->")[1].split(f"<!-- {name}:end -->")[0]
    lines = [line for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("|")]
    assert len(lines) > 10
    assert [line for line in block.splitlines() if line.startswith("|")] == lines


def test_no_import_into_a_folder_where_a_run_is_at_work(project):
    score(project / "results", "full")
    archive.export(*known(project / "results"), project / "whole.tar.xz")
    with run_lock(project / "busy", "mine"), pytest.raises(UserError, match="another run is at work"):
        archive.restore(project / "whole.tar.xz", Store(project / "busy"))
