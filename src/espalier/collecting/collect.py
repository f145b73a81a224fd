"""Collect: one forward pass over the calibration tokens that feeds every probe asked for."""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from espalier.checkpoints.checkpoint import Checkpoint
from espalier.checkpoints.shape import DenseShape, ModelShape
from espalier.collecting.resume import CollectState
from espalier.collecting.stats import Array, Stats
from espalier.dense_families import DenseFamily
from espalier.errors import UserError, nearest
from espalier.families import Family
from espalier.machine import heap
from espalier.models.observe import BlockObserver, BlockTrace, observe
from espalier.models.observe_attention import AttentionObserver, AttentionTrace, observe_attention
from espalier.models.observe_ffn import FFNObserver, FFNTrace, observe_ffns
from espalier.models.running import Running
from espalier.models.runtime import decoder, load
from espalier.models.stream import Batch, StreamedModel
from espalier.probes import DENSE_PROBES, LAYER_PROBES, PROBES, DenseProbe, LayerProbe, Probe

Progress = Callable[[int, int], None]
Shard = tuple[int, int]  # number from 0, of how many
Results = dict[tuple[str, int], dict[str, Array]]
Observer = BlockObserver | FFNObserver | AttentionObserver

WHOLE: Shard = (0, 1)


def collect(
    model: Any,
    shape: ModelShape | DenseShape,
    family: Family | DenseFamily,
    input_ids: Any,
    attention_mask: Any,
    probes: Sequence[str],
    *,
    batch_size: int = 8,
    shard: Shard = WHOLE,
    progress: Progress | None = None,
) -> Stats:
    """Run `model` once over `input_ids` int [N, L] and return what `probes` observed.

    `attention_mask` int [N, L] or None: tokens where it is 0 are not observed. `batch_size` sequences run
    together; it bounds memory and does not change the result but by rounding. `shard` (i, n): only the i-th of n
    runs of the sequences, from 0; `espalier.collecting.reduce` joins the results. `progress(done, total)` is called
    after each batch with numbers of sequences. The model is left as it was.

    UserError: unknown probe, weights that are not finite (names the tensor), experts' outputs or results that
    are not finite (names the layer), a sequence without tokens, a probe that a merged checkpoint cannot feed.
    """
    observation = Observation(shape, input_ids, attention_mask, probes, batch_size, shard)
    check_weights(model)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), observation.observe(model, family) as observers:
            for number, batch in enumerate(observation.batches):
                for observer in observers:
                    observation.expect(observer, number)
                _forward(model, batch)
                heap.trim()  # else the pieces that probes keep hold what this batch freed between them
                if progress is not None:
                    progress(min((number + 1) * batch_size, observation.sequences), observation.sequences)
            for observer in observers:
                observation.check_calls(observer)
    finally:
        model.train(was_training)
    results: Results = {}
    for layer in observation.layers:
        results |= observation.finish(layer)
    return Stats(shape, observation.sequence_tokens, results)


def collect_streamed(
    model: StreamedModel,
    shape: ModelShape | DenseShape,
    family: Family | DenseFamily,
    input_ids: Any,
    attention_mask: Any,
    probes: Sequence[str],
    *,
    batch_size: int = 8,
    shard: Shard = WHOLE,
    activation_memory: float = float("inf"),
    scratch: Path | None = None,
    state: CollectState | None = None,
    progress: Progress | None = None,
) -> Stats:
    """Return what `collect` returns, of a model of which one decoder layer at a time is in memory.

    `activation_memory` bytes of hidden states are held in memory, more in a file below `scratch`. With `state`
    finished layers are not run again after an interruption; the caller removes it when the result is safe.
    `progress(done, total)` counts batches over all layers.
    """
    observation = Observation(shape, input_ids, attention_mask, probes, batch_size, shard)
    batches, layers = observation.batches, len(model.layers)
    states = model.activations(batches, activation_memory, scratch)
    first = state.layers if state is not None else 0
    results: Results = {}
    if state is not None and first:
        for layer in (layer for layer in observation.layers if layer < first):
            results |= state.stats(layer).arrays
        state.load(states)
        model.returns_tuple = state.returns_tuple
    with torch.no_grad(), observation.observe(model.model, family) as observers:
        for turn in model.turns(batches, states, first):
            own = [observer for observer in observers if observer.layer == turn.layer]
            for number in range(len(batches)):
                for observer in own:
                    observation.expect(observer, number)
                turn.run(number)
                if progress is not None:
                    progress(turn.layer * len(batches) + number + 1, layers * len(batches))
            found: Results = {}
            if own:
                for observer in own:
                    observation.check_calls(observer)
                found = observation.finish(turn.layer)
                results |= found
            if state is not None:
                layer_stats = Stats(shape, observation.sequence_tokens, found) if found else None
                state.save(turn.layer, layer_stats, states, model.returns_tuple)
    return Stats(shape, observation.sequence_tokens, results)


def collect_checkpoint(
    directory: Path,
    dtype: str,
    running: Running,
    input_ids: Any,
    attention_mask: Any,
    probes: Sequence[str],
    *,
    state: Path | None = None,
    shard: Shard = WHOLE,
    progress: Progress | None = None,
) -> Stats:
    """Collect from the model in `directory`, loaded whole or streamed as `running` says.

    `state`: a folder for what an interrupted streamed collection has done. A second call with the same arguments
    continues from it; the caller removes it when the result is safe.
    """
    checkpoint = Checkpoint(directory)
    shape = checkpoint.any_shape()
    family = checkpoint.dense_family if checkpoint.is_dense else checkpoint.family
    device, batch_size = running.torch_device(), running.collect_batch_size
    if not running.streams(checkpoint, dtype):
        model = load(directory, dtype, device)
        with naming_file(checkpoint):
            return collect(
                model,
                shape,
                family,
                input_ids,
                attention_mask,
                probes,
                batch_size=batch_size,
                shard=shard,
                progress=progress,
            )
    kept = None
    if state is not None:
        tokens = hashlib.sha256(np.ascontiguousarray(input_ids).tobytes())
        if attention_mask is not None:
            tokens.update(np.ascontiguousarray(attention_mask).tobytes())
        identity = {
            "files": checkpoint.fingerprint,
            "tokens": tokens.hexdigest(),
            "probes": sorted(probes),
            "shard": shard,
        }
        # How the tokens are cut into batches and where they run decides about rounding.
        kept = CollectState(state, identity | {"batch_size": batch_size, "device": device, "dtype": dtype})
    return collect_streamed(
        StreamedModel(directory, dtype, device),
        shape,
        family,
        input_ids,
        attention_mask,
        probes,
        batch_size=batch_size,
        shard=shard,
        activation_memory=running.activation_memory,
        scratch=running.scratch,
        state=kept,
        progress=progress,
    )


class Observation:
    """The calibration tokens in micro-batches, and the probes that see them, a set for each layer."""

    def __init__(
        self,
        shape: ModelShape | DenseShape,
        input_ids: Any,
        attention_mask: Any,
        probes: Sequence[str],
        batch_size: int,
        shard: Shard,
    ) -> None:
        known = list(DENSE_PROBES if isinstance(shape, DenseShape) else PROBES)
        for name in probes:
            if name not in (*known, *LAYER_PROBES):
                raise UserError(f"probe {name!r} is unknown; {nearest(name, [*known, *LAYER_PROBES])}.")
        ids = torch.as_tensor(input_ids)
        mask = torch.ones_like(ids, dtype=torch.bool)
        if attention_mask is not None:
            mask = torch.as_tensor(attention_mask).bool()
        self.shape = shape
        every = tuple(mask.sum(1).tolist())
        if 0 in every:
            raise UserError(f"attention_mask: sequence {every.index(0)} has no unmasked token. Remove it.")
        number, shards = shard
        if shards > len(ids):
            raise UserError(f"calibration.shards={shards}: there are {len(ids)} sequences. Use at most as many shards.")
        start, stop = (len(ids) * edge // shards for edge in (number, number + 1))
        ids, mask = ids[start:stop], mask[start:stop]
        self.sequences = len(ids)
        self.sequence_tokens = every[start:stop]
        self._tokens = sum(every)
        parts = list(zip(torch.split(ids, batch_size), torch.split(mask, batch_size), strict=True))
        self.batches = [Batch.of(*part) for part in parts]
        self._masks = [part for _, part in parts]
        self._rows = [part.flatten().nonzero()[:, 0] for _, part in parts]
        self._first = np.cumsum([sum(every[:start]), *map(len, self._rows)]).tolist()
        self._names = [name for name in known if name in probes]
        self._probes: dict[int, dict[str, Probe]] = {}
        self._dense_probes: dict[int, dict[str, DenseProbe]] = {}
        self._layer_names = [name for name in LAYER_PROBES if name in probes]
        self._layer_probes: dict[int, dict[str, LayerProbe]] = {}
        decoder_shape = shape.decoder
        if self._layer_names and (decoder_shape is None or not decoder_shape.attends or decoder_shape.refused):
            name = self._layer_names[0]
            raise UserError(f"probe {name} needs softmax attention over whole sequences, which {shape.family} has not.")
        self._attends = decoder_shape.attends if self._layer_names and decoder_shape is not None else ()

    @property
    def layers(self) -> list[int]:
        """The layers of which something is observed, ascending."""
        return sorted({*(self.shape.layers if self._names else ()), *self._attends})

    @contextlib.contextmanager
    def observe(self, model: Any, family: Family | DenseFamily) -> Iterator[list[Observer]]:
        """Observe the model's MoE blocks, with attention where a probe looks at it, or FFNs; and its attention."""
        with contextlib.ExitStack() as stack:
            observers: list[Observer] = []
            if self._names and isinstance(family, DenseFamily):
                observers += stack.enter_context(observe_ffns(model, self.shape.layers, family, self.consume_ffn))
            elif self._names and isinstance(family, Family):
                attention = any(getattr(PROBES[name], "attention", False) for name in self._names)
                observers += stack.enter_context(observe(model, self.shape.layers, family, self.consume, attention))
            if self._layer_names:
                where = family.parts.attention
                observers += stack.enter_context(observe_attention(model, self._attends, where, self.consume_attention))
            yield observers

    def expect(self, observer: Observer, number: int) -> None:
        """Prepare an observer for the batch `number`."""
        if isinstance(observer, AttentionObserver):
            observer.expect(self._masks[number])
        else:
            observer.expect(self._rows[number], self._first[number])

    def consume_attention(self, trace: AttentionTrace) -> None:
        """Feed the layer probes of the trace's layer."""
        if trace.layer not in self._layer_probes:
            self._layer_probes[trace.layer] = {name: LAYER_PROBES[name]() for name in self._layer_names}
        if not torch.isfinite(trace.weights).all():
            raise _not_finite(trace.layer, "attention weights", trace.weights)
        for probe in self._layer_probes[trace.layer].values():
            probe.update(trace)

    def consume_ffn(self, trace: FFNTrace) -> None:
        """Feed the probes of the trace's layer."""
        assert isinstance(self.shape, DenseShape)
        if trace.layer not in self._dense_probes:
            own = {name: DENSE_PROBES[name](self.shape, self._tokens) for name in self._names}
            self._dense_probes[trace.layer] = own
        if not torch.isfinite(trace.inner).all():
            raise _not_finite(trace.layer, "activations of its FFN", trace.hidden)
        for probe in self._dense_probes[trace.layer].values():
            probe.update(trace)

    def consume(self, trace: BlockTrace) -> None:
        """Feed the probes of the trace's layer."""
        assert isinstance(self.shape, ModelShape)
        if trace.layer not in self._probes:
            self._probes[trace.layer] = {name: PROBES[name](self.shape, self._tokens) for name in self._names}
        probes = self._probes[trace.layer]
        _check_trace(trace, self.shape, probes)
        dense = any(probe.dense for probe in probes.values())
        for part in trace.chunks() if dense else (trace,):
            for probe in probes.values():
                probe.update(part)

    def check_calls(self, observer: Observer) -> None:
        """Raise UserError when the block did not run once a batch."""
        if observer.calls != len(self.batches):
            kinds = {FFNObserver: "FFN", BlockObserver: "MoE block", AttentionObserver: "attention"}
            what = kinds[type(observer)]
            raise UserError(
                f"model, layer {observer.layer}: its {what} ran {observer.calls} times in {len(self.batches)} "
                "forward passes, so it cannot be observed. Use a stock class of transformers."
            )

    def finish(self, layer: int) -> Results:
        """Return the results of a layer's probes and forget them; UserError when they are not finite."""
        results: Results = {}
        every = (self._dense_probes, self._probes, self._layer_probes)
        for kind in every:
            for name, probe in kind.pop(layer, {}).items():  # type: ignore[attr-defined]
                results[name, layer] = probe.result()
        for (name, _), result in results.items():
            for key, array in result.items():
                if not np.isfinite(array).all():
                    raise UserError(
                        f"model, layer {layer}: probe {name} gave {np.sum(~np.isfinite(array))} values of {key} that "
                        "are not finite. Load the model with dtype=float32 or bfloat16."
                    )
        return results


class NotFiniteError(UserError):
    """A loaded parameter holds a NaN or an infinity."""


@contextlib.contextmanager
def naming_file(checkpoint: Checkpoint) -> Iterator[None]:
    """Turn a NotFiniteError into the UserError that names the shard and its tensor.

    It stays where the files are sound: numbers that the dtype of the loaded model cannot hold.
    """
    try:
        yield
    except NotFiniteError:
        for name in checkpoint.entries:
            checkpoint.finite_tensor(name)
        raise


def check_weights(model: Any) -> None:
    """Raise NotFiniteError naming the first parameter of `model` that holds a NaN or an infinity."""
    for name, parameter in model.named_parameters():
        # aminmax needs no second copy, and both ends are NaN when any value is.
        if parameter.is_floating_point() and not all(torch.isfinite(end) for end in torch.aminmax(parameter.detach())):
            bad = [int(row) for row in range(len(parameter)) if not torch.isfinite(parameter[row]).all()]
            kind = "expert" if parameter.ndim == 3 else "row"
            raise NotFiniteError(
                f"model: parameter {name} holds NaN or infinite values in {len(bad)} of {len(parameter)} {kind}s "
                f"(first: {kind} {bad[0]}). The checkpoint is damaged; fetch it again."
            )


def _forward(model: Any, batch: Batch) -> None:
    """Run the decoder without its output head, which no probe looks at."""
    device = model.get_input_embeddings().weight.device
    decoder(model)(
        input_ids=batch.ids.to(device),
        attention_mask=None if batch.mask is None else batch.mask.to(device),
        use_cache=False,
    )


def _check_trace(trace: BlockTrace, shape: ModelShape, probes: dict[str, Probe]) -> None:
    rows = trace.logits.shape[-1]
    for name, probe in probes.items():
        if rows != shape.experts and not probe.merged:
            raise UserError(
                f"model, layer {trace.layer}: the router has {rows} rows for {shape.experts} experts (a merged "
                f"checkpoint), so probe {name} has no meaning for it. Collect it from the uncompressed model."
            )
    finite = torch.isfinite(trace.logits).all() & torch.isfinite(trace.routed).all()
    if not finite:
        raise _not_finite(trace.layer, "router logits or expert outputs", trace.hidden)


def _not_finite(layer: int, what: str, hidden: torch.Tensor) -> UserError:
    return UserError(
        f"model, layer {layer}: {what} are not finite on calibration tokens "
        f"(dtype {str(hidden.dtype).removeprefix('torch.')}). Load the model with dtype=float32 or bfloat16."
    )
