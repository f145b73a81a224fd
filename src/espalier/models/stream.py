"""Models larger than memory: one decoder layer at a time is loaded, and all tokens pass it before the next is.

The model is built on the meta device. For each layer in turn its tensors are read from the files while the layer
before still computes, and the ordinary `model.forward` runs once a micro-batch with all other layers passing
their input on: masks, positions and layer types are transformers' own in every family. The layer's input comes
from the stored activations of the layer before; the forward is left as soon as the layer has run.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from espalier.checkpoints.checkpoint import Checkpoint
from espalier.checkpoints.weights import WeightMap
from espalier.machine import heap
from espalier.models import runtime
from espalier.models.activations import Activations


@dataclass(frozen=True)
class Batch:
    """A micro-batch: `ids` int64 [B, L]; `mask` [B, L] is None where no token is padding."""

    ids: Tensor
    mask: Tensor | None = None

    @classmethod
    def of(cls, ids: Tensor, mask: Tensor) -> Batch:
        return cls(ids.long(), None if bool(mask.all()) else mask.long())


class _LeftError(Exception):
    """The forward pass was left after the layer whose turn it was."""


class StreamedModel:
    """A causal model of which one decoder layer (and the next, being read) is in memory.

    `model` is the transformers model; hooks can be put on its modules as on those of any other. `dtype` is what it
    computes in, `auto` for the checkpoint's own. Without `prefetch` only one layer is held at a time. `prepare` may
    change a layer, given its index and the loaded module, before it runs.

    UserError when the files do not give all tensors of the model.
    """

    def __init__(
        self,
        directory: Path,
        dtype: torch.dtype | str = "auto",
        device: str = "cpu",
        *,
        prefetch: bool = True,
        prepare: Callable[[int, nn.Module], None] | None = None,
    ) -> None:
        heap.bound_primitives()
        self.checkpoint = Checkpoint(directory)
        self.device = torch.device(device)
        self.prefetch = prefetch
        self.prepare = prepare
        self.model = runtime.skeleton(directory, dtype, device)
        self.dtype = self.model.dtype
        self.weights = WeightMap(self.model, self.checkpoint)
        self.weights.check()
        self.decoder = runtime.decoder(self.model)
        self.layers: nn.ModuleList = self.decoder.layers
        self._wide = {
            name
            for pattern, kept in self.model._get_dtype_plan(self.dtype).items()
            for name in self.weights.recipes
            if kept == torch.float32 and pattern in name
        }
        names = {module: name for name, module in self.model.named_modules()}
        self._decoder_name = names[self.decoder]
        self.embedding = self.model.get_input_embeddings()
        self._embedding_name = names[self.embedding]
        # Prefixes of what is not loaded with the rest of the decoder.
        self._apart = (f"{self._decoder_name}.layers.", f"{self._embedding_name}.")
        self._untied = not any(name.startswith(self._apart[1]) for name in self.model.all_tied_weights_keys.values())
        self._turn: int | None = None
        self._number = 0
        self._states: Activations | None = None
        self.returns_tuple = False  # a layer's output; known when one has run
        self._free: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = defaultdict(list)
        for index, layer in enumerate(self.layers):
            layer.forward = self._layer_forward(index, layer)

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def hidden(self) -> int:
        """D of the stored activations."""
        return int(self.config.get_text_config().hidden_size)

    def activations(
        self, batches: Sequence[Batch], memory: float = float("inf"), scratch: Path | None = None
    ) -> Activations:
        """Return room for the hidden states of `batches`."""
        shapes = [(int(batch.ids.shape[0]), int(batch.ids.shape[1])) for batch in batches]
        return Activations(shapes, self.hidden, self.dtype, memory, scratch)

    def turns(self, batches: Sequence[Batch], states: Activations, first: int = 0) -> Iterator[Turn]:
        """Yield each layer from `first` on, loaded; the caller runs all batches before it asks for the next.

        `states` must hold the outputs of layer `first - 1`, and hold those of the last layer in the end.
        """
        self._states = states
        count = len(self.layers)
        with contextlib.ExitStack() as stack, ThreadPoolExecutor(1) as reader:
            stack.enter_context(self._loaded(self.decoder, self._decoder_name, self._apart))
            embedding = stack.enter_context(contextlib.ExitStack())
            if first == 0:
                embedding.enter_context(self._loaded(self.embedding, self._embedding_name))
            coming: Future[dict[str, Tensor]] | None = None
            for index in range(first, count):
                tensors = coming.result() if coming is not None else self._read_layer(index)
                ahead = self.prefetch and index + 1 < count
                coming = reader.submit(self._read_layer, index + 1) if ahead else None
                layer = self.layers[index]
                _assign(self.model, layer, tensors, f"{self._decoder_name}.layers.{index}.")
                if self.prepare is not None:
                    self.prepare(index, layer)
                self._turn = index
                try:
                    yield Turn(self, index, batches)
                finally:
                    self._turn = None
                    _release(layer)
                    embedding.close()
                    for tensor in tensors.values():
                        self._free[tensor.shape, tensor.dtype].append(tensor)
                if not self.prefetch:
                    self._free.clear()
                heap.trim()
            self._free.clear()

    @contextlib.contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Load one decoder layer alone."""
        layer = self.layers[index]
        _assign(self.model, layer, self._read_layer(index), f"{self._decoder_name}.layers.{index}.")
        try:
            yield layer
        finally:
            _release(layer)

    @contextlib.contextmanager
    def head(self, states: Activations) -> Iterator[Head]:
        """Load what follows the layers (final norm, output head); `states` are the last layer's outputs."""
        self._states = states
        self._turn = len(self.layers)
        try:
            with self._loaded(self.model, "", self._apart if self._untied else self._apart[:1]):
                yield Head(self)
        finally:
            self._turn = None

    def _layer_forward(self, index: int, layer: Any) -> Any:
        def run(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            assert self._turn is not None
            assert self._states is not None
            if index == self._turn:
                if index > 0:
                    hidden = self._states[self._number].to(self.device)
                output = type(layer).forward(layer, hidden, *args, **kwargs)  # `prepare` may change its class
                self.returns_tuple = isinstance(output, tuple)
                self._states[self._number] = output[0] if self.returns_tuple else output
                raise _LeftError
            if index == len(self.layers) - 1:
                hidden = self._states[self._number].to(self.device)
            return (hidden,) if self.returns_tuple else hidden

        return run

    def _forward(self, module: Any, batch: Batch, number: int, **kwargs: Any) -> Any:
        assert self._states is not None
        self._number = number
        mask = None if batch.mask is None else batch.mask.to(self.device)
        if self._turn == 0:
            given = {"input_ids": batch.ids.to(self.device)}
        else:  # not looked at by the layer whose turn it is, but masks and positions are made by its shape
            given = {"inputs_embeds": self._states[number].to(self.device)}
        return module(**given, attention_mask=mask, use_cache=False, **kwargs)

    def _read_layer(self, index: int) -> dict[str, Tensor]:
        prefix = f"{self._decoder_name}.layers.{index}."
        return self._read(self.layers[index], prefix)

    def _read(self, module: nn.Module, prefix: str, apart: tuple[str, ...] = ()) -> dict[str, Tensor]:
        """Read the tensors of `module` from the files, by their names in the model; `apart` are prefixes left out."""
        tensors: dict[str, Tensor] = {}
        seen: set[int] = set()  # tied tensors once
        for name, meta in module.state_dict(prefix=prefix, keep_vars=True).items():
            if name.startswith(apart) or id(meta) in seen:
                continue
            seen.add(id(meta))
            dtype = torch.float32 if name in self._wide else meta.dtype
            free = self._free[meta.shape, dtype]
            # Room is made by this thread and filled again by the reading one, which is not in the caller's mode.
            with torch.inference_mode(False):
                tensors[name] = free.pop() if free else torch.empty(meta.shape, dtype=dtype, device=self.device)
        with torch.inference_mode(False), torch.no_grad():
            self.weights.fill(tensors)
        return tensors

    @contextlib.contextmanager
    def _loaded(self, module: nn.Module, name: str, apart: tuple[str, ...] = ()) -> Iterator[None]:
        prefix = f"{name}." if name else ""
        _assign(self.model, module, self._read(module, prefix, apart), prefix, apart)
        try:
            yield
        finally:
            _release(module)


@dataclass(frozen=True)
class Turn:
    """A decoder layer that is loaded; `run` it on every batch."""

    streamed: StreamedModel
    layer: int
    batches: Sequence[Batch]

    def run(self, number: int) -> None:
        """Run the layer on one batch and store its output in the place of its input."""
        with contextlib.suppress(_LeftError):
            self.streamed._forward(self.streamed.decoder, self.batches[number], number)


@dataclass(frozen=True)
class Head:
    """The loaded end of the model."""

    streamed: StreamedModel

    def logits(self, batch: Batch, number: int) -> Tensor:
        """Return the logits [B, L, V] of a batch."""
        logits: Tensor = self.streamed._forward(self.streamed.model, batch, number).logits
        return logits


def _assign(
    model: Any, module: nn.Module, tensors: dict[str, Tensor], prefix: str, apart: tuple[str, ...] = ()
) -> None:
    """Put tensors in the place of a module's meta tensors, and compute the buffers that no file holds."""
    by_meta: dict[int, Tensor] = {}
    computed: list[nn.Module] = []
    for path, child in module.named_modules():
        base = f"{prefix}{path}." if path else prefix
        if base.startswith(apart):
            continue
        for kind in (child._parameters, child._buffers):
            for name, meta in kind.items():
                if meta is None:
                    continue
                tensor = tensors.get(base + name, by_meta.get(id(meta)))
                if tensor is not None:
                    by_meta[id(meta)] = tensor
                    real: Any = nn.Parameter(tensor, requires_grad=False) if kind is child._parameters else tensor
                    real._is_hf_initialized = True
                    real._espalier_meta = meta
                    kind[name] = real
                elif meta.is_meta:
                    device = next(iter(tensors.values())).device if tensors else "cpu"
                    empty: Any = torch.empty_like(meta, device=device)
                    empty._espalier_meta = meta
                    kind[name] = empty
                    computed.append(child)
    with torch.no_grad():
        for child in computed:
            model._init_weights(child)


def _release(module: nn.Module) -> None:
    """Put the meta tensors back, for a tensor that was put in the place of a loaded one a meta tensor of its shape."""
    for child in module.modules():
        kinds: tuple[dict[str, Any], ...] = (child._parameters, child._buffers)
        for kind in kinds:
            for name, tensor in kind.items():
                if tensor is not None and not tensor.is_meta:
                    meta = torch.empty_like(tensor, device="meta")
                    kind[name] = getattr(tensor, "_espalier_meta", meta)
