"""A causal language model whose experts were merged, pruned or are skipped by token; made by Espalier.

This file lies in the checkpoint's directory and needs torch and transformers only:
`AutoModelForCausalLM.from_pretrained(DIRECTORY, trust_remote_code=True)`. It is the stock class with three
changes, read from `espalier` in config.json: a layer may hold another number of experts than the others, or
narrower ones; its router may choose among more experts than are stored (`expert_map` says which stored expert, or
which of the vectors `constants`, each one became); and a token may run fewer experts than the router chose (`skip`).
"""

from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import MixtralForCausalLM as StockForCausalLM
from transformers.integrations.moe import grouped_mm_experts_forward

Routed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class EspalierForCausalLM(StockForCausalLM):  # type: ignore[misc]
    """The stock model with the MoE blocks that `config.espalier` describes."""

    _keep_in_fp32_modules_strict: ClassVar[set[str]] = {
        *(StockForCausalLM._keep_in_fp32_modules_strict or ()),
        "skip_factor",
    }

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for a decorator in the text of the class's own file; the experts are the stock ones.
        return bool(StockForCausalLM._can_set_experts_implementation())

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # Read from the class's name, and MiniMax has a cache of its own.
        return bool(StockForCausalLM._supports_default_dynamic_cache())

    def __init__(self, config: Any) -> None:
        settings = config.espalier
        protects = any("protect" in (layer["skip"] or ()) for layer in settings["layers"].values())
        if protects and config._attn_implementation is None:  # no other implementation gives attention weights
            config._attn_implementation = "eager"
        super().__init__(config)
        scale = float(getattr(config, "routed_scaling_factor", None) or 1.0)
        for index, layer in settings["layers"].items():
            block = getattr(self.model.layers[int(index)], settings["module"])
            router = getattr(block, settings["router"])
            std = config.initializer_range
            stock = block.experts.num_experts
            _resize([block.experts], stock, layer["experts"], std)
            _resize([block, *router.modules()], stock, layer["router_experts"], std)
            if layer["width"] is not None:
                _narrow(block.experts, layer["width"], std)
            if layer["remap"]:
                experts = torch.arange(layer["router_experts"]) % layer["experts"]
                block.register_buffer("expert_map", experts)
                if layer["constants"]:
                    vectors = torch.empty(layer["constants"], config.hidden_size).normal_(std=std)
                    block.constants = nn.Parameter(vectors, requires_grad=False)
                    block.experts.register_forward_hook(partial(_add_constants, block=block))
                self.num_experts = layer["router_experts"]  # the auxiliary loss counts the router's experts
            if layer["remap"] and not hasattr(block.experts, "_is_expert_parallel"):
                router.register_forward_hook(partial(_merge_scores, block=block))
            elif layer["remap"] or layer["skip"]:
                # Makes transformers' kernels treat an index of `num_experts` as "no expert".
                block.experts._is_expert_parallel = True
                if type(block.experts).__name__ == "GptOssExperts":
                    block.experts.forward = partial(_run, block.experts, block.experts.forward)
                skip = layer["skip"] and {"total": scale} | layer["skip"]
                block.experts.register_forward_pre_hook(partial(_route, block=block, skip=skip))
            if layer["skip"]:
                _prepare_skip(layer["skip"], block, router, self.model.layers[int(index)], layer["experts"])


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


def _narrow(experts: nn.Module, width: int, std: float) -> None:
    """Give the experts `width` neurons each, newly drawn; from_pretrained fills them."""
    transposed = getattr(experts, "is_transposed", True)  # Llama 4's module says nothing of its layout
    parts = 2 if getattr(experts, "has_gate", True) else 1
    for name, tensor in list(experts._parameters.items()):
        shape = list(tensor.shape)  # type: ignore[union-attr]
        if name in ("gate_up_proj", "up_proj"):
            shape[2 if transposed else 1] = width * parts
        elif name in ("gate_up_proj_bias", "up_proj_bias"):
            shape[1] = width * parts
        elif name == "down_proj":
            shape[1 if transposed else 2] = width
        experts._parameters[name] = nn.Parameter(tensor.new_empty(shape).normal_(std=std), tensor.requires_grad)  # type: ignore[union-attr]
    for name in ("intermediate_size", "intermediate_dim", "expert_dim"):
        if hasattr(experts, name):
            setattr(experts, name, width)


def _add_constants(experts: Any, inputs: Routed, output: torch.Tensor, *, block: Any) -> torch.Tensor:
    """Add to the experts' output [T, D] the vectors that stand for experts, by their routing weights."""
    added: torch.Tensor = block.constant_output.to(output.dtype)
    return output + added


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
        kept = kept_slots(weights, indices, block, skip)
        if getattr(block, "attention_received", None) is not None:
            kept = kept | _protected(hidden, block, skip["protect"])
        left = weights * kept
        if skip[
            "renormalise"
        ]:  # to the sum that the router gives, which need not be 1; one that is left has it exactly
            left = left / left.sum(dim=-1, keepdim=True) * skip["total"]
        weights = torch.where(kept.all(dim=-1, keepdim=True), weights, left)  # nothing skipped: the router's own
    if hasattr(block, "expert_map"):
        indices = block.expert_map[indices]
        same = (indices[:, :, None] == indices[:, None, :]) & kept[:, None, :]  # [T, K, K]
        weights = (same * weights[:, None, :]).sum(dim=-1)
        kept = kept & ~same.tril(diagonal=-1).any(dim=-1)
    if hasattr(block, "constants"):
        number = indices - experts.num_experts  # of a constant, from 0
        share = weights.new_zeros(len(weights), len(block.constants))
        share.scatter_add_(1, number.clamp(min=0), weights.masked_fill(~kept | (number < 0), 0.0))
        block.constant_output = share @ block.constants.to(share.dtype)
        kept = kept & (number < 0)
    indices = indices.masked_fill(~kept, experts.num_experts)
    return hidden, indices, weights.masked_fill(~kept, 0.0).to(routing.dtype)


def _prepare_skip(skip: dict[str, Any], block: Any, router: nn.Module, layer: Any, experts: int) -> None:
    """Give the block what its rule looks at beside the weights."""
    if skip["rule"] == "top_p":
        router.register_forward_hook(partial(_keep_logits, block=block))
    if skip.get("factor"):
        block.register_buffer("skip_factor", torch.ones(experts, experts))
    if "protect" in skip:
        layer.self_attn.register_forward_hook(partial(_keep_attention, block=block), with_kwargs=True)


def _keep_logits(router: nn.Module, inputs: Any, output: Routed, *, block: Any) -> None:
    """Keep the router's logits [T, router rows] until the experts run."""
    block.router_logits = output[0]


def _keep_attention(attention: nn.Module, args: Any, kwargs: dict[str, Any], output: Any, *, block: Any) -> None:
    """Keep, where whole sequences are run, the attention that each token is paid, float32 [B, L], and the real tokens.

    It is the mean over heads and over the sequence's tokens from this one on. Tokens that the mask hides from
    themselves are padding. With a cache from before, or of fixed length, nothing is kept.
    """
    weights = output[1]  # [B, heads, L, keys]
    if weights is None:
        raise RuntimeError(
            "this checkpoint protects tokens by the attention that they are paid, which only attn_implementation="
            "'eager' gives: load it with that, or without naming another."
        )
    block.attention_received = None
    if weights.shape[-2] == 1 or weights.shape[-2] != weights.shape[-1]:
        return
    mask = kwargs.get("attention_mask")
    real = weights.new_ones(weights.shape[0], weights.shape[-1], dtype=torch.bool)
    if mask is not None:
        real = real & (mask[:, 0].diagonal(dim1=-2, dim2=-1) >= 0)
    received = torch.einsum("bij,bi->bj", weights.mean(dim=1, dtype=torch.float32), real.float())
    later = real.flip(-1).cumsum(dim=-1).flip(-1)
    block.attention_received = received / later.clamp(min=1), real


def _protected(hidden: torch.Tensor, block: Any, fraction: float) -> torch.Tensor:
    """Which tokens keep all their experts, [T, 1]: of each sequence the most important ones (ODP, arXiv 2410.06270).

    A token's importance is the sum of |x| over its block input times the attention that it is paid; the earlier of
    two equal ones goes first. A sequence of one token has none.
    """
    received, real = block.attention_received
    block.attention_received = None
    importance = hidden.float().abs().sum(dim=-1).view_as(received) * received
    order = importance.masked_fill(~real, -1.0).argsort(dim=-1, descending=True, stable=True)
    tokens = real.sum(dim=-1, keepdim=True)
    number = (tokens.double() * fraction - 1e-9).ceil().masked_fill(tokens < 2, 0)
    protected: torch.Tensor = order.argsort(dim=-1) < number
    return protected.reshape(-1, 1)


def kept_slots(weights: torch.Tensor, indices: torch.Tensor, block: Any, skip: dict[str, Any]) -> torch.Tensor:
    """Which of its K experts a token runs, bool [T, K], for the router's float32 weights and its rows `indices`."""
    falling, order = weights.sort(dim=-1, descending=True, stable=True)
    return _kept(falling, indices.gather(-1, order), block, skip).gather(-1, order.argsort(dim=-1))


def _kept(weights: torch.Tensor, indices: torch.Tensor, block: Any, skip: dict[str, Any]) -> torch.Tensor:
    """Which of the K experts a token runs, [T, K], for weights that fall and their router rows `indices`.

    `ratio` drops those with w_j < beta * w_1 (NAEE, arXiv 2402.14800, section 3.3, there of two), where beta may be
    multiplied by a factor for e_1 and e_j (DiEP, arXiv 2509.16105). `tail` keeps the smallest i with
    w_{i+1} + ... + w_K <= beta * (w_1 + ... + w_K) (NAEE, appendix A.2), `top_p` the smallest i whose probabilities
    among all experts add up to p (arXiv 2403.07652), `fixed_k` the first k.
    """
    if skip["rule"] == "ratio":
        beta = skip["beta"]
        if skip.get("factor"):
            stored = block.expert_map[indices] if hasattr(block, "expert_map") else indices
            beta = beta * block.skip_factor[stored[:, :1], stored].float()
        kept: torch.Tensor = weights >= beta * weights[:, :1]
    elif skip["rule"] == "tail":
        tail = weights.flip(-1).cumsum(-1).flip(-1)  # w_i + ... + w_K
        kept = tail > skip["beta"] * tail[:, :1]
    elif skip["rule"] == "top_p":
        logits = block.router_logits.reshape(len(indices), -1).float()
        block.router_logits = None
        probability = logits.softmax(dim=-1).gather(-1, indices)
        before = probability.cumsum(dim=-1).roll(1, dims=-1)  # of the experts in front of this one; the first is kept
        kept = (before < skip["p"]) | (skip["p"] >= 1)  # sums of the softmax may round to 1 before the last
    else:
        kept = torch.arange(weights.shape[-1], device=weights.device).expand_as(weights) < skip["k"]
    kept = kept.clone()
    kept[:, 0] = True
    return kept
