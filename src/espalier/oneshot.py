"""Compress one model with one method in one call: tokens, collect, plan and apply without a pipeline."""

import hashlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from espalier import conf, methods
from espalier.artefacts.partial import check_disk, code_version, refuse_existing, resumable_work, work_folder
from espalier.artefacts.store import read_json, write_json
from espalier.checkpoints.checkpoint import Checkpoint
from espalier.collecting.stats import Stats
from espalier.errors import UserError, nearest
from espalier.inputs import sources
from espalier.methods import AnyMethod
from espalier.models.running import Running
from espalier.plans.plan import Plan
from espalier.progress import Progress
from espalier.training.fit_settings import Fitting

STEP = "espalier.step/1"
Tokens = tuple[Any, Any, dict[str, Any]]  # input_ids [N, L], attention_mask [N, L] or None, facts


@dataclass(frozen=True)
class Step:
    """One method with its settings; `config` is what its YAML and the caller said."""

    config: dict[str, Any]
    method: AnyMethod
    base: Path | None = None  # the second model of a method that compares two

    @property
    def name(self) -> str:
        return str(self.config["name"])

    def check(self, shape: methods.Shape) -> None:
        """Raise UserError when the method does not fit the model, before any weight is read."""
        methods.check(self.method, shape, None)


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
    `always`, `never`. Hub models are kept in `{results}/models`. `keep_work` keeps tokens, statistics and plans in
    `{out}.work`. `prove=False` leaves out the proof that the output loads and computes what the plan says.

    UserError, before the model is loaded where it can be known: `out` exists, an unknown name or key, a dense or
    unknown model, a ratio that leaves too few experts, tokens that do not fit the model, too small a disk, another
    run at work on `out`. Nothing is left behind by such an error.

    After a kill, an interrupt or a full disk the same call goes on: finished steps, passes over the calibration,
    layers of a streamed pass and shards are not made again. Until then they lie hidden beside `out`.
    """
    out, results = Path(out), Path(results)
    if not work_folder(out).exists():  # else what an interrupted run left is removed first
        refuse_existing(out)
    steps = make_steps(method, then, settings)
    tell = progress or (lambda what, done, total: None)
    model_config = sources.model_config(str(model))
    id, started = str(model_config["id"]), time.monotonic()
    source = sources.resolve(id, model_config.get("revision"), results, lambda line: tell(line, 0, 0))
    shape = Checkpoint(source).any_shape()
    for step in steps:
        step.check(shape)
    steps = [_with_base(step, results, tell) for step in steps]
    _check_space(source, steps, out)
    calibration_config = calibration_of(str(calibration))
    ids, mask, facts = _tokens(calibration_config, source)
    methods.check(steps[0].method, shape, int(ids.size if mask is None else mask.sum()))
    identity = {"id": id, "revision": _revision(id, model_config.get("revision"), results), "family": shape.family}
    card: dict[str, Any] = {"calibration": None}
    if any(methods.evidence_of(step.method) for step in steps):
        name = Path(calibration_config.get("path") or calibration_config["name"]).name
        card["calibration"] = f"{name}, {ids.shape[0]} sequences of {ids.shape[1]} tokens"
    computed = str(dtype or model_config.get("dtype", "auto"))
    running = Running.of(device=device or "auto", stream=stream, collect_batch_size=batch_size)
    run = _Run(identity, (ids, mask, facts), computed, running, card, tell)
    with resumable_work(out, run.key(source, steps)) as work:
        reports = run.chain(source, steps, work, out, prove)
        if keep_work:
            _keep(work, out.with_name(f"{out.name}.work"), run.tokens)
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


def _with_base(step: Step, results: Path, tell: Progress) -> Step:
    """Fetch the second model of a method that compares two."""
    base = methods.base_of(step.method)
    if base is None:
        return step
    model = sources.model_config(base)
    directory = sources.resolve(str(model["id"]), model.get("revision"), results, lambda line: tell(line, 0, 0))
    return replace(step, base=directory)


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
    from espalier.costs.estimate import checkpoint_bytes

    needed = checkpoint_bytes(source, [getattr(step.method, "ratio", None) for step in steps])
    check_disk(out, needed, work=True)


def _tokens(calibration: dict[str, Any], source: Path) -> Tokens:
    from espalier.inputs import tokens

    path = Path(str(calibration.get("path")))
    if calibration["source"] == "file" and path.suffix in tokens.TOKEN_FILES:
        return tokens.load_tokens(path, int(Checkpoint(source).config["vocab_size"]))
    return tokens.make_tokens(calibration, source)


def _revision(id: str, revision: str | None, results: Path) -> str | None:
    """The content identity of the model, for plan.json; hashes are only remembered where results exist already."""
    if sources.is_local(id) and not results.exists():
        from espalier.artefacts.store import content_revision

        return content_revision(Path(id).expanduser())
    return sources.revision_of(id, revision, results)


@dataclass(frozen=True)
class _Run:
    """What all steps of a call share, and how they are done; what a step has made is not made again."""

    identity: dict[str, Any]  # of the model: id, revision, family
    tokens: Tokens
    dtype: str
    running: Running
    card: dict[str, Any]
    tell: Progress

    def key(self, source: Path, steps: list[Step]) -> dict[str, Any]:
        """Return the JSON object that determines every file of the work folder."""
        arrays = [np.ascontiguousarray(array).tobytes() for array in self.tokens[:2] if array is not None]
        running = self.running
        return {
            "source": [str(source.resolve()), Checkpoint(source).fingerprint],
            "model": self.identity,
            "tokens": hashlib.sha256(b"".join(arrays)).hexdigest(),
            "steps": [step.config for step in steps],
            "bases": [Checkpoint(step.base).fingerprint for step in steps if step.base is not None],
            # How the tokens are cut into batches and where they run decides about rounding.
            "running": [self.dtype, running.torch_device(), running.stream, running.collect_batch_size],
            "card": self.card,
            "code": code_version(),
        }

    def chain(self, source: Path, steps: list[Step], work: Path, out: Path, prove: bool) -> list[dict[str, Any]]:
        """Do the steps, the last into `out`, the others into `work`; return what `apply` says of each."""
        reports = []
        for n, step in enumerate(steps):
            name, last = work / f"{n}-{step.name}", n == len(steps) - 1
            done = name.with_suffix(".done.json")
            if done.exists():
                reports.append(read_json(done, STEP)["apply"])
            else:
                plan = self._plan(step, source, name)
                reports.append(self._apply(source, plan, out if last else name, not last, last and prove))
                if not last:
                    write_json(done, {"format": STEP, "apply": reports[-1]})
            source = name
        return reports

    def _plan(self, step: Step, source: Path, name: Path) -> Plan:
        kept, shape = name.with_suffix(".plan.json"), Checkpoint(source).any_shape()
        if kept.exists():
            return Plan.load(kept)
        if methods.is_sequential(step.method):
            plan = self._plan_sequentially(step, source)
        else:
            plan = methods.make_plan(step.method, self._evidence(step, source, name), shape, source, step.base)
        plan.identified(self.identity, shape).save(kept)
        return Plan.load(kept)  # its tensors are read from the file from now on

    def _plan_sequentially(self, step: Step, source: Path) -> Plan:
        from espalier.collecting.sequential import SequentialMethod, plan_sequentially

        progress = _named(self.tell, f"{step.name}: layers")
        method = cast(SequentialMethod, step.method)
        return plan_sequentially(method, source, self.dtype, self.running, *self.tokens[:2], progress=progress)

    def _evidence(self, step: Step, source: Path, name: Path) -> Stats:
        """Return what was collected and what was learnt, together."""
        fitting = methods.fit_of(step.method)
        paths = [self._collect(step, source, name)] if step.method.probes or fitting is None else []
        if fitting is not None:
            paths.append(self._fit(step, fitting, source, name))
        return Stats.load(*paths)

    def _fit(self, step: Step, fitting: Fitting, source: Path, name: Path) -> Path:
        from espalier.training.fit import fit, save_fit

        kept, state = name.with_suffix(".fit.safetensors"), name.with_suffix(".training")
        if not kept.exists():
            ids, mask, _ = self.tokens
            progress = _named(self.tell, f"{step.name}: fit")
            stats, curve = fit(source, fitting, ids, mask, self.running, state, dtype=self.dtype, progress=progress)
            save_fit(kept, stats, fitting, curve)
            shutil.rmtree(state, ignore_errors=True)
        return kept

    def _collect(self, step: Step, source: Path, name: Path) -> Path:
        kept, state = name.with_suffix(".stats.safetensors"), name.with_suffix(".partial")
        if kept.exists():
            return kept
        if not step.method.probes:
            stats = Stats.empty(Checkpoint(source).any_shape())
        else:
            from espalier.collecting.collect import collect_checkpoint

            ids, mask, _ = self.tokens
            self.tell(f"{step.name}: loading {source}", 0, 0)
            progress = _named(self.tell, f"{step.name}: collect")
            stats = collect_checkpoint(
                source, self.dtype, self.running, ids, mask, step.method.probes, state=state, progress=progress
            )
        stats.save(kept)
        shutil.rmtree(state, ignore_errors=True)
        return kept

    def _apply(self, source: Path, plan: Plan, out: Path, replace: bool, prove: bool) -> dict[str, Any]:
        from espalier.surgery.apply import apply

        progress = _named(self.tell, f"{plan.method['name']}: apply")
        workers = self.running.apply_workers
        return apply(
            source, plan, out, replace=replace, prove=prove, card=self.card, progress=progress, workers=workers
        )


def _named(tell: Progress, what: str) -> Callable[[int, int], None]:
    return lambda done, total: tell(what, done, total)


def _keep(work: Path, kept: Path, tokens: Tokens) -> None:
    """Put the steps' plans, statistics and checkpoints, with the tokens, into the folder `kept`."""
    from espalier.inputs.tokens import save_tokens

    save_tokens(work / "tokens.safetensors", *tokens)
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir()
    for path in sorted(work.iterdir()):
        if not path.name.startswith(".") and not path.name.endswith(".done.json"):
            path.replace(kept / path.name)
