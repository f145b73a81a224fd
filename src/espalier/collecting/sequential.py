"""Methods whose later layers see the earlier ones compressed: one pass over the layers that decides as it goes.

Two token streams pass each decoder layer while it is in memory (`models.stream`): the original one, whose MoE block
gives the target, and the compressed one, which has passed the layers as they were decided. The probes see what the
layer's own experts make of the compressed stream, the method decides, the block is changed in memory, and the
compressed stream passes it as changed. That is three passes of the tokens in all, whatever the depth.

Shapes: T tokens, E experts, D hidden.
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from espalier.checkpoints.shape import ModelShape
from espalier.collecting.collect import Observation, Progress
from espalier.collecting.stats import Stats
from espalier.errors import UserError
from espalier.models.experts import ExpertWeights
from espalier.models.observe import BlockObserver, BlockTrace, observe
from espalier.models.running import Running
from espalier.models.runtime import change_block, decoder
from espalier.models.stream import StreamedModel, Turn
from espalier.plans.operations import Operation
from espalier.plans.plan import Plan

Operations = tuple[Operation, ...]


PASSES = 3  # of the tokens: original, compressed before the layer is changed, compressed after


class SequentialMethod(Protocol):
    """A method that is asked for one layer after another; `sequential` is true.

    `plan_layer` gets the statistics of that layer on the compressed stream. To the probes the block's output z is the
    target: what added to this layer's own shared expert gives the uncompressed model's block on the original stream.
    `residual_gram` has one array more, `weight_sum` float32 [T']: what the model's weights of a token add up to.
    """

    @property
    def sequential(self) -> bool: ...

    @property
    def probes(self) -> tuple[str, ...]: ...

    def plan_layer(
        self, stats: Stats, layer: int, shape: ModelShape, experts: ExpertWeights
    ) -> tuple[Operations, dict[str, Any]]: ...

    def finish(self, layers: dict[int, Operations], evidence: dict[int, dict[str, Any]]) -> Plan: ...


@dataclass
class AimedTrace(BlockTrace):
    """A trace whose block output is that of the uncompressed model on the original stream."""

    target: Tensor | None = None  # [T, D]

    def block_output(self) -> Tensor:
        assert self.target is not None
        return self.target

    def rows(self, index: slice | Tensor) -> "AimedTrace":
        cut = super().rows(index)
        assert isinstance(cut, AimedTrace)
        assert self.target is not None
        return replace(cut, target=self.target[index])


def plan_sequentially(
    method: SequentialMethod,
    directory: Path,
    dtype: str,
    running: Running,
    input_ids: Any,
    attention_mask: Any,
    *,
    progress: Progress | None = None,
) -> Plan:
    """Return the plan of a sequential method for the checkpoint in `directory`.

    `input_ids` int [N, L], `attention_mask` int [N, L] or None: tokens where it is 0 are not observed. One decoder
    layer at a time is in memory, and both streams' hidden states, within `running.activation_memory`.
    `progress(done, total)` counts batches over all layers. UserError as `collect`.
    """
    model = StreamedModel(directory, dtype, running.torch_device())
    streams = _Streams(method, model, running, input_ids, attention_mask)
    return streams.plan(ExpertWeights(directory), progress).check(streams.shape)


class _Streams:
    """The original and the compressed hidden states of one pass."""

    def __init__(
        self, method: SequentialMethod, model: StreamedModel, running: Running, input_ids: Any, attention_mask: Any
    ) -> None:
        self.method, self.model = method, model
        self.shape, self.family = model.checkpoint.shape(), model.checkpoint.family
        size = running.collect_batch_size
        self.observation = Observation(self.shape, input_ids, attention_mask, method.probes, size, (0, 1))
        self.count = len(self.observation.batches)
        # The original stream's batches first, then the compressed one's.
        self.batches = self.observation.batches * 2
        self.states = model.activations(self.batches, running.activation_memory, running.scratch)
        self._trace: BlockTrace | None = None  # of the forward pass under way
        self._output = torch.empty(0)  # of its MoE block, [B L, D]

    def plan(self, experts: ExpertWeights, progress: Progress | None) -> Plan:
        layers: dict[int, Operations] = {}
        evidence: dict[int, dict[str, Any]] = {}
        with torch.no_grad(), observe(self.model.model, self.shape.layers, self.family, self._see) as observers:
            by_layer = {observer.layer: observer for observer in observers}
            for turn in self.model.turns(self.batches, self.states):
                observer = by_layer.get(turn.layer)
                if observer is None:
                    for number in range(2 * self.count):
                        turn.run(number)
                else:
                    layers[turn.layer], evidence[turn.layer] = self._decide(turn, observer, experts)
                if progress is not None:
                    progress(turn.layer + 1, len(self.model.layers))
        return self.method.finish(layers, evidence)

    def _decide(self, turn: Turn, observer: BlockObserver, experts: ExpertWeights) -> tuple[Operations, dict[str, Any]]:
        """Run both streams through a layer and return what was decided for its MoE block."""
        block = getattr(decoder(self.model.model).layers[turn.layer], self.family.module)
        handle = block.register_forward_hook(self._see_output)
        try:
            targets = [self._run(turn, observer, number) for number in range(self.count)]
            sums = [self._compare(turn, observer, number, targets[number]) for number in range(self.count)]
            stats = self._statistics(turn.layer, torch.cat(sums))
            operations, evidence = self.method.plan_layer(stats, turn.layer, self.shape, experts)
            change_block(block, operations, self.family, self.shape.renormalise)
            for number in range(self.count, 2 * self.count):
                self._run(turn, observer, number)
        finally:
            handle.remove()
        return operations, evidence

    def _run(self, turn: Turn, observer: BlockObserver, number: int) -> Tensor:
        """Run one batch of either stream and return its MoE block's output, [B L, D]."""
        self.observation.expect(observer, number % self.count)
        turn.run(number)
        return self._output

    def _compare(self, turn: Turn, observer: BlockObserver, number: int, target: Tensor) -> Tensor:
        """Let the probes see the layer's own experts on the compressed stream, which does not move on.

        Return what the weights of each unmasked token add up to, float32 [T].
        """
        before = self.states[self.count + number].clone()
        output = self._run(turn, observer, self.count + number)
        self.states[self.count + number] = before
        trace, rows = self._trace, observer.rows.to(output.device)
        if trace is None:
            raise UserError(f"model, layer {turn.layer}: its MoE block did not run, so it cannot be observed.")
        # A shared expert is in both outputs, and in the routed one in neither.
        own = (target[rows].double() - output[rows].double()) + trace.block_output()
        known = {field.name: getattr(trace, field.name) for field in fields(BlockTrace)}
        self.observation.consume(AimedTrace(**known, target=own))
        return trace.output_weights.float().sum(dim=-1).cpu()

    def _statistics(self, layer: int, weight_sum: Tensor) -> Stats:
        arrays = self.observation.finish(layer)
        gram = arrays.get(("residual_gram", layer))
        if gram is not None:
            gram["weight_sum"] = weight_sum.numpy()[gram["token"]]
        return Stats(self.shape, self.observation.sequence_tokens, arrays)

    def _see(self, trace: BlockTrace) -> None:
        self._trace = trace

    def _see_output(self, block: Any, inputs: Any, output: Any) -> None:
        found = output[0] if isinstance(output, tuple) else output
        self._output = found.reshape(-1, found.shape[-1]).clone()
