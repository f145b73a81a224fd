"""Layer-wise router tuning: each MoE block's output is fitted to the original's, without a pass through the model.

Original and compressed model are streamed side by side, one decoder layer of each in memory. `inputs: original` feeds
a block what the original model feeds its own, and its routed output is to be the original's. `inputs: compressed` feeds
it what the compressed model, tuned so far, does; what comes out of the layer is then to be what comes out of the
original's, so that a block also makes good what the layers before it lost. With norms, a part is the block and the norm
before it.

A token's squared error counts by 1 / ||h||^2, h the original's hidden state after the layer: the next layer's norm
divides by ||h||, and without it the few tokens with huge states would decide alone.

Shapes: N sequences, L tokens, T = B x L tokens of a micro-batch, D hidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from espalier.errors import UserError
from espalier.families import Family
from espalier.models.activations import Activations
from espalier.models.running import Running
from espalier.models.stream import Batch, StreamedModel, Turn
from espalier.training.train import Interruption, Step, Training, TrainingState, shuffled, train
from espalier.training.tune_losses import entropy, router_logits
from espalier.training.tune_settings import Tuning

Progress = Callable[[int, int], None]
Curves = dict[int, list[Step]]  # by decoder layer

NOT_LINEAR = 0.1  # share of a change of the experts' output that the layer's output may miss by rounding


@dataclass
class Fit:
    """What one part is fitted to: a row for each sequence of its inputs, targets [L, D] and tokens' weights [L]."""

    inputs: list[Tensor]
    targets: list[Tensor]
    weights: list[Tensor]  # fp32, their mean over unmasked tokens is 1
    scale: float  # mean over tokens of ||z||^2, z the original's routed output
    mask: Tensor | None  # bool [N, L]

    def batch(self, rows: list[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return inputs [B, L, D], targets [B, L, D], weights [B, L] and the mask [B, L] of some sequences."""
        kinds = (self.inputs, self.targets, self.weights)
        inputs, targets, weights = (torch.stack([each[row] for row in rows]).to(device) for each in kinds)
        return inputs, targets, weights, None if self.mask is None else self.mask[rows].to(device)


class LayerwiseTuner:
    """Tunes the routers `names` (in the live model) of the checkpoint `compressed` against `original`.

    `ids` int64 [N, L], `mask` bool [N, L] or None. `folder` keeps a state for each layer: a tuner that is made again
    with the same `identity` runs the finished layers forward and goes on in the one that was interrupted.
    """

    def __init__(
        self,
        original: Path,
        compressed: Path,
        names: list[str],
        ids: Tensor,
        mask: Tensor | None,
        tuning: Tuning,
        training: Training,
        running: Running,
        dtype: str,
        folder: Path,
        identity: dict[str, Any],
    ) -> None:
        device = running.torch_device()
        self.original = StreamedModel(original, dtype, device, prefetch=False)
        self.compressed = StreamedModel(compressed, dtype, device, prefetch=False)
        self.names, self.mask = set(names), mask
        self.tuning, self.training, self.running = tuning, training, running
        self.folder, self.identity = folder, identity
        self.family = self.compressed.checkpoint.family
        size = running.collect_batch_size
        masks = torch.ones_like(ids) if mask is None else mask
        self.batches = [Batch.of(*part) for part in zip(torch.split(ids, size), torch.split(masks, size), strict=True)]
        self.rows = shuffled(len(ids), tuning.batch, tuning.seed)

    def run(
        self, stop: Interruption, log: Callable[[int, Step], None] | None = None
    ) -> tuple[dict[str, Tensor], Curves]:
        """Tune layer after layer and return the routers, in fp32 on the processor, and each layer's curve.

        `log` hears a layer and each of its steps, once. InterruptedWork between batches and steps when `stop` noticed a
        signal.
        """
        tuned: dict[str, Tensor] = {}
        curves: Curves = {}
        states = [self._room(), self._room()]
        turns = zip(
            self.original.turns(self.batches, states[0]), self.compressed.turns(self.batches, states[1]), strict=True
        )
        own = self.tuning.inputs == "compressed"
        for first, second in turns:
            layer, block = second.layer, getattr(self.compressed.layers[second.layer], self.family.module)
            if not hasattr(block, "experts"):
                with torch.no_grad():
                    for number in range(len(self.batches)):
                        first.run(number)
                        if own:
                            second.run(number)
                continue
            norm = self._norm(first, states[0]) if self.tuning.norms else None
            scale, given, wanted = self._observe(first, norm, stop)
            factor, before = 1.0, wanted
            if own:
                factor = self._factor(second, states[1])
                _, given, before = self._observe(second, norm, stop)
                for number in range(len(self.batches)):
                    wanted[number] = before[number] + (states[0][number] - states[1][number]) / factor
            part = Part(self.compressed.layers[layer], self.family, norm)
            fit = Fit(_sequences(given), _sequences(wanted), self._weights(states[0]), scale, self.mask)
            found, curves[layer] = self._fit(layer, part, fit, stop, log)
            tuned |= {name: tensor.cpu().clone() for name, tensor in found.items()}
            if own:
                self._update(part, given, before, states[1], factor)
        return tuned, curves

    def _room(self) -> Activations:
        # Several of them live at once; each may keep its share of the memory.
        return self.original.activations(self.batches, self.running.activation_memory / 6, self.running.scratch)

    @torch.no_grad()
    def _weights(self, states: Activations) -> list[Tensor]:
        """Return what each token's error counts, [L] a sequence: 1 / ||h||^2, of mean 1 over unmasked tokens."""
        rows = [1 / row.float().square().sum(-1).clamp(min=1e-12) for row in _sequences(states)]
        every = torch.stack(rows)
        mean = (every if self.mask is None else every[self.mask]).double().mean().float()
        return [row / mean for row in rows]

    @torch.no_grad()
    def _norm(self, turn: Turn, states: Activations) -> str:
        """Return the name in its layer of the norm whose output the block gets; UserError when it gets no norm's."""
        layer, before = turn.streamed.layers[turn.layer], states[0].clone()
        outputs: dict[str, Tensor] = {}
        given: list[Tensor] = []
        with contextlib.ExitStack() as stack:
            for name, module in layer.named_modules():
                if type(module).__name__.endswith("Norm"):
                    keep = partial(_keep, outputs, name)
                    stack.enter_context(module.register_forward_hook(keep))
            block = getattr(layer, self.family.module)
            stack.enter_context(
                block.register_forward_pre_hook(
                    lambda module, args, kwargs: given.append(_hidden(args, kwargs)), with_kwargs=True
                )
            )
            turn.run(0)
        states[0] = before
        for name, output in outputs.items():
            if output.data_ptr() == given[0].data_ptr():
                return str(name)
        raise UserError(f"model, layer {turn.layer}: its MoE block gets no norm's output. Use tuning.norms=false.")

    @torch.no_grad()
    def _observe(self, turn: Turn, norm: str | None, stop: Interruption) -> tuple[float, Activations, Activations]:
        """Run a layer on all batches; return the mean ||z||^2 over tokens, the part's inputs and its outputs z."""
        part = Part(turn.streamed.layers[turn.layer], self.family, norm)
        given, outputs = self._room(), self._room()
        total = tokens = 0.0
        with part.calls() as calls:
            for number, batch in enumerate(self.batches):
                turn.run(number)
                inputs, output = calls.pop()
                given[number] = inputs.view(given[number].shape)
                outputs[number] = output.view(outputs[number].shape)
                kept = output if batch.mask is None else output[batch.mask.flatten().bool().to(output.device)]
                total, tokens = total + float(kept.double().square().sum()), tokens + len(kept)
                stop.leave(f"in layer {turn.layer}; the same command goes on from {self.folder}")
        return total / tokens, given, outputs

    @torch.no_grad()
    def _factor(self, turn: Turn, states: Activations) -> float:
        """Return by what the layer multiplies the routed output before it adds it to the rest: 1 in most families."""
        part, before = Part(turn.streamed.layers[turn.layer], self.family, None), states[0].clone()
        results, routed = [], torch.empty(0)
        for times in (1.0, 2.0):
            states[0] = before
            scaled = partial(_times, times)
            with part.calls() as calls, part.block.experts.register_forward_hook(scaled):
                turn.run(0)
            routed = calls[0][1].double().cpu().view(states[0].shape)
            results.append(states[0].double())
        states[0] = before
        change = results[1] - results[0]
        factor = float((change * routed).sum() / routed.square().sum())
        missed = float((change - factor * routed).norm() / change.norm())
        if not missed < NOT_LINEAR or factor == 0:
            raise UserError(
                f"model, layer {turn.layer}: the experts' output is not simply added to the layer's ({missed:.0%} of a "
                "change is something else). Use tuning.inputs=original."
            )
        return factor

    def _fit(
        self,
        layer: int,
        part: Part,
        fit: Fit,
        stop: Interruption,
        log: Callable[[int, Step], None] | None,
    ) -> tuple[dict[str, Tensor], list[Step]]:
        device = self.compressed.device
        prefix = next(f"{name}." for name, module in self.compressed.model.named_modules() if module is part.layer)
        full = {id(parameter): f"{prefix}{name}" for name, parameter in part.layer.named_parameters()}
        names = {name: full[id(parameter)] for name, parameter in part.named_parameters()}
        for name, parameter in part.named_parameters():
            parameter.requires_grad_(names[name] in self.names)

        def losses(part: Part, batch: tuple[Tensor, Tensor, Tensor, Tensor | None]) -> dict[str, Tensor]:
            inputs, targets, weights, mask = batch
            seen.clear()
            part(inputs)
            wrong = (calls.pop()[1].float() - targets.flatten(0, 1).float()).square().sum(-1) * weights.flatten()
            if mask is not None:
                wrong = wrong[mask.flatten()]
            terms = {"output": wrong.mean() / fit.scale}
            if self.tuning.entropy:
                terms["entropy"] = self.tuning.entropy * entropy(seen, mask)
            return terms

        state = TrainingState(self.folder / f"layer-{layer}.safetensors", self.identity | {"layer": layer})
        told = None if log is None else lambda step: log(layer, step)
        routers = [getattr(part.block, self.family.router_module)]
        with part.calls() as calls, router_logits(routers, 1 if self.family.scales_input else 0) as seen:
            trained = train(
                part,
                losses,
                lambda number: fit.batch(self.rows(number), device),
                self.training,
                state=state,
                stop=stop,
                log=told,
            )
        part.requires_grad_(False)
        return {names[name]: tensor for name, tensor in trained.parameters.items()}, trained.curve

    @torch.no_grad()
    def _update(self, part: Part, given: Activations, before: Activations, states: Activations, factor: float) -> None:
        """Put what the tuned part changes into the layer's outputs."""
        with part.calls() as calls:
            for number in range(len(self.batches)):
                part(given[number].to(self.compressed.device))
                change = calls.pop()[1].view(before[number].shape).to(before[number].device) - before[number]
                states[number] = states[number] + factor * change


class Part(nn.Module):
    """What is fitted of a decoder layer: its MoE block, with `norm` also the norm of that name before it."""

    def __init__(self, layer: nn.Module, family: Family, norm: str | None) -> None:
        super().__init__()
        self.block: Any = getattr(layer, family.module)
        self.norm: Any = None if norm is None else layer.get_submodule(norm)
        self.scales_input = family.scales_input
        self.layer: nn.Module
        self.__dict__["layer"] = layer  # not one of its modules: it holds more than the part

    def forward(self, hidden: Tensor) -> Any:
        return self.block(hidden if self.norm is None else self.norm(hidden))

    @contextlib.contextmanager
    def calls(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Yield a list that gets the part's input and output [T, D] of each call inside, whoever calls it.

        The output is what the experts add together, without a shared expert; with a norm, what the block returns.
        """
        calls: list[tuple[Tensor, Tensor]] = []
        inputs: list[Tensor] = []

        def keep_input(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            inputs[:] = [_hidden(args, kwargs)]

        def keep_output(module: Any, args: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            if self.scales_input and self.norm is None:  # [E x T, D]: every expert runs on every token
                output = output.view(module.num_experts, -1, output.shape[-1]).sum(0)
            calls.append((inputs[0], output.flatten(0, -2)))

        first, last = (self.block, self.block.experts) if self.norm is None else (self.norm, self.block)
        with (
            first.register_forward_pre_hook(keep_input, with_kwargs=True),
            last.register_forward_hook(keep_output),
        ):
            yield calls


def _hidden(args: Any, kwargs: dict[str, Any]) -> Tensor:
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def _keep(outputs: dict[str, Tensor], name: str, module: nn.Module, args: Any, output: Tensor) -> None:
    outputs[name] = output


def _times(times: float, module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * times


def _sequences(activations: Activations) -> list[Tensor]:
    """Return the rows [L, D] of all batches, one a sequence, sharing their memory."""
    return [row for number in range(len(activations.shapes)) for row in activations[number]]
