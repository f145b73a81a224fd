"""Observe the MoE blocks of a running model through transformers' experts interface, alike in every family.

`ALL_EXPERTS_FUNCTIONS` looks up by name how a block computes its experts, for all families that have stacked
experts. The entry registered here computes the chosen experts once, without their weights, with the library's
own `grouped_mm`; the weighted sum of that is bit for bit what `grouped_mm` returns, and the unweighted outputs
are what the probes need, so observing routed outputs costs no expert twice. Llama 4 is outside that interface:
its block runs every expert on every token, scaled by the router, and what the experts return is read there.

Shapes: T tokens, E experts, K chosen experts a token, D hidden.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from espalier.errors import UserError
from espalier.families import Family
from espalier.models.live_skip import paid_attention
from espalier.models.runtime import decoder
from espalier.plans.operations import NO_ATTENTION_WEIGHTS

NAME = "espalier_observe"
CHUNK_BYTES = 2**29  # of all experts' outputs in float64, the largest thing that a probe holds


def inner_activation(experts: Any, hidden: Tensor, expert: int) -> Tensor:
    """Return what the down projection of one expert gets, [T, F], for `hidden` [T, D], in the experts' dtype."""
    if not hasattr(experts, "_is_expert_parallel"):  # Llama 4's, which say nothing of their layout
        gate, up = (hidden.to(experts.gate_up_proj.dtype) @ experts.gate_up_proj[expert]).chunk(2, dim=-1)
        scaled: Tensor = up * experts.act_fn(gate)
        return scaled
    if experts.has_gate:
        gated: Tensor = experts._apply_gate(_project(experts, hidden, "gate_up_proj", expert))
        return gated
    plain: Tensor = experts.act_fn(_project(experts, hidden, "up_proj", expert))
    return plain


def expert_output(experts: Any, hidden: Tensor, expert: int) -> Tensor:
    """Return the unweighted output [T, D] of one expert on `hidden` [T, D], in the experts' dtype.

    Uses only what the stacked module says of its layout: transposed, biased, gated or not.
    """
    output = _project(experts, inner_activation(experts, hidden, expert), "down_proj", expert)
    if getattr(experts, "has_post_expert_norm", False):
        output = experts.post_expert_norm(output)
    return output


def _project(experts: Any, x: Tensor, name: str, expert: int) -> Tensor:
    weight = getattr(experts, name)[expert]
    x = x.to(weight.dtype) @ (weight if getattr(experts, "is_transposed", True) else weight.T)
    return x + getattr(experts, f"{name}_bias")[expert] if getattr(experts, "has_bias", False) else x


@dataclass
class BlockTrace:
    """What one MoE block did in one forward pass, for the unmasked tokens in the order of the sequences.

    `weights` and `indices` are what the experts were called with: an index equal to E stands for no expert.
    `router_weights` are the router's own, before a compressed checkpoint's code merges or drops any.

    Most blocks add w f(x) for a chosen expert f with weight w. Where the router scales the experts' input
    (Llama 4) they add f(w x): `routed` holds that, and `scales` the weight of every expert if it were chosen.
    """

    layer: int
    experts: Any  # the stacked experts module
    token: Tensor  # int64 [T], index among all unmasked calibration tokens
    hidden: Tensor  # [T, D], input of the block
    logits: Tensor  # float32 [T, router rows]
    router_weights: Tensor  # [T, K]
    router_indices: Tensor  # int64 [T, K]
    indices: Tensor  # int64 [T, K]
    weights: Tensor  # [T, K]
    routed: Tensor  # [T, K, D], outputs of the chosen experts, which no weight has multiplied
    scales: Tensor | None = None  # [T, router rows]
    attention: Tensor | None = None  # float32 [T], that each is paid by the tokens of its sequence from it on; the mean
    _outputs: Tensor | None = field(default=None, repr=False)
    _candidates: Tensor | None = field(default=None, repr=False)

    @property
    def output_weights(self) -> Tensor:
        """What multiplies `routed` in the block's sum, [T, K]: ones where the weights are in the input already."""
        return self.weights if self.scales is None else torch.ones_like(self.weights)

    def block_output(self) -> Tensor:
        """Return the weighted sum of the routed outputs, float64 [T, D]; a shared expert has no part in it."""
        return torch.einsum("tkd,tk->td", self.routed.double(), self.output_weights.double())

    def outputs(self) -> Tensor:
        """Return f(x), every expert's output on every token itself, [E, T, D] in the experts' dtype.

        Only the pairs that the router did not choose are computed, once; see `chunks` for the memory. Where the
        router scales the input all are: what the block runs is not f(x).
        """
        if self._outputs is None:
            if self.scales is None:
                self._outputs = self._beside_routed(None)
            else:
                every = [expert_output(self.experts, self.hidden, e) for e in range(self.experts.num_experts)]
                self._outputs = torch.stack(every)
        return self._outputs

    def candidates(self) -> Tensor:
        """Return what every expert's weight multiplies if it is chosen, [E, T, D]: f(x), or f(s x) and weight 1."""
        if self.scales is None:
            return self.outputs()
        if self._candidates is None:
            self._candidates = self._beside_routed(self.scales)
        return self._candidates

    def _beside_routed(self, scales: Tensor | None) -> Tensor:
        """Return the outputs [E, T, D], those of the chosen experts from `routed`, the others computed."""
        experts = self.experts.num_experts
        outputs = self.routed.new_empty(experts, *self.hidden.shape)
        chosen = self.indices < experts  # [T, K]
        outputs[self.indices[chosen], chosen.nonzero()[:, 0]] = self.routed[chosen]
        for e in range(experts):
            rest = (self.indices != e).all(-1).nonzero()[:, 0]
            x = self.hidden[rest] if scales is None else self.hidden[rest] * scales[rest, e : e + 1]
            outputs[e, rest] = expert_output(self.experts, x, e)
        return outputs

    def rows(self, index: slice | Tensor) -> "BlockTrace":
        """Return the trace of some of the tokens; it shares the outputs that are computed already."""
        by_token = [
            "token",
            "hidden",
            "logits",
            "router_weights",
            "router_indices",
            "indices",
            "weights",
            "routed",
            "scales",
            "attention",
        ]
        cut: dict[str, Any] = {}
        for name in (*by_token, "router_weights", "router_indices"):
            cut[name] = None if getattr(self, name) is None else getattr(self, name)[index]
        for name in ("_outputs", "_candidates"):
            cut[name] = None if getattr(self, name) is None else getattr(self, name)[:, index]
        return replace(self, **cut)

    def chunks(self) -> Iterator["BlockTrace"]:
        """Yield the trace in pieces of tokens for which all experts' float64 outputs fit into CHUNK_BYTES."""
        tokens, hidden = self.hidden.shape
        limit = max(1, CHUNK_BYTES // (8 * self.experts.num_experts * hidden))
        if tokens <= limit:
            yield self
            return
        for start in range(0, tokens, limit):
            yield self.rows(slice(start, start + limit))


class BlockObserver:
    """Makes a BlockTrace of each forward pass of one MoE block and hands it to `consume`."""

    def __init__(self, layer: int, consume: Callable[[BlockTrace], None]) -> None:
        self.layer = layer
        self.consume = consume
        self.calls = 0
        self.rows = torch.empty(0, dtype=torch.int64)
        self.first = 0
        self._router: tuple[Tensor, ...] | None = None
        self._attention: Tensor | None = None

    def expect(self, rows: Tensor, first: int) -> None:
        """Say which flat rows of the next batch are unmasked, and the index of the first among all tokens."""
        self.rows, self.first = rows, first

    def router_hook(self, module: nn.Module, args: Any, output: Any) -> None:
        """Keep the input [T, D] of the router and what it returns: logits, weights, indices; or scores, logits."""
        self._router = (args[0], *output)

    def attention_hook(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Keep what attention each token is paid, [B L]."""
        found = paid_attention(module, kwargs, output)
        # A sequence of one token pays all its attention to that.
        self._attention = torch.ones(len(output[0]), device=output[0].device) if found is None else found[0].flatten()

    def run(self, experts: Any, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """Return the block's output [T, D] as `grouped_mm` gives it, and hand over the trace."""
        tokens, chosen = indices.shape
        ones = hidden.new_ones(tokens * chosen, 1)
        each = hidden.repeat_interleave(chosen, dim=0)  # one row for each (token, chosen expert)
        routed = grouped_mm_experts_forward(experts, each, indices.reshape(-1, 1), ones).view(tokens, chosen, -1)
        routed.masked_fill_((indices >= experts.num_experts).unsqueeze(-1), 0.0)  # "no expert" rows are uninitialised
        output: Tensor = (routed * weights.unsqueeze(-1)).sum(dim=1).to(hidden.dtype)
        _, logits, router_weights, router_indices, *_ = self._of_router()
        self._hand_over(
            experts,
            hidden=hidden,
            logits=logits.reshape(tokens, -1),
            router_weights=router_weights,
            router_indices=router_indices,
            indices=indices,
            weights=weights,
            routed=routed,
        )
        return output

    def experts_hook(self, experts: Any, args: Any, output: Tensor) -> None:
        """Hand over the trace of experts that all ran on every token, in turn: `output` is [E * T, D].

        The router (of Llama 4) gave them x times the sigmoid of its largest logit, or times 0.
        """
        hidden, scores, logits = self._of_router()  # [T, D], [T, E], [T, router rows]
        weights, indices = scores.max(dim=-1, keepdim=True)
        outputs = output.view(experts.num_experts, *hidden.shape)
        routed = outputs[indices[:, 0], torch.arange(len(hidden), device=hidden.device)].unsqueeze(1)
        self._hand_over(
            experts,
            hidden=hidden,
            logits=logits,
            router_weights=weights,
            router_indices=logits.topk(1, dim=-1).indices,  # rows, where `scores` may be those of merged experts
            indices=indices.masked_fill(weights == 0, experts.num_experts),  # a score may round to 0: then nothing ran
            weights=weights,
            routed=routed,
            scales=logits.float().sigmoid().to(hidden.dtype),
        )

    def _of_router(self) -> tuple[Tensor, ...]:
        if self._router is None:
            raise UserError(f"model, layer {self.layer}: its experts ran without its router; it cannot be observed.")
        kept, self._router = self._router, None
        return kept

    def _hand_over(self, experts: Any, **values: Tensor) -> None:
        """Make the trace of the expected rows of `values` [T, ...]."""
        tokens, device = len(values["hidden"]), values["hidden"].device
        self.calls += 1
        kept = slice(None) if len(self.rows) == tokens else self.rows.to(device)  # a slice copies nothing
        cut: dict[str, Any] = {name: value[kept] for name, value in values.items()}
        if self._attention is not None:
            cut["attention"], self._attention = self._attention[kept], None
        cut["logits"] = cut["logits"].float()
        token = torch.arange(self.first, self.first + len(self.rows), device=device)
        self.consume(BlockTrace(layer=self.layer, experts=experts, token=token, **cut))


def _observed_experts(experts: Any, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    observer: BlockObserver = experts.espalier_observer
    return observer.run(experts, hidden, indices, weights)


@contextlib.contextmanager
def observe(
    model: Any,
    layers: tuple[int, ...],
    family: Family,
    consume: Callable[[BlockTrace], None],
    attention: bool = False,
) -> Iterator[list[BlockObserver]]:
    """Observe the MoE blocks of `layers` for the duration of the context; then the model is as it was.

    Before each forward pass call `expect` of every yielded observer. With `attention` traces say what attention each
    token is paid; the model then computes attention the plain way (`eager`), which differs by rounding. UserError when
    a block does not look its experts up in transformers' experts interface, or is not the stock one where the family
    has its own, and for attention that a layer has not.
    """
    if attention and family.model_type in NO_ATTENTION_WEIGHTS:
        raise UserError(
            f"model: {family.model_type} has layers without attention weights, which tell a token's importance. Use a "
            "method that protects no tokens."
        )
    ALL_EXPERTS_FUNCTIONS.register(NAME, _observed_experts)
    with contextlib.ExitStack() as undo:
        observers = []
        configs = {}
        for layer in layers:
            block = getattr(decoder(model).layers[layer], family.module)
            experts = block.experts
            if not hasattr(experts, "gate_up_proj" if family.scales_input else "_is_expert_parallel"):
                raise UserError(
                    f"model, layer {layer}: {type(experts).__name__} does not use transformers' experts interface, "
                    "so it cannot be observed. Use a stock class of transformers."
                )
            observer = BlockObserver(layer, consume)
            undo.callback(getattr(block, family.router_module).register_forward_hook(observer.router_hook).remove)
            if family.scales_input:
                undo.callback(experts.register_forward_hook(observer.experts_hook).remove)
            else:
                experts.espalier_observer = observer
                undo.callback(delattr, experts, "espalier_observer")
                configs[id(experts.config)] = experts.config
            if attention:
                module = decoder(model).layers[layer].self_attn
                undo.callback(module.register_forward_hook(observer.attention_hook, with_kwargs=True).remove)
            observers.append(observer)
        # Not through model.set_experts_implementation: that one ignores classes from a checkpoint's own code.
        for config in configs.values():
            undo.callback(setattr, config, "_experts_implementation", config._experts_implementation)
            config._experts_implementation = NAME
        if attention:
            config = decoder(model).config
            undo.callback(setattr, config, "_attn_implementation", config._attn_implementation)
            config._attn_implementation = "eager"
        yield observers
