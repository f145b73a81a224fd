"""How active the neurons and the rotary pairs of a dense model are, over all tokens or by clusters of them.

Shapes: N sequences of L tokens, T tokens in all, C clusters, D hidden, F neurons, h dimensions of a head.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from espalier.checkpoints.shape import DenseShape
from espalier.dense_families import DenseFamily
from espalier.errors import UserError
from espalier.models.observe_ffn import FFNTrace, observe_ffns
from espalier.models.runtime import decoder
from espalier.plans.narrow_attention import dimensions_of

SHRINK = 64.0  # tokens of average activity that are added to each cluster, so that a small one is not all noise


@dataclass(frozen=True)
class Activity:
    """Of one layer, float64. `neurons` [C, F]: root mean square of the activation times the norm of the neuron's column
    in the down projection, on the tokens of each cluster. `pairs` [h / 2]: over heads and both dimensions, root sum of
    squares of queries times that of keys. `centres` [C, D]: unit vectors in the middle of each cluster's inputs, and
    `norm`: mean length of the FFN's inputs.
    """

    neurons: Tensor
    pairs: Tensor
    centres: Tensor
    norm: float


@torch.no_grad()
def measure_activity(
    model: Any, shape: DenseShape, family: DenseFamily, ids: Tensor, kept: Tensor, clusters: int = 1, seed: int = 0
) -> list[Activity]:
    """Return by layer what is active on `ids` int64 [N, L] where `kept` bool [N, L].

    The inputs of each FFN are put into so many `clusters` by their direction (spherical k-means), then what is active
    in each is measured: the model runs twice over the tokens. UserError for fewer tokens than clusters.
    """
    if int(kept.sum()) < clusters:
        raise UserError(
            f"calibration: {int(kept.sum())} tokens cannot be put into {clusters} clusters. Use more tokens."
        )
    inputs: dict[int, list[Tensor]] = {layer: [] for layer in shape.layers}
    _observe(model, shape, family, ids, kept, lambda trace: inputs[trace.layer].append(trace.hidden.float()))
    centres, labels, norms = {}, {}, {}
    for layer in shape.layers:
        hidden = torch.cat(inputs.pop(layer))  # [T, D]
        norms[layer] = float(hidden.norm(dim=1).mean())
        centres[layer], labels[layer] = _clusters(torch.nn.functional.normalize(hidden), clusters, seed)
    energy = {layer: torch.zeros(clusters, shape.width, dtype=torch.float64) for layer in shape.layers}
    squares: dict[tuple[int, str], Tensor] = {}

    def see_ffn(trace: FFNTrace) -> None:
        energy[trace.layer].index_add_(0, labels[trace.layer][trace.token.cpu()], trace.inner.double().square().cpu())

    def see_projection(layer: int, name: str, output: Tensor) -> None:
        found = output.double().square().sum(0).cpu()
        squares[layer, name] = squares[layer, name] + found if (layer, name) in squares else found

    _observe(model, shape, family, ids, kept, see_ffn, see_projection)
    rotary = family.rotary(model.config.to_dict())
    found = []
    for layer in shape.layers:
        down = getattr(getattr(decoder(model).layers[layer], family.module), family.down).weight.double().cpu()
        counts = torch.bincount(labels[layer], minlength=clusters).double().unsqueeze(1)
        mean = energy[layer].sum(0) / counts.sum()
        neurons = ((energy[layer] + SHRINK * mean) / (counts + SHRINK)).sqrt() * down.norm(dim=0)
        queries, keys = (squares[layer, name].sqrt() for name in family.projections[:2])
        pairs = _pairs(queries, keys, shape.pairs, rotary)
        found.append(Activity(neurons, pairs, centres[layer], norms[layer]))
    return found


def _observe(
    model: Any,
    shape: DenseShape,
    family: DenseFamily,
    ids: Tensor,
    kept: Tensor,
    see_ffn: Callable[[FFNTrace], None],
    see_projection: Callable[[int, str, Tensor], None] | None = None,
) -> None:
    """Run the decoder on one sequence after another; hand on FFNs' traces, and queries and keys [tokens, heads x h]."""
    rows = [kept[0]]
    with contextlib.ExitStack() as undo:
        observers = undo.enter_context(observe_ffns(model, shape.layers, family, see_ffn))
        for layer in shape.layers if see_projection is not None else ():
            attention = getattr(decoder(model).layers[layer], family.attention)
            for name in family.projections[:2]:

                def see(module: Any, inputs: Any, output: Tensor, layer: int = layer, name: str = name) -> None:
                    assert see_projection is not None
                    see_projection(layer, name, output[0][rows[0]])

                undo.callback(getattr(attention, name).register_forward_hook(see).remove)
        first = 0
        for row, real in zip(ids, kept, strict=True):
            rows[0] = real
            for observer in observers:
                observer.expect(real.nonzero()[:, 0], first)
            decoder(model)(input_ids=row[None], use_cache=False)
            first += int(real.sum())


def _clusters(rows: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return unit centres [C, D] and the cluster of each of the unit `rows` [T, D]."""
    if count == 1:
        return torch.nn.functional.normalize(rows.double().mean(0, keepdim=True)), torch.zeros(len(rows)).long()
    from sklearn.cluster import KMeans

    found = KMeans(count, n_init=1, random_state=seed).fit(rows.cpu().numpy())
    centres = torch.from_numpy(np.asarray(found.cluster_centers_, dtype=np.float64))
    return torch.nn.functional.normalize(centres), torch.from_numpy(found.labels_).long()


def _pairs(queries: Tensor, keys: Tensor, pairs: int, rotary: int) -> Tensor:
    """Return the activity of each pair, from root sums of squares of queries [H x h] and keys [Hkv x h]."""
    head = 2 * pairs
    queries, keys = queries.view(-1, head), keys.view(-1, head)
    products = queries * keys.repeat_interleave(len(queries) // len(keys), dim=0)
    return torch.stack([products[:, dimensions_of([pair], head, rotary)].sum() for pair in range(pairs)])
