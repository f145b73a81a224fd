"""Collect: one forward pass over the calibration tokens that feeds every probe asked for."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from espalier.errors import UserError, nearest
from espalier.families import Family
from espalier.observe import BlockTrace, observe
from espalier.probes import PROBES, Probe
from espalier.shape import ModelShape
from espalier.stats import Stats


def collect(
    model: Any,
    shape: ModelShape,
    family: Family,
    input_ids: Any,
    attention_mask: Any,
    probes: Sequence[str],
    *,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Stats:
    """Run `model` once over `input_ids` int [N, L] and return what `probes` observed.

    `attention_mask` int [N, L] or None: tokens where it is 0 are not observed. `batch_size` sequences run
    together; it bounds memory and does not change the result but by rounding. `progress(done, total)` is
    called after each batch with numbers of sequences. The model is left as it was.

    UserError: unknown probe, weights that are not finite (names the tensor), experts' outputs or results that
    are not finite (names the layer), a sequence without tokens, a probe that a merged checkpoint cannot feed.
    """
    for name in probes:
        if name not in PROBES:
            raise UserError(f"probe {name!r} is unknown; {nearest(name, list(PROBES))}.")
    check_weights(model)
    ids = torch.as_tensor(input_ids)
    mask = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else torch.as_tensor(attention_mask).bool()
    sequence_tokens = tuple(mask.sum(1).tolist())
    if 0 in sequence_tokens:
        raise UserError(f"attention_mask: sequence {sequence_tokens.index(0)} has no unmasked token. Remove it.")
    tokens = sum(sequence_tokens)
    found = {layer: {name: PROBES[name](shape, tokens) for name in PROBES if name in probes} for layer in shape.layers}

    def consume(trace: BlockTrace) -> None:
        _check_trace(trace, shape, found[trace.layer])
        dense = any(probe.dense for probe in found[trace.layer].values())
        for part in trace.chunks() if dense else (trace,):
            for probe in found[trace.layer].values():
                probe.update(part)

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), observe(model, shape.layers, family, consume) as observers:
            first = 0
            for start in range(0, len(ids), batch_size):
                batch, kept = ids[start : start + batch_size], mask[start : start + batch_size]
                rows = kept.flatten().nonzero()[:, 0]
                for observer in observers:
                    observer.expect(rows, first)
                _forward(model, batch, kept)
                first += len(rows)
                if progress is not None:
                    progress(min(start + batch_size, len(ids)), len(ids))
            batches = -(-len(ids) // batch_size)
            for observer in observers:
                if observer.calls != batches:
                    raise UserError(
                        f"model, layer {observer.layer}: its MoE block ran {observer.calls} times in {batches} forward "
                        "passes, so it cannot be observed. Use a stock class of transformers."
                    )
    finally:
        model.train(was_training)
    arrays = {(name, layer): probe.result() for layer, named in found.items() for name, probe in named.items()}
    for (name, layer), result in arrays.items():
        for key, array in result.items():
            if not np.isfinite(array).all():
                raise UserError(
                    f"model, layer {layer}: probe {name} gave {np.sum(~np.isfinite(array))} values of {key} that are "
                    "not finite. Load the model with dtype=float32 or bfloat16."
                )
    return Stats(shape, sequence_tokens, arrays)


def check_weights(model: Any) -> None:
    """Raise UserError naming the first parameter of `model` that holds a NaN or an infinity."""
    for name, parameter in model.named_parameters():
        # aminmax needs no second copy, and both ends are NaN when any value is.
        if parameter.is_floating_point() and not all(torch.isfinite(end) for end in torch.aminmax(parameter.detach())):
            bad = [int(row) for row in range(len(parameter)) if not torch.isfinite(parameter[row]).all()]
            kind = "expert" if parameter.ndim == 3 else "row"
            raise UserError(
                f"model: parameter {name} holds NaN or infinite values in {len(bad)} of {len(parameter)} {kind}s "
                f"(first: {kind} {bad[0]}). The checkpoint is damaged; fetch it again."
            )


def _forward(model: Any, ids: Tensor, mask: Tensor) -> None:
    """Run the decoder without its output head, which no probe looks at."""
    device = model.get_input_embeddings().weight.device
    padded = not bool(mask.all())
    model.base_model(
        input_ids=ids.long().to(device),
        attention_mask=mask.long().to(device) if padded else None,
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
        raise UserError(
            f"model, layer {trace.layer}: router logits or expert outputs are not finite on calibration tokens "
            f"(dtype {str(trace.hidden.dtype).removeprefix('torch.')}). Load the model with dtype=float32 or bfloat16."
        )
