"""Rewrite a checkpoint as a plan says: streamed shard by shard, every tensor accounted for, proven at the end."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier.card import card_text
from espalier.checkpoint import Checkpoint
from espalier.errors import UserError
from espalier.layout import BlockLayout, block_layout, source_layout
from espalier.partial import check_disk, code_version, resumable_directory
from espalier.plan import Plan, Skip
from espalier.shards import OutputTensor, ShardWriter, default_workers

if TYPE_CHECKING:
    import torch

CODE = "modeling_espalier.py"
CLASS = "EspalierForCausalLM"
STOCK_IMPORT = "from transformers import MixtralForCausalLM as StockForCausalLM"
# Weights in any form, and what apply writes itself.
NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".tmp", ".index.json")
OWN_FILES = ("config.json", "plan.json", "README.md", CODE)

Progress = Callable[[int, int], None]
Layouts = dict[int, BlockLayout]
Members = list[tuple[str, int | None, float]]  # a tensor, its row (None: all of it), its weight


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
    """
    start = time.monotonic()
    checkpoint = Checkpoint(source)
    shape = checkpoint.shape()
    if out.resolve() == source.resolve():
        raise UserError(f"{out}: is the source itself. Choose another output directory.")
    plan = dataclasses.replace(plan.check(shape), counts=plan.parameter_counts(shape))
    before = Plan.load(source / "plan.json") if (source / "plan.json").exists() else None
    whole = before.then(plan) if before is not None else plan
    layouts = _layouts(checkpoint, plan)
    config = _config(checkpoint, layouts)
    shipped = "espalier" in config
    shards, tensors = _outputs(checkpoint, layouts)
    writer = ShardWriter(shards)
    beside = side_files(source)
    check_disk(out, writer.nbytes + sum(path.stat().st_size for path in beside))
    identity = {
        "source": [str(source.resolve()), checkpoint.fingerprint],
        "plan": plan.document()["layers"],
        "layout": writer.layout(),
        "code": code_version(),
    }
    with resumable_directory(out, identity, replace) as directory:
        files = writer.write(directory, progress, workers or default_workers(), resume=True)
        for path in beside:
            shutil.copyfile(path, directory / path.name)
        (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        whole.save(directory / "plan.json")
        (directory / "README.md").write_text(card_text(source, whole, card or {}, shipped))
        if shipped:
            (directory / CODE).write_text(_code(checkpoint.family.architecture))
        written = writer.check(directory).parameters
        if written != plan.counts["stored"]:
            raise RuntimeError(f"{directory}: {written} parameters on disk, plan: {plan.counts['stored']:.0f}")
        proof = _proof(checkpoint, directory, out, plan if before is not None else None) if prove else None
    return {
        "counts": plan.counts,
        "tensors": tensors,
        "bytes": writer.nbytes,
        "shards": len(files),
        "loads_in": "transformers with trust_remote_code" if shipped else "stock transformers",
        "seconds": round(time.monotonic() - start, 3),
        "proof": proof,
    }


def _layouts(checkpoint: Checkpoint, plan: Plan) -> Layouts:
    settings = checkpoint.config.get("espalier", {}).get("layers", {})
    if settings and not all(isinstance(o, Skip) for operations in plan.layers.values() for o in operations):
        raise UserError(
            f"{checkpoint.directory}: was merged with router=remap, skips experts or differs in experts by layer; only "
            "skip can be added. Make one plan for the base model instead."
        )
    return {
        layer: block_layout(layer, source_layout(experts, settings.get(str(layer))), plan.layers.get(layer, ()))
        for layer, experts in checkpoint.expert_counts.items()
    }


def _config(checkpoint: Checkpoint, layouts: Layouts) -> dict[str, Any]:
    """Return the new config.json; it has the key `espalier` when a stock model cannot stand for the result."""
    family = checkpoint.family
    experts = max(family.least_experts, *(len(block.slots) for block in layouts.values()))
    config = family.resize(checkpoint.config, experts)
    if any(block.needs_code(experts) for block in layouts.values()):
        renormalise = family.renormalise(config)
        config["architectures"] = [CLASS]
        config["auto_map"] = {"AutoModelForCausalLM": f"{CODE.removesuffix('.py')}.{CLASS}"}
        config["espalier"] = {
            "format": "espalier.blocks/1",
            "module": family.module,
            "router": family.router_module,
            "layers": {str(layer): block.settings(renormalise) for layer, block in layouts.items()},
        }
    return config


def _outputs(checkpoint: Checkpoint, layouts: Layouts) -> tuple[list[list[OutputTensor]], dict[str, int]]:
    """Return the tensors to write, by source shard, and how many of the source's had which fate.

    A stored expert goes to the shard of its first part. UserError for a tensor that is missing or that the
    family does not know.
    """
    family = checkpoint.family
    experts = {
        name: (layer, expert, part)
        for layer, number in checkpoint.expert_counts.items()
        for expert in range(number)
        for part, name in enumerate(family.expert_tensors(layer, expert))
    }
    stacks = {name: layer for layer in layouts for name in family.stacked_tensors(layer)}
    routers = {name: (layer, dim) for layer in layouts for name, dim in family.router_tensors(layer).items()}
    unknown = tuple(prefix for layer in layouts for prefix in family.block_prefixes(layer))
    for name in (*experts, *stacks, *routers):
        if name not in checkpoint.entries:
            raise UserError(f"{checkpoint.directory}: tensor {name} is missing. Download the model again.")
    copied = transformed = 0
    shards: list[list[OutputTensor]] = []
    for file in checkpoint.files:
        shard: list[OutputTensor] = []
        for name in checkpoint.tensors_of(file):
            if name in experts:
                layer, expert, part = experts[name]
                made, used = _expert_outputs(checkpoint, layouts[layer], layer, expert, part)
                shard += made
                copied += used == "copied"
                transformed += used == "transformed"
            elif name in stacks:
                output, used = _stacked_output(checkpoint, layouts[stacks[name]], name)
                shard.append(output)
                copied += used == "copied"
                transformed += used == "transformed"
            elif name in routers:
                layer, dim = routers[name]
                made, used = _router_outputs(checkpoint, layouts[layer], layer, name, dim)
                shard += made
                copied += used == "copied"
                transformed += used == "transformed"
            elif name.startswith(unknown):
                raise UserError(f"{checkpoint.directory}: tensor {name} is unknown to family {family.model_type}.")
            else:
                shard.append(_output(checkpoint, name, name))
                copied += 1
        shards.append(shard)
    dropped = len(checkpoint.entries) - copied - transformed
    written = sum(map(len, shards))
    return shards, {"copied": copied, "transformed": transformed, "dropped": dropped, "written": written}


def _output(checkpoint: Checkpoint, name: str, source: str) -> OutputTensor:
    entry = checkpoint.entries[source]
    return OutputTensor(name, entry.dtype, entry.shape, lambda: [checkpoint.finite_tensor(source)])


def _expert_outputs(
    checkpoint: Checkpoint, block: BlockLayout, layer: int, expert: int, part: int
) -> tuple[list[OutputTensor], str]:
    """Return the stored tensors that begin with this source tensor, and its fate."""
    family = checkpoint.family
    made = []
    for slot, parts in enumerate(block.slots):
        if parts[0][0] != expert:
            continue
        name = family.expert_tensors(layer, slot)[part]
        members: Members = [(family.expert_tensors(layer, e)[part], None, weight) for e, weight in parts]
        output = _output(checkpoint, name, members[0][0])
        if parts != ((expert, 1.0),):
            output = dataclasses.replace(output, make=partial(_weighted_sum, checkpoint, members))
        made.append(output)
    uses = [parts for parts in block.slots if any(e == expert for e, _ in parts)]
    if not uses:
        return made, "dropped"
    return made, "copied" if all(parts == ((expert, 1.0),) for parts in uses) else "transformed"


def _stacked_output(checkpoint: Checkpoint, block: BlockLayout, name: str) -> tuple[OutputTensor, str]:
    """Return the tensor of all stored experts, made one expert at a time, and the fate of the source's."""
    entry = checkpoint.entries[name]

    def make() -> "Iterator[torch.Tensor]":
        for parts in block.slots:
            members: Members = [(name, expert, weight) for expert, weight in parts]
            yield from _weighted_sum(checkpoint, members)

    same = block.slots == tuple(((expert, 1.0),) for expert in range(entry.shape[0]))
    output = OutputTensor(name, entry.dtype, (len(block.slots), *entry.shape[1:]), make)
    return output, "copied" if same else "transformed"


def _router_outputs(
    checkpoint: Checkpoint, block: BlockLayout, layer: int, name: str, dim: int
) -> tuple[list[OutputTensor], str]:
    """Return the router's tensor with the rows that stay of `dim`, with the first also the expert map, and its fate."""
    import torch

    output = _output(checkpoint, name, name)
    fate = "copied"
    if block.rows != tuple(range(output.shape[dim])):
        rows = torch.tensor(block.rows)
        shape = list(output.shape)
        shape[dim] = len(rows)
        output = dataclasses.replace(
            output, shape=tuple(shape), make=lambda: [checkpoint.finite_tensor(name).index_select(dim, rows)]
        )
        fate = "transformed"
    made = [output]
    if block.expert_map is not None and name == next(iter(checkpoint.family.router_tensors(layer))):
        map_name = checkpoint.family.expert_map_tensor(layer)
        made.append(OutputTensor(map_name, "I64", (len(block.rows),), lambda: [torch.tensor(block.expert_map)]))
    return made, fate


def _weighted_sum(checkpoint: Checkpoint, members: Members) -> "list[torch.Tensor]":
    """Return, in a list, the sum of the members in fp64, rounded once.

    The result has the dtype of the first one; a lone member of weight 1 stays as it is.
    """

    def read(name: str, row: int | None) -> "torch.Tensor":
        return checkpoint.finite_tensor(name) if row is None else checkpoint.rows(name, row)

    first, row, weight = members[0]
    tensor = read(first, row)
    if len(members) == 1 and weight == 1:
        return [tensor]
    total = tensor.double().mul_(weight)
    for name, row, weight in members[1:]:
        other = read(name, row)
        if other.shape != tensor.shape:
            raise UserError(f"{checkpoint.directory}: {name} {list(other.shape)} cannot be merged with {first}.")
        total += other.double().mul_(weight)  # not add_(alpha=): fused multiply-add differs by processor
    return [total.to(tensor.dtype)]


def _code(architecture: str) -> str:
    """Return the modelling file to ship, with the stock class it derives from."""
    text = (Path(__file__).parent / CODE).read_text()
    return text.replace(STOCK_IMPORT, STOCK_IMPORT.replace("MixtralForCausalLM", architecture))


def side_files(source: Path) -> list[Path]:
    """Return the tokenizer, generation config, licence and other small files that go along unchanged."""
    return [
        path
        for path in sorted(source.iterdir())
        if path.is_file() and path.name not in OWN_FILES and not path.name.startswith(".")
        and not path.name.endswith(NOT_COPIED)
    ]  # fmt: skip


def _proof(checkpoint: Checkpoint, directory: Path, out: Path, step: Plan | None) -> dict[str, Any]:
    """Prove `directory`, which is to become `out`; `step` is the plan from the source on when plan.json says more."""
    import psutil

    free = psutil.virtual_memory().available
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
    """Run `espalier.prove` with `options` in a fresh process; UserError when it fails."""
    with tempfile.TemporaryDirectory() as scratch:
        argv = [sys.executable, "-m", "espalier.prove", *options, str(checkpoint.directory), str(directory)]
        if step is not None:
            step.save(Path(scratch) / "plan.json")
            argv.append(str(Path(scratch) / "plan.json"))
        path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
        # An own cache of trusted code: the temporary directory's name would stay in the user's.
        own = {"PYTHONPATH": path, "HF_MODULES_CACHE": scratch, "HF_HUB_OFFLINE": "1"}
        run = subprocess.run(argv, env=os.environ | own, capture_output=True, text=True)
    try:
        report: dict[str, Any] = json.loads(run.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        report = {"error": (run.stderr.strip().splitlines() or ["no output"])[-1]}
    if "error" in report or run.returncode:
        raise UserError(
            f"{out}: the written checkpoint failed its proof: {report.get('error', run.returncode)}. Nothing was kept; "
            f"the command was `{' '.join([*argv[1:3], *options])} SOURCE OUT`. Please report it with plan.json."
        )
    return report
