"""Rewrite a checkpoint as a plan says: streamed shard by shard, every tensor accounted for, proven at the end."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from espalier.artefacts.partial import check_disk, code_version, resumable_directory
from espalier.checkpoints.checkpoint import Checkpoint
from espalier.checkpoints.shards import ShardWriter, default_workers
from espalier.errors import UserError
from espalier.machine import limits
from espalier.plans.plan import Plan
from espalier.plans.plan_tensors import fingerprint
from espalier.surgery.card import card_text
from espalier.surgery.rewrite import rewrite_of

# Weights in any form, and what apply writes itself.
NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".tmp", ".index.json")
OWN_FILES = ("config.json", "plan.json", "README.md")
CODE = (
    "modeling_espalier",
    "sparse_ffn.py",
    "sparse_router.py",
    "sparse_attention.py",
    "routed_depth.py",
    "ragged_cache.py",
)  # of a source that has been rewritten before
TEMPLATES = "additional_chat_templates"  # where transformers keeps those of a tokenizer that has several
TENSORS = "plan/tensors.safetensors"  # not beside the shards: vLLM takes every safetensors file there for weights

Progress = Callable[[int, int], None]


def apply(
    source: Path,
    plan: Plan,
    out: Path,
    *,
    replace: bool = False,
    prove: bool = True,
    card: dict[str, Any] | None = None,
    progress: Progress | None = None,
    workers: int | None = None,
) -> dict[str, Any]:
    """Write the checkpoint that `plan` makes of `source` to the directory `out`.

    Tensors are streamed: memory holds a merged tensor and one member at a time in each of `workers` threads
    (default: as many as cores, at most 4). `card` gives the model card `calibration`, `scores` and `node`;
    `progress` hears (bytes done, bytes in all). `plan.json` in `out` is composed with the source's own where it
    has one. Shards that a killed run of the same call finished are kept.

    Returns `counts` (parameters), `tensors` (source tensors copied, transformed, dropped; written), `bytes`,
    `shards`, `loads_in`, `seconds` and `proof`: maximum difference of logits and tolerance, `skipped` with the
    reason, or None when not asked for. UserError when the plan does not fit the model, a weight is NaN or
    infinite, `out` exists or is being written, the disk has no room, or the proof fails; then nothing is left at `out`.
    A proof that the system ended, or that had too little memory or disk, has not failed: the shards stay.
    """
    start = time.monotonic()
    checkpoint = Checkpoint(source)
    shape = checkpoint.any_shape()
    if out.resolve() == source.resolve():
        raise UserError(f"{out}: is the source itself. Choose another output directory.")
    plan = dataclasses.replace(plan.check(shape), counts=plan.parameter_counts(shape))
    before = Plan.load(source / "plan.json") if (source / "plan.json").exists() else None
    whole = before.then(plan) if before is not None else plan
    rewrite = rewrite_of(checkpoint, plan)
    shipped = bool(rewrite.code)
    writer = ShardWriter(rewrite.shards)
    beside = side_files(source)
    check_disk(out, writer.nbytes + sum(path.stat().st_size for path in beside))
    identity = {
        "source": [str(source.resolve()), checkpoint.fingerprint],
        "plan": [plan.document()["layers"], fingerprint(plan.tensors)],
        "layout": writer.layout(),
        "code": code_version(),
    }
    with resumable_directory(out, identity, replace) as directory:
        files = writer.write(directory, progress, workers or default_workers(), resume=True)
        copy_beside(source, beside, directory)
        (directory / "config.json").write_text(json.dumps(rewrite.config, indent=2, sort_keys=True) + "\n")
        whole.save(directory / "plan.json", TENSORS)
        (directory / "README.md").write_text(card_text(source, whole, card or {}, sorted(rewrite.code)))
        for name, text in rewrite.code.items():
            (directory / name).write_text(text)
        written = writer.check(directory).parameters
        if written != plan.counts["stored"]:
            raise RuntimeError(f"{directory}: {written} parameters on disk, plan: {plan.counts['stored']:.0f}")
        proof = _proof(checkpoint, directory, out, plan if before is not None else None) if prove else None
    return {
        "counts": plan.counts,
        "tensors": rewrite.fates,
        "bytes": writer.nbytes,
        "shards": len(files),
        "loads_in": "transformers with trust_remote_code" if shipped else "stock transformers",
        "seconds": round(time.monotonic() - start, 3),
        "proof": proof,
    }


def side_files(source: Path) -> list[Path]:
    """Return the tokenizer, generation config, licence and other small files that go along unchanged."""
    own = [
        path
        for path in sorted(source.iterdir())
        if path.is_file() and path.name not in OWN_FILES and not path.name.startswith((".", *CODE))
        and not path.name.endswith(NOT_COPIED)
    ]  # fmt: skip
    return [*own, *chat_templates(source)]


def chat_templates(source: Path) -> list[Path]:
    """Return the chat templates that lie in a folder of their own."""
    return sorted((source / TEMPLATES).glob("*.jinja"))


def copy_beside(source: Path, paths: Iterable[Path], directory: Path) -> None:
    """Copy files below `source` to the same places below `directory`."""
    for path in paths:
        target = directory / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)


def _proof(checkpoint: Checkpoint, directory: Path, out: Path, step: Plan | None) -> dict[str, Any]:
    """Prove `directory`, which is to become `out`; `step` is the plan from the source on when plan.json says more."""
    free = limits.free_memory()
    # The source in its own dtype, then in fp32, beside what Python and torch take.
    whole = sum(entry.nbytes for entry in checkpoint.entries.values()) + checkpoint.parameters * 4 + 5e8
    if whole <= free:
        return _prove(checkpoint, directory, out, step, [])
    # One decoder layer at a time in fp32, up to three times while a plan changes it, and what lies outside of them.
    outside = sum(entry.size for name, entry in checkpoint.entries.items() if ".layers." not in name)
    layer = (checkpoint.parameters - outside) / int(checkpoint.config["num_hidden_layers"])
    streamed = 4 * (3 * layer + outside) + 5e8
    if streamed <= free:
        return _prove(checkpoint, directory, out, step, ["--streamed"])
    return {"skipped": f"needs about {streamed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB available"}


def _prove(checkpoint: Checkpoint, directory: Path, out: Path, step: Plan | None, options: list[str]) -> dict[str, Any]:
    """Run `espalier.surgery.prove` with `options` in a fresh process; UserError when it fails.

    OSError when it came to no end, for want of memory or disk or by a signal.
    """
    with tempfile.TemporaryDirectory() as scratch:
        argv = [sys.executable, "-m", "espalier.surgery.prove", *options, str(checkpoint.directory), str(directory)]
        if step is not None:
            step.save(Path(scratch) / "plan.json")
            argv.append(str(Path(scratch) / "plan.json"))
        path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
        # An own cache of trusted code: the temporary directory's name would stay in the user's.
        own = {"PYTHONPATH": path, "HF_MODULES_CACHE": scratch, "HF_HUB_OFFLINE": "1"}
        run = subprocess.run(argv, env=os.environ | own, capture_output=True, text=True)
    try:
        report: dict[str, Any] = json.loads(run.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        report = {"error": (run.stderr.strip().splitlines() or ["no output"])[-1]}
    if run.returncode < 0 or report.get("short"):
        what = f"signal {-run.returncode}, which systems send where memory is short"
        ended = f"its proof was ended by {report['error'] if report.get('short') else what}"
        raise OSError(errno.EINTR, ended, str(out))
    if "error" in report or run.returncode:
        raise UserError(
            f"{out}: the written checkpoint failed its proof: {report.get('error', run.returncode)}. Nothing was kept; "
            f"the command was `{' '.join([*argv[1:3], *options])} SOURCE OUT`. Please report it with plan.json."
        )
    return report
