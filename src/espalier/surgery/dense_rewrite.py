"""What becomes of a dense model's files under a plan: tensors, config.json and shipped code."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from espalier.checkpoints.checkpoint import Checkpoint
from espalier.checkpoints.shards import OutputTensor
from espalier.errors import UserError
from espalier.plans.narrow_attention import NarrowAttention, dimensions_of
from espalier.plans.plan import Plan
from espalier.plans.split import Split, Threshold
from espalier.surgery.rewrite import CLASS, Rewrite, auto_map, shipped_code

if TYPE_CHECKING:
    import torch

CODE = ("modeling_espalier_ffn.py", "sparse_ffn.py", "sparse_router.py", "sparse_attention.py")
FORMAT = "espalier.ffn/1"

Kind = TypeVar("Kind", Split, NarrowAttention)


def rewrite_dense(checkpoint: Checkpoint, plan: Plan) -> Rewrite:
    """Return what `plan` makes of `checkpoint`; UserError where it does not fit.

    Where every layer only loses neurons, and all the same number, the result is the stock model with another width.
    """
    checkpoint.dense_shape()  # config.json and tensors that disagree are told
    before = checkpoint.config.get("espalier", {}).get("layers")
    if plan.layers and before is None and "espalier" in checkpoint.config:
        raise UserError(
            f"{checkpoint.directory}: layers were routed already. Make one plan for the base model instead."
        )
    if before is not None:
        return _with_thresholds(checkpoint, plan, before)
    splits = _only(Split, plan)
    narrowed = _only(NarrowAttention, plan)
    picks = _picks(checkpoint, splits, narrowed, plan)
    added = _added(checkpoint, splits, narrowed)
    shards, fates = _outputs(checkpoint, picks, added, plan)
    config = _config(checkpoint, splits, narrowed, plan)
    code = shipped_code(checkpoint.dense_family.architecture, *CODE) if "layers" in config.get("espalier", {}) else {}
    return Rewrite(shards, fates, config, code)


def _only(kind: type[Kind], plan: Plan) -> dict[int, Kind]:
    """Return the one operation of a kind that a layer has; UserError for more, or for what only split ones take."""
    found: dict[int, Kind] = {}
    for layer, operations in plan.layers.items():
        own = [operation for operation in operations if isinstance(operation, kind)]
        others = [o.op for o in operations if not isinstance(o, Split | NarrowAttention)]
        if others or len(own) > 1:
            names = [operation.op for operation in operations]
            raise UserError(
                f"plan, layer {layer}: a dense layer takes one split and one narrow_attention, not {names}."
            )
        if own:
            found[layer] = own[0]
    return found


def _config(
    checkpoint: Checkpoint, splits: dict[int, Split], narrowed: dict[int, NarrowAttention], plan: Plan
) -> dict[str, Any]:
    family, config = checkpoint.dense_family, dict(checkpoint.config)
    if not splits and not narrowed:
        return config
    widths = {split.width for split in splits.values()}
    every = len(splits) == int(config["num_hidden_layers"]) and not narrowed
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
    if narrowed:
        config["espalier"]["attention"] = {
            "module": family.attention,
            "modules": family.attention_modules,
            "head": family.head(config),
            "layers": {
                str(layer): operation.settings(_dimensions(checkpoint, operation, plan))
                for layer, operation in sorted(narrowed.items())
            },
        }
    return config


def _dimensions(checkpoint: Checkpoint, operation: NarrowAttention, plan: Plan) -> list[int] | None:
    """Return the dimensions of a head that queries and keys keep; None: all."""
    if operation.pairs is None:
        return None
    family, config = checkpoint.dense_family, checkpoint.config
    return dimensions_of(plan.tensors[operation.pairs].read().tolist(), family.head(config), family.rotary(config))


def _picks(
    checkpoint: Checkpoint, splits: dict[int, Split], narrowed: dict[int, NarrowAttention], plan: Plan
) -> dict[str, tuple[int, list[int]]]:
    """Return by tensor the dimension along which some of it stays, and what stays, in the order it is stored in."""
    family, picks = checkpoint.dense_family, {}
    for layer, split in splits.items():
        if split.neurons is None:
            continue
        neurons = plan.tensors[split.neurons].read().tolist()
        for role, name in family.tensors(layer).items():
            picks[f"{name}.weight"] = (1 if role == "down" else 0, neurons)
            if role != "down":
                picks[f"{name}.bias"] = (0, neurons)
    head = family.head(checkpoint.config) if narrowed else 0
    for layer, operation in narrowed.items():
        dimensions = _dimensions(checkpoint, operation, plan)
        for role in ("query", "key") if dimensions is not None else ():
            name = family.attention_tensor(layer, role)
            heads = checkpoint.entries[f"{name}.weight"].shape[0] // head
            rows = [number * head + dimension for number in range(heads) for dimension in dimensions or ()]
            picks |= {f"{name}.{kind}": (0, rows) for kind in ("weight", "bias")}
    return picks


def _added(
    checkpoint: Checkpoint, splits: dict[int, Split], narrowed: dict[int, NarrowAttention]
) -> dict[str, dict[str, str]]:
    """Return routers' tensors by the source's tensor that they are written after: names on disk and in the plan."""
    family, added = checkpoint.dense_family, {}
    for layer, split in splits.items():
        routers = {family.router_tensor(layer, role): name for role, name in sorted(split.tensors_of.items())}
        added[f"{family.tensors(layer)['up']}.weight"] = routers
    for layer, operation in narrowed.items():
        values = family.attention_tensor(layer, "value")
        added[f"{values}.weight"] = {f"{values}.router.{role}": name for role, name in sorted(operation.values.items())}
    return added


def _outputs(
    checkpoint: Checkpoint, picks: dict[str, tuple[int, list[int]]], added: dict[str, dict[str, str]], plan: Plan
) -> tuple[list[list[OutputTensor]], dict[str, int]]:
    """Return the tensors to write, by source shard, and how many of the source's had which fate."""
    fates = {"copied": 0, "transformed": 0, "dropped": 0}
    shards: list[list[OutputTensor]] = []
    for file in checkpoint.files:
        shard = []
        for name in checkpoint.tensors_of(file):
            entry = checkpoint.entries[name]
            output = OutputTensor(name, entry.dtype, entry.shape, lambda name=name: [checkpoint.finite_tensor(name)])  # type: ignore[misc]
            if name in picks:
                checkpoint.refuse_stored(name)
                output = _picked(output, checkpoint, *picks[name])
            fates["transformed" if name in picks else "copied"] += 1
            shard.append(output)
            shard += _routers(added.get(name, {}), plan)
        shards.append(shard)
    return shards, fates | {"written": sum(map(len, shards))}


def _picked(output: OutputTensor, checkpoint: Checkpoint, dim: int, kept: Sequence[int]) -> OutputTensor:
    """Return the tensor with those of its rows or columns that are `kept`, in their order."""
    shape = list(output.shape)
    shape[dim] = len(kept)

    def make() -> "list[torch.Tensor]":
        import torch

        return [checkpoint.finite_tensor(output.name).index_select(dim, torch.tensor(kept))]

    return replace(output, shape=tuple(shape), make=make)


def _routers(named: dict[str, str], plan: Plan) -> list[OutputTensor]:
    """Return routers' tensors, names on disk to those in the plan; they are float32 whatever the model is."""

    def make(name: str) -> "list[torch.Tensor]":
        import torch

        return [torch.from_numpy(plan.tensors[name].read())]

    return [
        OutputTensor(target, "F32", plan.tensors[name].shape, lambda name=name: make(name))  # type: ignore[misc]
        for target, name in named.items()
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
