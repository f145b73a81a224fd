"""Rewrite a checkpoint as a plan says: streamed shard by shard, every tensor accounted for, proven at the end."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier.card import card_text
from espalier.checkpoint import Checkpoint
from espalier.errors import UserError
from espalier.layout import BlockLayout, block_layout, source_layout
from espalier.plan import Plan, Skip
from espalier.shards import OutputTensor, ShardWriter
from espalier.store import atomic_directory

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


def apply(
    source: Path,
    plan: Plan,
    out: Path,
    *,
    replace: bool = False,
    prove: bool = True,
    card: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the checkpoint that `plan` makes of `source` to the directory `out`.

    Tensors are streamed: memory holds a merged tensor and one member at a time. `card` gives the model card
    `calibration`, `scores` and `node`; `progress` hears (bytes done, bytes in all). `plan.json` in `out` is
    composed with the source's own where it has one.

    Returns `counts` (parameters), `tensors` (source tensors copied, transformed, dropped; written), `bytes`,
    `shards`, `loads_in`, `seconds` and `proof`: maximum difference of logits and tolerance, `skipped` with the
    reason, or None when not asked for. UserError when the plan does not fit the model, a weight is NaN or
    infinite, `out` exists, the disk has no room, or the proof fails; then nothing is left at `out`.
    """
    start = time.monotonic()
    checkpoint = Checkpoint(source)
    shape = checkpoint.shape()
    if out.resolve() == source.resolve():
        raise UserError(f"{out}: is the source itself. Choose another output directory.")
    if "quantization_config" in checkpoint.config:
        raise UserError(f"{source / 'config.json'}: quantization_config: the weights are quantised. Dequantise first.")
    plan = dataclasses.replace(plan.check(shape), counts=plan.parameter_counts(shape))
    before = Plan.load(source / "plan.json") if (source / "plan.json").exists() else None
    whole = before.then(plan) if before is not None else plan
    layouts = _layouts(checkpoint, plan)
    config = _config(checkpoint, layouts)
    shipped = "espalier" in config
    shards, tensors = _outputs(checkpoint, layouts)
    writer = ShardWriter(shards)
    side_files = _side_files(source)
    _check_disk(out, writer.nbytes + sum(path.stat().st_size for path in side_files))
    with atomic_directory(out, replace) as directory:
        files = writer.write(directory, progress)
        for path in side_files:
            shutil.copyfile(path, directory / path.name)
        (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        whole.save(directory / "plan.json")
        (directory / "README.md").write_text(card_text(source, whole, card or {}, shipped))
        if shipped:
            (directory / CODE).write_text(_code(checkpoint.family.architecture))
        _check_written(directory, writer, plan)
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
    experts = max(len(block.slots) for block in layouts.values())
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
    routers = {name: layer for layer in layouts for name in family.router_tensors(layer)}
    unknown = tuple(f"{family.block.format(layer=layer)}.experts." for layer in layouts)
    for name in (*experts, *routers):
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
            elif name in routers:
                made, used = _router_outputs(checkpoint, layouts[routers[name]], routers[name], name)
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
        members = [(family.expert_tensors(layer, e)[part], weight) for e, weight in parts]
        output = _output(checkpoint, name, members[0][0])
        if parts != ((expert, 1.0),):
            output = dataclasses.replace(output, make=partial(_weighted_sum, checkpoint, members))
        made.append(output)
    uses = [parts for parts in block.slots if any(e == expert for e, _ in parts)]
    if not uses:
        return made, "dropped"
    return made, "copied" if all(parts == ((expert, 1.0),) for parts in uses) else "transformed"


def _router_outputs(
    checkpoint: Checkpoint, block: BlockLayout, layer: int, name: str
) -> tuple[list[OutputTensor], str]:
    """Return the router's tensor with the rows that stay, with the first also the expert map, and its fate."""
    import torch

    output = _output(checkpoint, name, name)
    fate = "copied"
    if block.rows != tuple(range(output.shape[0])):
        shape = (len(block.rows), *output.shape[1:])
        output = dataclasses.replace(
            output, shape=shape, make=lambda: [checkpoint.finite_tensor(name)[list(block.rows)]]
        )
        fate = "transformed"
    made = [output]
    if block.expert_map is not None and name == checkpoint.family.router_tensors(layer)[0]:
        map_name = checkpoint.family.expert_map_tensor(layer)
        made.append(OutputTensor(map_name, "I64", (len(block.rows),), lambda: [torch.tensor(block.expert_map)]))
    return made, fate


def _weighted_sum(checkpoint: Checkpoint, members: list[tuple[str, float]]) -> "list[torch.Tensor]":
    """Return, in a list, the sum over (tensor, weight) in fp64, rounded once to the first one's dtype."""
    first, weight = members[0]
    tensor = checkpoint.finite_tensor(first)
    total = tensor.double() * weight
    for name, weight in members[1:]:
        other = checkpoint.finite_tensor(name)
        if other.shape != tensor.shape:
            raise UserError(f"{checkpoint.directory}: {name} {list(other.shape)} cannot be merged with {first}.")
        total += other.double().mul_(weight)  # not add_(alpha=): fused multiply-add differs by processor
    return [total.to(tensor.dtype)]


def _code(architecture: str) -> str:
    """Return the modelling file to ship, with the stock class it derives from."""
    text = (Path(__file__).parent / CODE).read_text()
    return text.replace(STOCK_IMPORT, STOCK_IMPORT.replace("MixtralForCausalLM", architecture))


def _side_files(source: Path) -> list[Path]:
    """Tokenizer, generation config, licence and other small files that go along unchanged."""
    return [
        path
        for path in sorted(source.iterdir())
        if path.is_file() and path.name not in OWN_FILES and not path.name.startswith(".")
        and not path.name.endswith(NOT_COPIED)
    ]  # fmt: skip


def _check_disk(out: Path, needed: int) -> None:
    parent = next(path for path in out.absolute().parents if path.exists())
    free = shutil.disk_usage(parent).free
    if free < needed * 1.01 + 1e5:  # headers, config, card
        raise UserError(
            f"{out}: needs {needed / 1e9:.3f} GB, but {parent} has {free / 1e9:.3f} GB free. "
            "Free some space or write elsewhere."
        )


def _check_written(directory: Path, writer: ShardWriter, plan: Plan) -> None:
    """Read the headers back: every announced tensor is there with its shape, and the counts are the plan's."""
    written = Checkpoint(directory)
    announced = {tensor.name: (tensor.dtype, tensor.shape) for shard in writer.shards for tensor in shard}
    found = {name: (entry.dtype, entry.shape) for name, entry in written.entries.items()}
    if announced != found:
        raise RuntimeError(f"{directory}: wrote other tensors than announced: {set(announced) ^ set(found)}")
    if written.parameters != plan.counts["stored"]:
        raise RuntimeError(f"{directory}: {written.parameters} parameters on disk, plan: {plan.counts['stored']:.0f}")


def _proof(checkpoint: Checkpoint, directory: Path, out: Path, step: Plan | None) -> dict[str, Any]:
    """Run `espalier.prove` in a fresh process; `step` is the plan from the source on when plan.json says more."""
    import psutil

    # The source in its own dtype, then in fp32, beside what Python and torch take.
    needed = sum(entry.nbytes for entry in checkpoint.entries.values()) + checkpoint.parameters * 4 + 5e8
    free = psutil.virtual_memory().available
    if needed > free:
        return {"skipped": f"needs about {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB available"}
    with tempfile.TemporaryDirectory() as scratch:
        argv = [sys.executable, "-m", "espalier.prove", str(checkpoint.directory), str(directory)]
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
            f"the command was `{' '.join(argv[1:3])} SOURCE OUT`. Please report it with plan.json."
        )
    return report
