"""Observe the MoE blocks of a running model through transformers' experts interface, alike in every family.

`ALL_EXPERTS_FUNCTIONS` looks up by name how a block computes its experts, for all families that have stacked
experts. The entry registered here computes the chosen experts once, without their weights, with the library's
own `grouped_mm`; the weighted sum of that is bit for bit what `grouped_mm` returns, and the unweighted outputs
are what the probes need, so observing routed outputs costs no expert twice.

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
from espalier.runtime import decoder

NAME = "espalier_observe"
CHUNK_BYTES = 2**29  # of all experts' outputs in float64, the largest thing that a probe holds


def expert_output(experts: Any, hidden: Tensor, expert: int) -> Tensor:
    """Return the unweighted output [T, D] of one expert on `hidden` [T, D], in the experts' dtype.

    Uses only what the stacked module says of its layout: transposed, biased, gated or not.
    """

    def project(x: Tensor, name: str) -> Tensor:
        weight = getattr(experts, name)[expert]
        x = x.to(weight.dtype) @ (weight if experts.is_transposed else weight.T)
        return x + getattr(experts, f"{name}_bias")[expert] if experts.has_bias else x

    if experts.has_gate:
        inner = experts._apply_gate(project(hidden, "gate_up_proj"))  # [T, F]
    else:
        inner = experts.act_fn(project(hidden, "up_proj"))
    output: Tensor = project(inner, "down_proj")
    return experts.post_expert_norm(output) if getattr(experts, "has_post_expert_norm", False) else output


@dataclass
class BlockTrace:
    """What one MoE block did in one forward pass, for the unmasked tokens in the order of the sequences.

    `weights` and `indices` are what the experts were called with: an index equal to E stands for no expert.
    `router_weights` are the router's own, before a compressed checkpoint's code merges or drops any.
    """

    layer: int
    experts: Any  # the stacked experts module
    token: Tensor  # int64 [T], index among all unmasked calibration tokens
    hidden: Tensor  # [T, D], input of the block
    logits: Tensor  # float32 [T, router rows]
    router_weights: Tensor  # [T, K]
    indices: Tensor  # int64 [T, K]
    weights: Tensor  # [T, K]
    routed: Tensor  # [T, K, D], unweighted outputs of the chosen experts
    _outputs: Tensor | None = field(default=None, repr=False)

    def block_output(self) -> Tensor:
        """Return the weighted sum of the routed outputs, float64 [T, D]; a shared expert has no part in it."""
        return torch.einsum("tkd,tk->td", self.routed.double(), self.weights.double())

    def outputs(self) -> Tensor:
        """Return every expert's unweighted output on every token, [E, T, D] in the experts' dtype.

        Only the pairs that the router did not choose are computed, once; see `chunks` for the memory.
        """
        if self._outputs is None:
            experts = self.experts.num_experts
            outputs = self.routed.new_empty(experts, *self.hidden.shape)
            chosen = self.indices < experts  # [T, K]
            outputs[self.indices[chosen], chosen.nonzero()[:, 0]] = self.routed[chosen]
            for e in range(experts):
                rest = (self.indices != e).all(-1).nonzero()[:, 0]
                outputs[e, rest] = expert_output(self.experts, self.hidden[rest], e)
            self._outputs = outputs
        return self._outputs

    def rows(self, index: slice | Tensor) -> "BlockTrace":
        """Return the trace of some of the tokens; it shares the outputs that are computed already."""
        names = ("token", "hidden", "logits", "router_weights", "indices", "weights", "routed")
        cut = {name: getattr(self, name)[index] for name in names}
        return replace(self, **cut, _outputs=None if self._outputs is None else self._outputs[:, index])

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
        self._router: tuple[Tensor, Tensor] | None = None

    def expect(self, rows: Tensor, first: int) -> None:
        """Say which flat rows of the next batch are unmasked, and the index of the first among all tokens."""
        self.rows, self.first = rows, first

    def router_hook(self, module: nn.Module, args: Any, output: Any) -> None:
        """Keep the logits [T, E] and weights [T, K] of the router."""
        logits, weights = output[0], output[1]
        self._router = (logits, weights)

    def run(self, experts: Any, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """Return the block's output [T, D] as `grouped_mm` gives it, and hand over the trace."""
        tokens, chosen = indices.shape
        ones = hidden.new_ones(tokens * chosen, 1)
        each = hidden.repeat_interleave(chosen, dim=0)  # one row for each (token, chosen expert)
        routed = grouped_mm_experts_forward(experts, each, indices.reshape(-1, 1), ones).view(tokens, chosen, -1)
        routed.masked_fill_((indices >= experts.num_experts).unsqueeze(-1), 0.0)  # "no expert" rows are uninitialised
        output: Tensor = (routed * weights.unsqueeze(-1)).sum(dim=1).to(hidden.dtype)
        if self._router is None:
            raise UserError(f"model, layer {self.layer}: its experts ran without its router; it cannot be observed.")
        (logits, router_weights), self._router = self._router, None
        self.calls += 1
        kept = slice(None) if len(self.rows) == tokens else self.rows.to(hidden.device)  # a slice copies nothing
        trace = BlockTrace(
            layer=self.layer,
            experts=experts,
            token=torch.arange(self.first, self.first + len(self.rows), device=hidden.device),
            hidden=hidden[kept],
            logits=logits.reshape(tokens, -1)[kept].float(),
            router_weights=router_weights[kept],
            indices=indices[kept],
            weights=weights[kept],
            routed=routed[kept],
        )
        self.consume(trace)
        return output


def _observed_experts(experts: Any, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    observer: BlockObserver = experts.espalier_observer
    return observer.run(experts, hidden, indices, weights)


@contextlib.contextmanager
def observe(
    model: Any, layers: tuple[int, ...], family: Family, consume: Callable[[BlockTrace], None]
) -> Iterator[list[BlockObserver]]:
    """Observe the MoE blocks of `layers` for the duration of the context; then the model is as it was.

    Before each forward pass call `expect` of every yielded observer. UserError when a block does not look
    its experts up in transformers' experts interface.
    """
    if family.scales_input:
        raise UserError(
            f"model: the router of {family.model_type} scales the experts' input, so their outputs without its weight "
            "cannot be observed. Use method=random or a plan of your own."
        )
    ALL_EXPERTS_FUNCTIONS.register(NAME, _observed_experts)
    with contextlib.ExitStack() as undo:
        observers = []
        configs = {}
        for layer in layers:
            block = getattr(decoder(model).layers[layer], family.module)
            experts = block.experts
            if not hasattr(experts, "_is_expert_parallel"):
                raise UserError(
                    f"model, layer {layer}: {type(experts).__name__} does not use transformers' experts interface, "
                    "so it cannot be observed. Use a stock class of transformers."
                )
            observer = BlockObserver(layer, consume)
            experts.espalier_observer = observer
            undo.callback(delattr, experts, "espalier_observer")
            undo.callback(getattr(block, family.router_module).register_forward_hook(observer.router_hook).remove)
            configs[id(experts.config)] = experts.config
            observers.append(observer)
        # Not through model.set_experts_implementation: that one ignores classes from a checkpoint's own code.
        for config in configs.values():
            undo.callback(setattr, config, "_experts_implementation", config._experts_implementation)
            config._experts_implementation = NAME
        yield observers
