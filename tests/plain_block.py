"""The routed part of a MoE block by plain loops over tokens, from the tensors on disk, in fp64."""

import json
from math import exp

import torch
from safetensors.torch import load_file

from espalier.plans.operations import Constant, Keep, Merge, Narrow, Skip

W123 = tuple(f"experts.{{}}.{part}.weight" for part in ("w1", "w3", "w2"))  # gate, up, down
PROJ = tuple(f"experts.{{}}.{part}_proj.weight" for part in ("gate", "up", "down"))
FUSED = tuple(f"experts.{part}" for part in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"))

NAMES = {  # on disk: block, an expert's tensors ({} is its number; without one all experts are in it), router tensors
    "mixtral": ("model.layers.{}.block_sparse_moe", W123, ("gate.weight",)),
    "olmoe": ("model.layers.{}.mlp", PROJ, ("gate.weight",)),
    "qwen2_moe": ("model.layers.{}.mlp", PROJ, ("gate.weight",)),
    "qwen3_moe": ("model.layers.{}.mlp", PROJ, ("gate.weight",)),
    "qwen3_next": ("model.layers.{}.mlp", PROJ, ("gate.weight",)),
    "deepseek_v2": ("model.layers.{}.mlp", PROJ, ("gate.weight",)),
    "deepseek_v3": ("model.layers.{}.mlp", PROJ, ("gate.weight", "gate.e_score_correction_bias")),
    "glm4_moe": ("model.layers.{}.mlp", PROJ, ("gate.weight", "gate.e_score_correction_bias")),
    "ernie4_5_moe": ("model.layers.{}.mlp", PROJ, ("gate.weight", "moe_statics.e_score_correction_bias")),
    "gpt_oss": ("model.layers.{}.mlp", FUSED, ("router.weight", "router.bias")),
    "granitemoe": (
        "model.layers.{}.block_sparse_moe",
        ("input_linear.weight", "output_linear.weight"),
        ("router.layer.weight",),
    ),
    "llama4_text": (
        "model.layers.{}.feed_forward",
        ("experts.gate_up_proj", "experts.down_proj"),
        ("router.weight",),
    ),
    "jamba": ("model.layers.{}.feed_forward", PROJ, ("router.weight",)),
    "minimax": ("model.layers.{}.block_sparse_moe", W123, ("gate.weight",)),
    "minimax_m2": ("model.layers.{}.block_sparse_moe", W123, ("gate.weight", "e_score_correction_bias")),
    "phimoe": ("model.layers.{}.block_sparse_moe", W123, ("gate.weight",)),
}
ALWAYS_ONE = ("mixtral", "minimax", "minimax_m2", "gpt_oss", "granitemoe", "ernie4_5_moe")  # the weights' sum is fixed
NEVER_ONE = ("phimoe", "jamba", "deepseek_v2", "llama4_text")


def tensors_of(directory):
    """Return all tensors of a directory by name."""
    tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def renormalises(config):
    """Whether the router scales the K weights to a fixed sum."""
    family = config["model_type"]
    return family not in NEVER_ONE and (family in ALWAYS_ONE or config["norm_topk_prob"])


class PlainBlock:
    """One MoE block of a checkpoint that no plan has changed."""

    def __init__(self, directory, layer):
        self.config = json.loads((directory / "config.json").read_text())
        self.family = self.config["model_type"]
        block, parts, router = NAMES[self.family]
        block = block.format(layer)
        tensors = {name: tensor.double() for name, tensor in tensors_of(directory).items() if name.startswith(block)}
        self.rows = tensors[f"{block}.{router[0]}"]
        second = tensors[f"{block}.{router[1]}"].reshape(-1) if len(router) > 1 else torch.zeros(len(self.rows))
        nothing = torch.zeros(len(self.rows))
        self.bias, self.correction = (second, nothing) if router[-1].endswith("router.bias") else (nothing, second)
        self.experts = [
            [tensors[f"{block}.{part.format(e)}"] if "{}" in part else tensors[f"{block}.{part}"][e] for part in parts]
            for e in range(len(self.rows))
        ]

    def logits(self, token):
        """Return the router's logits as a list."""
        return (self.rows @ token.double() + self.bias).tolist()

    def run(self, expert, token):
        """Return the unweighted output [D] of an expert's tensors on a token."""
        token = token.double()
        inner = self.inner(expert, token)
        if self.family == "gpt_oss":
            return inner @ expert[2] + expert[3]
        return (expert[-1].T if self.family == "llama4_text" else expert[-1]) @ inner

    def inner(self, expert, token):
        """Return what an expert's down projection gets, [F]."""
        token = token.double()
        if self.family == "gpt_oss":
            gate_up = token @ expert[0] + expert[1]
            gate, up = gate_up[0::2].clamp(max=7.0), gate_up[1::2].clamp(-7.0, 7.0)
            return (up + 1) * gate / (1 + torch.exp(-1.702 * gate))
        if self.family == "llama4_text":
            expert = [part.T for part in expert]
        gate, up = expert[:2] if len(expert) == 3 else expert[0].chunk(2)
        gate = gate @ token
        return gate / (1 + torch.exp(-gate)) * (up @ token)

    def choose(self, logits):
        """Return [(row, weight)] of the K chosen, the largest weight first, as the family's paper or code says."""
        config, family, everyone = self.config, self.family, range(len(logits))
        k = config["moe_k"] if family == "ernie4_5_moe" else config["num_experts_per_tok"]
        if family == "phimoe":
            return sorted(sparsemixer(logits, 2 * config["router_jitter_noise"]), key=lambda pair: -pair[1])
        if family in ("deepseek_v3", "glm4_moe", "minimax_m2", "llama4_text"):
            scores = [1 / (1 + exp(-logit)) for logit in logits]
        else:
            total = sum(exp(logit) for logit in logits)
            scores = [exp(logit) / total for logit in logits]
        choice = [score + float(bias) for score, bias in zip(scores, self.correction, strict=True)]
        allowed = list(everyone)
        if family in ("deepseek_v2", "deepseek_v3", "glm4_moe"):
            size = len(logits) // config["n_group"]
            best = 1 if family == "deepseek_v2" else 2
            groups = [list(everyone[start : start + size]) for start in everyone[::size]]
            groups.sort(key=lambda group: -sum(sorted((choice[e] for e in group), reverse=True)[:best]))
            allowed = [e for group in groups[: config["topk_group"]] for e in group]
        chosen = sorted(allowed, key=lambda e: -choice[e])[:k]
        weights = [scores[e] for e in chosen]
        if renormalises(config):
            weights = [w / sum(weights) for w in weights]
        factor = config.get("routed_scaling_factor", 1.0)
        pairs = [(e, w * factor) for e, w in zip(chosen, weights, strict=True)]
        return sorted(pairs, key=lambda pair: -pair[1])


def sparsemixer(logits, margin):
    """Return the two largest, each with its softmax weight among those within the relative margin of it."""
    left, pairs = dict(enumerate(logits)), []
    for _ in range(2):
        best = max(left, key=lambda e: left[e])
        top = left[best]
        near = [logit for logit in left.values() if (top - logit) / max(abs(logit), top) <= margin]
        pairs.append((best, exp(top) / sum(exp(logit) for logit in near)))
        del left[best]
    return pairs


def neurons_of(block, part, tensor):
    """Return the tensor with its neurons first: [F, ...] or [F, 2, ...] where gate and up share it; None without."""
    fused = len(block.experts[0]) != 3
    if block.family == "gpt_oss":
        if part < 2:
            return tensor.T.reshape(-1, 2, 32) if part == 0 else tensor.reshape(-1, 2)
        return tensor if part == 2 else None
    if not fused:
        return tensor.T if part == 2 else tensor
    if block.family == "llama4_text":
        return torch.stack(tensor.T.chunk(2), dim=1) if part == 0 else tensor
    return torch.stack(tensor.chunk(2), dim=1) if part == 0 else tensor.T


def back(block, part, neurons):
    """Undo `neurons_of`."""
    fused = len(block.experts[0]) != 3
    if block.family == "gpt_oss":
        return neurons if part == 2 else neurons.reshape(-1, 32).T if part == 0 else neurons.reshape(-1)
    if not fused:
        return neurons.T if part == 2 else neurons
    both = torch.cat([neurons[:, 0], neurons[:, 1]]) if part == 0 else neurons
    return both.T if (block.family == "llama4_text") == (part == 0) else both


def merge_neurons(block, group, weights, target):
    """Return the tensors of the expert whose neuron n is the weighted mean of the members' neurons that go to n."""
    merged = []
    for part, first in enumerate(block.experts[group[0]]):
        if neurons_of(block, part, first) is None:
            merged.append(sum(w * block.experts[e][part] for e, w in zip(group, weights, strict=True)))
            continue
        rows = []
        for n in range(len(target[0])):
            found = [
                (w, neurons_of(block, part, block.experts[e][part])[m])
                for e, w in zip(group, weights, strict=True)
                for m in range(len(target[0]))
                if target[e][m] == n
            ]
            rows.append(sum(w * row for w, row in found) / sum(w for w, _ in found))
        merged.append(back(block, part, torch.stack(rows)))
    return merged


def kept_by(skip, pairs, logits, factor, runs_as):
    """Return the (row, weight) of `pairs`, the largest weight first, that the rule keeps."""
    weights = [weight for _, weight in pairs]
    if skip.rule == "ratio":
        first = pairs[0][0]
        beta = {e: skip.beta * (factor[runs_as[first]][runs_as[e]] if factor else 1) for e, _ in pairs}
        return pairs[:1] + [(e, weight) for e, weight in pairs[1:] if weight >= beta[e] * weights[0]]
    if skip.rule == "tail":
        return pairs[: next(i for i in range(1, len(pairs) + 1) if sum(weights[i:]) <= skip.beta * sum(weights))]
    if skip.rule == "fixed_k":
        return pairs[: skip.k]
    total, so_far = sum(exp(logit) for logit in logits), 0.0
    for number, (e, _) in enumerate(pairs, 1):
        so_far += exp(logits[e]) / total
        if so_far >= skip.p:
            return pairs[:number]
    return pairs


def plain_block(directory, layer, operations, hidden, tensors=None, protected=()):
    """Return (routed output [T, D], distinct experts run [T]) of the block after `operations`, for hidden [T, D].

    `tensors` are those of the plan, `protected` the tokens at which nothing is skipped.
    """
    block = PlainBlock(directory, layer)
    vectors = {}
    runs_as = list(range(len(block.rows)))  # stored expert of each router row
    skip = factor = None

    def keep_rows(rows):
        block.rows, block.bias, block.correction = block.rows[rows], block.bias[rows], block.correction[rows]

    for operation in operations:
        if isinstance(operation, Keep):
            keep_rows(list(operation.experts))
            block.experts = [block.experts[e] for e in operation.experts]
            runs_as = list(range(len(block.experts)))
        elif isinstance(operation, Merge):
            merged, refitted = [], 0
            for group, weights in zip(operation.groups, operation.weights, strict=True):
                members = [block.experts[e] for e in group]
                if operation.neurons is not None and len(group) > 1:
                    merged.append(merge_neurons(block, group, weights, tensors[operation.neurons].read().tolist()))
                    continue
                merged.append([sum(w * m for w, m in zip(weights, part, strict=True)) for part in zip(*members)])  # noqa: B905
                if operation.down is not None and len(group) > 1:
                    part = 2 if len(members[0]) > 2 else 1
                    down = torch.from_numpy(tensors[operation.down].read()[refitted]).double()
                    merged[-1][part] = back(block, part, down)
                    refitted += 1
            if operation.router == "slice":
                rows = operation.rows or [group[0] for group in operation.groups]
                keep_rows(sorted(rows))
                merged = [merged[rows.index(row)] for row in sorted(rows)]
                runs_as = list(range(len(merged)))
            elif operation.router == "remap":
                runs_as = [next(g for g, group in enumerate(operation.groups) if e in group) for e in runs_as]
            else:  # tie: each member stays an expert of its own
                merged = [
                    next(m for m, group in zip(merged, operation.groups, strict=True) if e in group) for e in runs_as
                ]
            block.experts = merged
        elif isinstance(operation, Constant):
            rows = torch.from_numpy(tensors[operation.vectors].read()).double()
            vectors = dict(zip(operation.experts, rows, strict=True))
        elif isinstance(operation, Narrow):
            kept = tensors[operation.neurons].read().tolist()
            for e, expert in enumerate(block.experts):
                for part, tensor in enumerate(expert):
                    rows = neurons_of(block, part, tensor)
                    if rows is not None:
                        expert[part] = back(block, part, rows[[m for m in kept[e] if m >= 0]])
        elif isinstance(operation, Skip):
            skip = operation
            factor = None if operation.factor is None else tensors[operation.factor].read().tolist()
    output, counts = torch.zeros_like(hidden.double()), []
    for t, token in enumerate(hidden.double()):
        pairs = kept = block.choose(block.logits(token))
        if skip is not None and t not in protected:
            kept = kept_by(skip, pairs, block.logits(token), factor, runs_as)
        scale = sum(w for _, w in pairs) / sum(w for _, w in kept) if renormalises(block.config) else 1.0
        for e, weight in kept:
            if e in vectors:
                output[t] += scale * weight * vectors[e]
                continue
            expert = block.experts[runs_as[e]]
            if block.family == "llama4_text":  # the weight multiplies what goes in
                output[t] += block.run(expert, weight * token)
            else:
                output[t] += scale * weight * block.run(expert, token)
        counts.append(len({runs_as[e] for e, _ in kept if e not in vectors}))
    return output, counts
