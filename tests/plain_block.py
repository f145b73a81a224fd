"""The routed part of a compressed MoE block by plain loops over tokens, from the source's tensors on disk, in fp64."""

import json

import torch
from safetensors.torch import load_file

from espalier.plan import Keep, Merge, Skip

NAMES = {  # block and expert tensors on disk: gate, up, down
    "mixtral": ("model.layers.{}.block_sparse_moe", ("w1", "w3", "w2")),
    "olmoe": ("model.layers.{}.mlp", ("gate_proj", "up_proj", "down_proj")),
    "qwen2_moe": ("model.layers.{}.mlp", ("gate_proj", "up_proj", "down_proj")),
    "qwen3_moe": ("model.layers.{}.mlp", ("gate_proj", "up_proj", "down_proj")),
}


def tensors_of(directory):
    """Return all tensors of a directory by name."""
    tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def plain_block(directory, layer, operations, hidden):
    """Return (routed output [T, D], distinct experts run [T]) of the block after `operations`, for hidden [T, D]."""
    config = json.loads((directory / "config.json").read_text())
    family = config["model_type"]
    renormalise = family == "mixtral" or config.get("norm_topk_prob", False)
    block, parts = NAMES[family][0].format(layer), NAMES[family][1]
    tensors = {name: tensor.double() for name, tensor in tensors_of(directory).items() if name.startswith(block)}
    rows = tensors[f"{block}.gate.weight"]
    experts = [[tensors[f"{block}.experts.{e}.{part}.weight"] for part in parts] for e in range(len(rows))]
    runs_as = list(range(len(rows)))  # stored expert of each router row
    skip = None
    for operation in operations:
        if isinstance(operation, Keep):
            rows = rows[list(operation.experts)]
            experts = [experts[e] for e in operation.experts]
            runs_as = list(range(len(experts)))
        elif isinstance(operation, Merge):
            merged = []
            for group, weights in zip(operation.groups, operation.weights, strict=True):
                merged.append([sum(w * experts[e][p] for e, w in zip(group, weights, strict=True)) for p in range(3)])
            if operation.router == "slice":
                rows = rows[[group[0] for group in operation.groups]]
                runs_as = list(range(len(merged)))
            elif operation.router == "remap":
                runs_as = [next(g for g, group in enumerate(operation.groups) if e in group) for e in runs_as]
            else:  # tie: each member stays an expert of its own
                merged = [
                    next(m for m, group in zip(merged, operation.groups, strict=True) if e in group) for e in runs_as
                ]
            experts = merged
        elif isinstance(operation, Skip):
            skip = operation
    output, counts = torch.zeros_like(hidden.double()), []
    for t, token in enumerate(hidden.double()):
        probabilities = (rows @ token).softmax(dim=0).tolist()
        chosen = sorted(range(len(rows)), key=lambda e: -probabilities[e])[: config["num_experts_per_tok"]]
        weights = [probabilities[e] for e in chosen]
        if renormalise:
            weights = [w / sum(weights) for w in weights]
        if skip is not None and skip.rule == "ratio":
            kept = 1 if weights[1] < skip.beta * weights[0] else 2
        elif skip is not None:
            kept = next(i for i in range(1, len(weights) + 1) if sum(weights[i:]) <= skip.beta * sum(weights))
        else:
            kept = len(weights)
        chosen, weights = chosen[:kept], weights[:kept]
        if renormalise:
            weights = [w / sum(weights) for w in weights]
        for e, weight in zip(chosen, weights, strict=True):
            gate, up, down = experts[runs_as[e]]
            output[t] += weight * (down @ (torch.nn.functional.silu(gate @ token) * (up @ token)))
        counts.append(len({runs_as[e] for e in chosen}))
    return output, counts
