"""Sources: revisions are contents, downloads are pinned and resumed, pins change one line."""

import hashlib
import json
import shutil

import pytest

from espalier import conf
from espalier.artefacts.store import Store
from espalier.errors import UserError
from espalier.inputs import hub, sources
from espalier.workflow.graph import expand
from stub_hub import StubHub

OLD, NEW = "a" * 40, "b" * 40
ID = "org/tiny"
FILES = {
    "config.json": b'{"model_type": "mixtral"}',
    "model.safetensors": bytes(range(256)) * 400,
    "tokenizer.json": b"{}",
    "consolidated.00.pt": b"never asked for",
}


@pytest.fixture
def stub(monkeypatch, tmp_path):
    import huggingface_hub

    huggingface_hub.close_session()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    with StubHub({ID: {OLD: FILES, NEW: FILES | {"config.json": b'{"model_type": "olmoe"}'}}}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server
    huggingface_hub.close_session()


@pytest.fixture
def project(tmp_path, monkeypatch):
    shutil.copytree(conf.directory(), tmp_path / "conf")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def model_file(project, name="tiny", revision="null"):
    path = project / "conf/model" / f"{name}.yaml"
    path.write_text(
        f"# what it is\nid: {ID}\nrevision: {revision} # the commit\nfamily: mixtral\n_facts: {{revision: null}}\n"
    )
    return path


def test_a_pinned_model_is_downloaded_once(stub, tmp_path):
    lines = []
    directory = sources.resolve(ID, OLD, tmp_path, lines.append)
    assert directory == tmp_path / "models" / f"org--tiny@{OLD[:12]}"
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (directory / name).read_bytes() == FILES[name]
    assert not (directory / "consolidated.00.pt").exists()
    assert len(lines) == 1
    assert str(directory) in lines[0]
    asked = len(stub.requests)
    assert sources.resolve(ID, OLD, tmp_path, lines.append) == directory
    assert len(stub.requests) == asked  # a finished download asks nobody
    other = sources.resolve(ID, NEW, tmp_path)
    assert other != directory
    assert b"olmoe" in (other / "config.json").read_bytes()


def test_weights_that_are_there_twice_are_fetched_once(stub, tmp_path):
    again = {"original/model.safetensors": b"in another layout", "consolidated.safetensors": b"in another layout"}
    stub.repositories[ID][OLD] = FILES | again
    directory = sources.resolve(ID, OLD, tmp_path)
    assert sorted(p.name for p in directory.rglob("*.safetensors")) == ["model.safetensors"]
    assert "consolidated.safetensors" not in stub.downloads()


def test_a_cut_transfer_goes_on_where_it_stopped(stub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1024)
    stub.cut["model.safetensors"] = 2
    directory = sources.resolve(ID, OLD, tmp_path)
    assert (directory / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    ranges = [asked for _, path, asked in stub.requests if path.endswith(".safetensors") and asked]
    assert ranges == ["bytes=51200-", "bytes=76800-"]  # the halves of what was left


def test_an_interrupted_download_fetches_only_what_is_missing(stub, tmp_path):
    stub.broken.add("model.safetensors")
    with pytest.raises(UserError, match=r"org/tiny@aaaaaaaaaaaa: the hub could not be reached .*Run again"):
        sources.resolve(ID, OLD, tmp_path)
    stub.broken.clear()
    sources.resolve(ID, OLD, tmp_path)
    counts = {name: stub.downloads().count(name) for name in FILES}
    assert counts["config.json"] == counts["tokenizer.json"] == 1
    assert counts["consolidated.00.pt"] == 0


def test_a_damaged_file_is_told(stub, tmp_path):
    directory = tmp_path / "models" / f"org--tiny@{OLD[:12]}"
    sources.resolve(ID, OLD, tmp_path)
    (directory / ".complete").unlink()
    (directory / "model.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match=r"model.safetensors: 5 bytes, the hub says 102400"):
        sources.resolve(ID, OLD, tmp_path)


@pytest.mark.parametrize(
    ("prepare", "id", "revision", "message"),
    [
        (lambda s: None, "org/none", OLD, r"org/none@a+: the hub has no such repository"),
        (lambda s: None, ID, "c" * 40, r"the hub has no such commit"),
        (lambda s: s.gated.add(ID), ID, OLD, r"gated. Accept its terms at http://127.0.0.1:\d+/org/tiny"),
    ],
)
def test_refusals_are_one_line(stub, tmp_path, prepare, id, revision, message):
    prepare(stub)
    with pytest.raises(UserError, match=message) as error:
        sources.resolve(id, revision, tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "models").exists()


def test_no_network_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    with pytest.raises(UserError, match=r"could not be reached .*give its path"):
        sources.resolve(ID, OLD, tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        sources.resolve(ID, OLD, tmp_path)


def test_too_small_a_disk_is_told_before_the_download(stub, tmp_path, monkeypatch):
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1000))
    with pytest.raises(UserError, match=r"0.00 GB are to be downloaded, but .* has 0.00 GB free"):
        sources.resolve(ID, OLD, tmp_path)
    assert not stub.downloads()


def test_only_commits_are_revisions(project):
    model_file(project)
    assert sources.revision_of(ID, None, project) is None  # enough for a dry run
    with pytest.raises(UserError, match=r"conf/model/tiny.yaml: revision is null.*`espalier pin tiny`"):
        sources.resolve(ID, None, project)
    with pytest.raises(UserError, match=r"revision=main is a branch .*`espalier pin tiny`"):
        sources.revision_of(ID, "main", project)
    with pytest.raises(UserError, match=r"org/other@COMMIT"):
        sources.resolve("org/other", None, project)


def test_a_branch_seen_before_is_named_with_its_commit(project, monkeypatch):
    refs = project / "hub/models--org--tiny/refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text(NEW)
    monkeypatch.setenv("HF_HUB_CACHE", str(project / "hub"))
    with pytest.raises(UserError, match=NEW):
        sources.revision_of(ID, "main", project)


def test_pin_changes_the_value_of_one_line(stub, project):
    path = model_file(project)
    before = path.read_text()
    assert sources.pin("tiny") == (project / "conf/model/tiny.yaml", None, NEW)
    assert path.read_text() == before.replace("revision: null # the commit", f"revision: {NEW} # the commit")
    assert conf.load("model", "tiny")["revision"] == NEW
    asked = len(stub.requests)
    assert sources.pin("tiny")[2] == NEW
    assert len(stub.requests) == asked
    model_file(project, revision=OLD)
    assert sources.pin("tiny", update=True) == (path, OLD, NEW)


def test_pin_of_a_data_set(stub, project):
    stub.repositories["allenai/c4"] = {OLD: {"en/a.json": b"{}"}}
    sources.pin("c4_32x2048")
    assert conf.load("calibration", "c4_32x2048")["revision"] == OLD
    assert any(path.startswith("/api/datasets/allenai/c4") for _, path, _ in stub.requests)


def test_pin_refuses_what_is_not_on_the_hub(stub, project):
    with pytest.raises(UserError, match="embedded:moe is not on the hub"):
        sources.pin("embedded_moe")
    with pytest.raises(UserError, match=r"did you mean mixtral_8x7b\?"):
        sources.pin("mixtral_8x7")
    assert not stub.requests


def test_a_local_directory_is_its_content(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"weights")
    store = tmp_path / "results"
    revision = sources.revision_of(str(model), None, store)
    assert revision.startswith("sha256:")
    assert (store / "hashes.json").exists()
    assert sources.resolve(str(model), revision, store) == model
    (model / "README.md").write_text("notes are not content")
    assert sources.revision_of(str(model), None, store) == revision
    (model / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(UserError, match="changed since this run was planned"):
        sources.resolve(str(model), revision, store)
    with pytest.raises(UserError, match="no such directory"):
        sources.resolve(str(tmp_path / "none"), None, store)


def test_model_names(tmp_path, monkeypatch):
    assert sources.model_config("mixtral_8x7b")["id"] == "mistralai/Mixtral-8x7B-v0.1"
    assert sources.model_config(f"org/name@{OLD}") == {"id": "org/name", "revision": OLD}
    assert sources.model_config("./x@y") == {"id": "./x@y", "revision": None}
    with pytest.raises(UserError, match="mixtral_8x7b"):
        sources.model_config("mixtral8x7b")


def test_calibration_and_task_revisions(tmp_path, monkeypatch):
    assets = tmp_path / "assets"
    for domain, text in (("wiki", b"a"), ("code", b"b")):
        (assets / "text" / domain).mkdir(parents=True)
        (assets / "text" / domain / "calibration.jsonl").write_bytes(text)
        (assets / "text" / domain / "validation.jsonl").write_bytes(text * 2)
    (assets / "tasks").mkdir()
    (assets / "tasks/cloze.yaml").write_text("task: cloze")
    (assets / "tasks/cloze.jsonl").write_text("{}")
    monkeypatch.setattr("espalier.inputs.assets.ROOT", assets)

    def embedded(*domains):
        return sources.calibration_revision({"name": "e", "source": "embedded", "domains": list(domains)})

    assert embedded("wiki") != embedded("code") != embedded("wiki", "code")
    tokens = tmp_path / "tokens.npz"
    tokens.write_bytes(b"ids")
    found = sources.calibration_revision({"name": "file", "source": "file", "path": str(tokens)})
    assert found == "sha256:" + hashlib.sha256(b"ids").hexdigest()[:40]
    assert sources.calibration_revision({"name": "c4", "source": "hub", "revision": None}) is None
    assert sources.task_revision("perplexity_wiki") != sources.task_revision("perplexity_code")
    first = sources.task_revision("cloze")
    (assets / "tasks/cloze.jsonl").write_text('{"more": 1}')
    assert sources.task_revision("cloze") != first
    assert sources.task_revision("hellaswag").startswith("lm_eval==")
    for calibration, message in (
        ({"name": "f", "source": "file", "path": str(tmp_path / "none")}, "no such file"),
        ({"name": "h", "source": "hub", "revision": "main"}, "espalier pin h"),
        ({"name": "s", "source": "hob"}, "did you mean hub"),
        ({"name": "e", "source": "embedded", "domains": ["wikki"]}, "Known texts: code, wiki"),
    ):
        with pytest.raises(UserError, match=message):
            sources.calibration_revision(calibration)


@pytest.mark.parametrize("name", ["mixtral_8x7b", "qwen3_30b_a3b", "embedded_moe", "smollm2_135m"])
def test_no_commit_is_made_up(name):
    revision = conf.load("model", name)["revision"]
    assert revision is None or hub.COMMIT.fullmatch(revision)


def test_a_task_of_ones_own_is_its_yaml_and_the_data_that_it_names(tmp_path, monkeypatch):
    folder = tmp_path / "conf/task"
    folder.mkdir(parents=True)
    (tmp_path / "conf/config.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    data = {"train": "../shots.jsonl", "validation": ["a.jsonl", "b.jsonl"]}
    text = json.dumps({"task": "mine", "dataset_kwargs": {"data_files": data}})  # JSON is YAML
    (folder / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=r"mine\.yaml: data_files names .*shots\.jsonl, which is not there"):
        sources.task_revision("mine")
    for name in ("../shots", "a", "b"):
        (folder / f"{name}.jsonl").write_text("{}\n")
    first = sources.task_revision("mine")
    assert first.startswith("sha256:")
    for name in ("../shots", "a", "b"):
        (folder / f"{name}.jsonl").write_text('{"more": 1}\n')
        assert sources.task_revision("mine") != first
        (folder / f"{name}.jsonl").write_text("{}\n")
    assert sources.task_revision("mine") == first
    assert sources.task_items("mine") == folder / "../shots.jsonl"
    assert sources.own_task("hellaswag") == []
    (folder / "mine.yaml").write_text("task: thine")
    with pytest.raises(UserError, match=r"mine\.yaml: does not say `task: mine`"):
        sources.task_revision("mine")
    (folder / "maths_choice.yaml").write_text("task: maths_choice")
    with pytest.raises(UserError, match=r"the package has a task 'maths_choice'. Give yours another name"):
        sources.task_revision("maths_choice")


def test_a_misspelt_task_is_told_when_the_experiment_is_read(tmp_path, monkeypatch):
    class Index:  # of lm-eval's 14,000 files, which takes 10 s
        all_tasks = ("arc_challenge", "boolq", "named in a list")

        def __init__(self, include_defaults: bool) -> None:
            assert include_defaults

    monkeypatch.setattr("lm_eval.tasks.TaskManager", Index)
    with pytest.raises(UserError, match=r"task 'arc_chalenge' is neither .* did you mean arc_challenge"):
        expand("demo", ["evaluation.tasks=[arc_chalenge]"], Store(tmp_path, dry=True))
    assert sources.task_revision("named in a list").startswith("lm_eval==")


def test_names_of_lm_evals_tasks_are_found_without_its_index(monkeypatch):
    monkeypatch.setattr("lm_eval.tasks.TaskManager", None)
    for name in ("arc_challenge", "mmlu", "mmlu_abstract_algebra", "wikitext", "openbookqa", "rte", "gsm8k", "piqa"):
        assert sources.task_revision(name).startswith("lm_eval=="), name
