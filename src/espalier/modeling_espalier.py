"""A causal language model whose experts were merged, pruned or are skipped by token; made by Espalier.

This file lies in the checkpoint's directory and needs torch and transformers only:
`AutoModelForCausalLM.from_pretrained(DIRECTORY, trust_remote_code=True)`. It is the stock class with three
changes, read from `espalier` in config.json: a layer may hold another number of experts than the others, its
router may choose among more experts than are stored (`expert_map` says which stored expert each one became),
and a token may run fewer experts than the router chose (`skip`).
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import MixtralForCausalLM as StockForCausalLM
from transformers.integrations.moe import grouped_mm_experts_forward

Routed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class EspalierForCausalLM(StockForCausalLM):  # type: ignore[misc]
    """The stock model with the MoE blocks that `config.espalier` describes."""

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for a decorator in the text of the class's own file; the experts are the stock ones.
        return bool(StockForCausalLM._can_set_experts_implementation())

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # Read from the class's name, and MiniMax has a cache of its own.
        return bool(StockForCausalLM._supports_default_dynamic_cache())

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        settings = config.espalier
        for index, layer in settings["layers"].items():
            block = getattr(self.model.layers[int(index)], settings["module"])
            router = getattr(block, settings["router"])
            std = config.initializer_range
            stock = block.experts.num_experts
            _resize([block.experts], stock, layer["experts"], std)
            _resize([block, *router.modules()], stock, layer["router_experts"], std)
            if layer["remap"]:
                experts = torch.arange(layer["router_experts"]) % layer["experts"]
                block.register_buffer("expert_map", experts)
                self.num_experts = layer["router_experts"]  # the auxiliary loss counts the router's experts
            if layer["remap"] and not hasattr(block.experts, "_is_expert_parallel"):
                router.register_forward_hook(partial(_merge_scores, block=block))
            elif layer["remap"] or layer["skip"]:
                # Makes transformers' kernels treat an index of `num_experts` as "no expert".
                block.experts._is_expert_parallel = True
                if type(block.experts).__name__ == "GptOssExperts":
                    block.experts.forward = partial(_run, block.experts, block.experts.forward)
                block.experts.register_forward_pre_hook(partial(_route, block=block, skip=layer["skip"]))


def _resize(modules: list[nn.Module], stock: int, experts: int, std: float) -> None:
    """Give the modules' own tensors `experts` rows for `stock`, newly drawn; from_pretrained fills them.

    A bias [1, E] has columns instead.
    """
    for module in modules:
        kinds: list[dict[str, Any]] = [module._parameters, module._buffers]
        for kind in kinds:
            for name, tensor in list(kind.items()):
                if tensor is None or stock not in (tensor.shape[:1] + tensor.shape[-1:]):
                    continue
                shape = list(tensor.shape)
                shape[-1 if shape[0] == 1 and shape[-1] == stock else 0] = experts
                rows = tensor.new_empty(shape).normal_(std=std)
                kind[name] = nn.Parameter(rows, tensor.requires_grad) if kind is module._parameters else rows
        for name in ("num_experts", "num_local_experts", "n_routed_experts", "out_features"):
            if getattr(module, name, None) == stock:
                setattr(module, name, experts)


def _merge_scores(router: Any, inputs: Any, output: Any, *, block: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn the scores [T, router rows] of a router that picks one expert (Llama 4) into those of stored experts."""
    scores, logits = output
    stored = scores.new_zeros(len(scores), block.experts.num_experts)
    return stored.index_add(1, block.expert_map, scores), logits


def _run(experts: Any, forward: Any, hidden: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> Any:
    """Run the experts, with `grouped_mm` for the plain loop: that of GPT-OSS takes the index `num_experts` ill."""
    if experts.config._experts_implementation == "eager":
        return grouped_mm_experts_forward(experts, hidden, indices, weights)
    return forward(hidden, indices, weights)


def _route(experts: Any, inputs: Routed, *, block: Any, skip: dict[str, Any] | None) -> Routed:
    """Turn the router's choice into what runs: hidden [T, D], indices [T, K] and weights [T, K] of stored experts.

    Each expert runs once a token: a token's later entries of the same stored expert, and skipped ones, get the
    index `num_experts`, which means none, and weight 0.
    """
    hidden, indices, routing = inputs
    weights = routing.float()
    kept = torch.ones_like(indices, dtype=torch.bool)
    if skip is not None:
        weights, order = weights.sort(dim=-1, descending=True, stable=True)
        indices = indices.gather(-1, order)
        kept = _kept(weights, skip)
        left = weights * kept
        if skip["renormalise"]:  # to the sum that the router gave, which need not be 1
            left = left * (weights.sum(dim=-1, keepdim=True) / left.sum(dim=-1, keepdim=True))
        weights = torch.where(kept.all(dim=-1, keepdim=True), weights, left)  # nothing skipped: the router's own
    if hasattr(block, "expert_map"):
        indices = block.expert_map[indices]
        same = (indices[:, :, None] == indices[:, None, :]) & kept[:, None, :]  # [T, K, K]
        weights = (same * weights[:, None, :]).sum(dim=-1)
        kept = kept & ~same.tril(diagonal=-1).any(dim=-1)
    indices = indices.masked_fill(~kept, experts.num_experts)
    return hidden, indices, weights.masked_fill(~kept, 0.0).to(routing.dtype)


def _kept(weights: torch.Tensor, skip: dict[str, Any]) -> torch.Tensor:
    """Which of the K experts a token runs, [T, K], for weights that descend (NAEE, arXiv 2402.14800).

    `ratio` drops the second of two when w2 < beta * w1 (section 3.3). `tail` keeps the smallest i with
    w_{i+1} + ... + w_K <= beta * (w_1 + ... + w_K) (appendix A.2).
    """
    if skip["rule"] == "ratio":
        kept: torch.Tensor = weights >= skip["beta"] * weights[:, :1]
    else:
        tail = weights.flip(-1).cumsum(-1).flip(-1)  # w_i + ... + w_K
        kept = tail > skip["beta"] * tail[:, :1]
    kept[:, 0] = True
    return kept
