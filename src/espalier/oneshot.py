"""Compress one model with one method in one call: tokens, collect, plan and apply without a pipeline."""

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from espalier import conf, methods, sources
from espalier.checkpoint import Checkpoint
from espalier.errors import UserError, nearest
from espalier.methods import Method
from espalier.partial import check_disk, refuse_existing
from espalier.plan import Plan, survivors
from espalier.progress import Progress
from espalier.running import Running
from espalier.shape import ModelShape
from espalier.stats import Stats

Tokens = tuple[Any, Any, dict[str, Any]]  # input_ids [N, L], attention_mask [N, L] or None, facts


@dataclass(frozen=True)
class Step:
    """One method with its settings; `config` is what its YAML and the caller said."""

    config: dict[str, Any]
    method: Method

    @property
    def name(self) -> str:
        return str(self.config["name"])

    def check(self, shape: ModelShape) -> None:
        """Raise UserError when the ratio does not fit the model, before any weight is read."""
        ratio = getattr(self.method, "ratio", None)
        if ratio is not None:
            survivors(ratio, shape, f"conf/method/{self.name}.yaml")


def compress(
    model: str | Path,
    method: str,
    calibration: str | Path,
    out: str | Path,
    *,
    then: str | None = None,
    dtype: str | None = None,
    batch_size: int = 8,
    device: str | None = None,
    stream: str = "auto",
    keep_work: bool = False,
    prove: bool = True,
    results: str | Path = "results",
    progress: Progress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Write a compressed copy of a model into `out`, with its `plan.json`, and return a report.

    `model`: a name of conf/model, a local directory, or `org/name@COMMIT`. `method`: a name of conf/method, whose
    keys `settings` override. `then`: a second method on top of what the first leaves, with keys `then.KEY`.
    `calibration`: a name of conf/calibration, a file of tokens or of text. `dtype` the forward pass runs in
    (default: the model's own). `batch_size` in sequences. `device`: `cpu`, `cuda`, default the first GPU, else the
    processor. `stream`: `auto` loads the model whole where it fits into memory, else one decoder layer at a time;
    `always`, `never`; a streamed calibration pass that is killed is continued by the same call. Hub models are kept
    in `{results}/models`. `keep_work` keeps tokens, statistics and plans in `{out}.work`. `prove=False` leaves out
    the proof that the output loads and computes what the plan says.

    UserError, before the model is loaded where it can be known: `out` exists, an unknown name or key, a dense or
    unknown model, a ratio that leaves too few experts, tokens that do not fit the model, too small a disk.
    Nothing is left behind by a failure.
    """
    out, results = Path(out), Path(results)
    refuse_existing(out)
    steps = make_steps(method, then, settings)
    tell = progress or (lambda what, done, total: None)
    model_config = sources.model_config(str(model))
    id, started = str(model_config["id"]), time.monotonic()
    source = sources.resolve(id, model_config.get("revision"), results, lambda line: tell(line, 0, 0))
    shape = Checkpoint(source).shape()
    for step in steps:
        step.check(shape)
    _check_space(source, steps, out)
    calibration_config = calibration_of(str(calibration))
    ids, mask, facts = _tokens(calibration_config, source)
    identity = {"id": id, "revision": _revision(id, model_config.get("revision"), results), "family": shape.family}
    card: dict[str, Any] = {"calibration": None}
    if any(step.method.probes for step in steps):
        name = Path(calibration_config.get("path") or calibration_config["name"]).name
        card["calibration"] = f"{name}, {ids.shape[0]} sequences of {ids.shape[1]} tokens"
    computed = str(dtype or model_config.get("dtype", "auto"))
    running = Running.of(device=device or "auto", stream=stream, collect_batch_size=batch_size)
    reports = []
    with _work_folder(out, keep_work) as work:
        current = source
        for n, step in enumerate(steps):
            state = out.with_name(f".{out.name}.collect-{n}")
            stats = _collect(step, current, (ids, mask, facts), computed, running, state, tell)
            plan = _plan(step, stats, current, identity)
            if keep_work:
                _keep(work, f"{n}-{step.name}", stats, plan, (ids, mask, facts))
            last = n == len(steps) - 1
            target = out if last else work / f"{n}-{step.name}"
            reports.append(_apply(current, plan, target, card, last and prove, running.apply_workers, tell))
            current = target
    return {
        "out": str(out),
        "model": identity,
        "methods": [{k: v for k, v in step.config.items() if k != "_target_"} for step in steps],
        "calibration": facts,
        "counts": Plan.load(out / "plan.json").counts,
        "source_parameters": shape.total_parameters,
        "apply": reports,
        "seconds": round(time.monotonic() - started, 1),
    }


def make_steps(method: str, then: str | None, settings: dict[str, Any]) -> list[Step]:
    """Build the methods; keys that start with `then.` belong to the second.

    UserError for an unknown method or key, or `then.` keys without a second method.
    """
    first = {key: value for key, value in settings.items() if not key.startswith("then.")}
    second = {key.removeprefix("then."): value for key, value in settings.items() if key.startswith("then.")}
    if second and then is None:
        raise UserError(f"then.{next(iter(second))}: no second method is named. Add --then NAME.")
    return [_step(name, own) for name, own in ((method, first), (then, second)) if name is not None]


def _step(name: str, settings: dict[str, Any]) -> Step:
    config = conf.load("method", name)
    if "_target_" not in config:
        raise UserError(
            f"method={name}: leaves the model as it is. {nearest(name, [n for n in conf.names('method') if n != name])}"
        )
    for key in ("name", "_target_"):
        if key in settings:
            raise UserError(f"conf/method/{name}.yaml: key {key!r} cannot be set here.")
    merged = config | settings
    return Step(merged, methods.build(merged))


def calibration_of(name: str) -> dict[str, Any]:
    """Return a calibration's configuration: conf/calibration/NAME.yaml, or that of a file of tokens or text."""
    if name in conf.names("calibration"):
        return conf.load("calibration", name)
    path = Path(name).expanduser()
    if path.is_file():
        return conf.load("calibration", "file") | {"path": str(path.resolve())}
    known = nearest(name, conf.names("calibration"))
    raise UserError(f"calibration={name}: no conf/calibration/{name}.yaml and no such file; {known}.")


def _check_space(source: Path, steps: list[Step], out: Path) -> None:
    from espalier.estimate import checkpoint_bytes

    needed = checkpoint_bytes(source, [getattr(step.method, "ratio", None) for step in steps])
    check_disk(out, needed)


def _tokens(calibration: dict[str, Any], source: Path) -> Tokens:
    from espalier import tokens

    path = Path(str(calibration.get("path")))
    if calibration["source"] == "file" and path.suffix in tokens.TOKEN_FILES:
        return tokens.load_tokens(path, int(Checkpoint(source).config["vocab_size"]))
    return tokens.make_tokens(calibration, source)


def _revision(id: str, revision: str | None, results: Path) -> str | None:
    """The content identity of the model, for plan.json; hashes are only remembered where results exist already."""
    if sources.is_local(id) and not results.exists():
        from espalier.store import content_revision

        return content_revision(Path(id).expanduser())
    return sources.revision_of(id, revision, results)


def _collect(
    step: Step, source: Path, tokens: Tokens, dtype: str, running: Running, state: Path, tell: Progress
) -> Stats:
    if not step.method.probes:
        return Stats.empty(Checkpoint(source).shape())
    from espalier.collect import collect_checkpoint

    ids, mask, _ = tokens
    tell(f"{step.name}: loading {source}", 0, 0)
    progress = _named(tell, f"{step.name}: collect")
    try:
        stats = collect_checkpoint(
            source, dtype, running, ids, mask, step.method.probes, state=state, progress=progress
        )
    except Exception:  # an interruption leaves it, and the same call then continues
        shutil.rmtree(state, ignore_errors=True)
        raise
    shutil.rmtree(state, ignore_errors=True)
    return stats


def _plan(step: Step, stats: Stats, source: Path, identity: dict[str, Any]) -> Plan:
    shape = Checkpoint(source).shape()
    return step.method.plan(stats, shape).check(shape).identified(identity, shape)


def _apply(
    source: Path, plan: Plan, out: Path, card: dict[str, Any], prove: bool, workers: int, tell: Progress
) -> dict[str, Any]:
    from espalier.apply import apply

    progress = _named(tell, f"{plan.method['name']}: apply")
    return apply(source, plan, out, prove=prove, card=card, progress=progress, workers=workers)


def _named(tell: Progress, what: str) -> Callable[[int, int], None]:
    return lambda done, total: tell(what, done, total)


def _keep(work: Path, name: str, stats: Stats, plan: Plan, tokens: Tokens) -> None:
    from espalier.tokens import save_tokens

    save_tokens(work / "tokens.safetensors", *tokens)
    stats.save(work / f"{name}.stats.safetensors")
    plan.save(work / f"{name}.plan.json")


@contextlib.contextmanager
def _work_folder(out: Path, keep: bool) -> Iterator[Path]:
    """Yield a folder beside `out`, on the same disk; it goes away unless all went well and `keep` is set."""
    work = out.with_name(f".{out.name}.{os.getpid()}.work")
    made = [parent for parent in out.resolve().parents if not parent.exists()]
    work.mkdir(parents=True)
    try:
        yield work
        if keep:
            kept = out.with_name(f"{out.name}.work")
            shutil.rmtree(kept, ignore_errors=True)
            work.replace(kept)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if not out.exists():
            for parent in made:
                with contextlib.suppress(OSError):
                    parent.rmdir()
