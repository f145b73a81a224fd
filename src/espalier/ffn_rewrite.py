"""What becomes of the files of a dense model whose FFNs are split: tensors, config.json and shipped code."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from espalier.checkpoint import Checkpoint
from espalier.dense_families import DenseFamily
from espalier.errors import UserError
from espalier.operations import Operation
from espalier.plan import Plan
from espalier.plan_tensors import PlanTensor
from espalier.rewrite import CLASS, Rewrite, auto_map, shipped_code
from espalier.shards import OutputTensor
from espalier.split import Split, Threshold

if TYPE_CHECKING:
    import torch

CODE = ("modeling_espalier_ffn.py", "sparse_ffn.py")
FORMAT = "espalier.ffn/1"


def rewrite_ffn(checkpoint: Checkpoint, plan: Plan) -> Rewrite:
    """Return what `plan` makes of `checkpoint`; UserError where it does not fit.

    Where every layer only loses neurons, and all the same number, the result is the stock model with another width.
    """
    checkpoint.dense_shape()  # config.json and tensors that disagree are told
    before = checkpoint.config.get("espalier", {}).get("layers")
    if before is not None:
        return _with_thresholds(checkpoint, plan, before)
    splits = {layer: _split(layer, operations) for layer, operations in plan.layers.items()}
    shards, fates = _outputs(checkpoint, splits, plan)
    config = _config(checkpoint, splits)
    code = shipped_code(checkpoint.dense_family.architecture, *CODE) if "espalier" in config else {}
    return Rewrite(shards, fates, config, code)


def _split(layer: int, operations: tuple[Operation, ...]) -> Split:
    if len(operations) != 1 or not isinstance(operations[0], Split):
        names = [operation.op for operation in operations]
        raise UserError(f"plan, layer {layer}: a dense FFN takes one split, not {names}.")
    return operations[0]


def _config(checkpoint: Checkpoint, splits: dict[int, Split]) -> dict[str, Any]:
    family, config = checkpoint.dense_family, dict(checkpoint.config)
    widths = {split.width for split in splits.values()}
    every = len(splits) == int(config["num_hidden_layers"])
    if every and len(widths) == 1 and all(split.router == "none" for split in splits.values()):
        return config | {family.width_key: widths.pop()}
    config["architectures"] = [CLASS]
    config["auto_map"] = auto_map(CODE[0])
    config["espalier"] = {
        "format": FORMAT,
        "module": family.module,
        "modules": family.modules,
        "layers": {str(layer): split.settings() for layer, split in sorted(splits.items())},
    }
    return config


def _outputs(
    checkpoint: Checkpoint, splits: dict[int, Split], plan: Plan
) -> tuple[list[list[OutputTensor]], dict[str, int]]:
    """Return the tensors to write, by source shard, and how many of the source's had which fate."""
    family = checkpoint.dense_family
    dims = {  # the dimension of F, by the tensor's name
        f"{name}.{kind}": (layer, 1 if role == "down" else 0)
        for layer in splits
        for role, name in family.tensors(layer).items()
        for kind in ("weight", "bias")
        if f"{name}.{kind}" in checkpoint.entries and not (role == "down" and kind == "bias")
    }
    first = {f"{family.tensors(layer)['up']}.weight": layer for layer in splits}
    fates = {"copied": 0, "transformed": 0, "dropped": 0}
    shards: list[list[OutputTensor]] = []
    for file in checkpoint.files:
        shard = []
        for name in checkpoint.tensors_of(file):
            entry = checkpoint.entries[name]
            output = OutputTensor(name, entry.dtype, entry.shape, lambda name=name: [checkpoint.finite_tensor(name)])  # type: ignore[misc]
            layer, dim = dims.get(name, (-1, 0))
            neurons = splits[layer].neurons if layer >= 0 else None
            if neurons is not None:
                checkpoint.refuse_stored(name)
                output = _picked(output, checkpoint, dim, plan.tensors[neurons])
            fates["copied" if neurons is None else "transformed"] += 1
            shard.append(output)
            if name in first:
                shard += _router(family, first[name], splits[first[name]], plan)
        shards.append(shard)
    return shards, fates | {"written": sum(map(len, shards))}


def _picked(output: OutputTensor, checkpoint: Checkpoint, dim: int, neurons: PlanTensor) -> OutputTensor:
    """Return the tensor with the neurons, along `dim`, that are stored, in their order."""
    shape = list(output.shape)
    shape[dim] = neurons.shape[0]

    def make() -> "list[torch.Tensor]":
        import torch

        return [checkpoint.finite_tensor(output.name).index_select(dim, torch.from_numpy(neurons.read()).long())]

    return replace(output, shape=tuple(shape), make=make)


def _router(family: DenseFamily, layer: int, split: Split, plan: Plan) -> list[OutputTensor]:
    """Return the router's tensors; they are float32 whatever the model is."""

    def make(name: str) -> "list[torch.Tensor]":
        import torch

        return [torch.from_numpy(plan.tensors[name].read())]

    return [
        OutputTensor(
            family.router_tensor(layer, role),
            "F32",
            plan.tensors[name].shape,
            lambda name=name: make(name),  # type: ignore[misc]
        )
        for role, name in sorted(split.tensors_of.items())
    ]


def _with_thresholds(checkpoint: Checkpoint, plan: Plan, before: dict[str, Any]) -> Rewrite:
    """Return the checkpoint with other thresholds; nothing else can be done to one that is split already."""
    layers = {layer: dict(settings) for layer, settings in before.items()}
    for layer, operations in plan.layers.items():
        settings = layers.get(str(layer))
        for operation in operations:
            if not isinstance(operation, Threshold) or settings is None or settings["router"]["choose"] != "threshold":
                raise UserError(
                    f"{checkpoint.directory}: layer {layer} was split already, {operation.op} cannot follow; only "
                    "another threshold can, where there is one. Make one plan for the base model instead."
                )
            settings["router"] = settings["router"] | {"threshold": operation.value}
    config = checkpoint.config | {"espalier": checkpoint.config["espalier"] | {"layers": layers}}
    shards = [
        [
            OutputTensor(name, entry.dtype, entry.shape, lambda name=name: [checkpoint.finite_tensor(name)])  # type: ignore[misc]
            for name in checkpoint.tensors_of(file)
            for entry in (checkpoint.entries[name],)
        ]
        for file in checkpoint.files
    ]
    written = sum(map(len, shards))
    fates = {"copied": written, "transformed": 0, "dropped": 0, "written": written}
    return Rewrite(shards, fates, config, shipped_code(checkpoint.dense_family.architecture, *CODE))
