"""CMoE: the most active neurons always run, the others are grouped by when they are active; nothing is trained.

Pei et al., ACL 2026 (arXiv 2502.04416). With normalised inputs and rows, the `marks` neurons of the largest |h_j| of
each token are marked; mu_j is the fraction of tokens that mark neuron j. Of E experts of equal size, S are shared: the
neurons of the largest mu. The rest are assigned to E - S experts of equal size, whose centroids are the most active of
them, so that the L1 distances between the neurons' marks over tokens and those of their centroid add up to least. The
analytic router has one neuron an expert, the one whose marks are closest to the expert's mean:

    s = softmax |act(x G^T) * (x P^T)|,   the K of largest s run, each times 1 + s_e u_e, u = 0 until it is trained

The authors' load-balancing bias stays 0 here: it is a matter of training.
"""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from espalier.checkpoints.shape import DenseShape
from espalier.collecting.stats import Stats
from espalier.errors import UserError
from espalier.methods.blocks import block_layout, without
from espalier.methods.options import whole_number
from espalier.methods.partition import active_blocks, balanced_assignment, block_size
from espalier.plans.plan import Plan
from espalier.plans.plan_tensors import PlanTensor
from espalier.plans.split import Split

if TYPE_CHECKING:
    from espalier.models.ffn_weights import FFNLayer, FFNWeights

WHERE = "conf/method/cmoe.yaml"


@dataclass(frozen=True)
class Cmoe:
    """Let a token run `shared` of `blocks` experts always and choose the others, 1 - ratio of all neurons together."""

    ratio: float
    blocks: int = 16
    shared: int = 2
    marks: int = 10
    dense: ClassVar[bool] = True
    probes: ClassVar[tuple[str, ...]] = ("ffn_inputs",)

    def __post_init__(self) -> None:
        for key, least in (("blocks", 2), ("shared", 1), ("marks", 1)):
            whole_number("cmoe", key, getattr(self, key), least)

    def check(self, shape: DenseShape, tokens: int) -> None:
        """Raise UserError for experts that do not divide the neurons, or a ratio that leaves none to choose."""
        block_size("cmoe", shape.width, self.blocks)
        active_blocks("cmoe", self.ratio, self.blocks)
        if not 1 <= self._chosen < self.blocks - self.shared:
            most = 1 - (self.shared + 1) / self.blocks
            raise UserError(
                f"{WHERE}: ratio={self.ratio} leaves {self._chosen} of {self.blocks - self.shared} experts to choose "
                f"beside {self.shared} shared ones. Use {1 / self.blocks:g} <= ratio <= {most:g}."
            )

    @property
    def _chosen(self) -> int:
        """K, the experts that a token chooses."""
        return self.blocks - round(self.ratio * self.blocks) - self.shared

    def plan(self, stats: Stats, shape: DenseShape, ffns: "FFNWeights") -> Plan:
        """Evidence per layer: the shared neurons' part of all marks."""
        self.check(shape, 0)
        size, routed = shape.width // self.blocks, self.blocks - self.shared
        layers, evidence = {}, {}
        tensors: dict[str, PlanTensor] = {}
        for layer in shape.layers:
            ffn = ffns.layer(layer)
            marked = self.marked(ffn, stats.layer("ffn_inputs", layer)["hidden"])
            rates = marked.mean(axis=0)
            order = np.argsort(-rates, kind="stable")
            always, rest = np.sort(order[: self.shared * size]), np.sort(order[self.shared * size :])
            labels, representatives = _experts(marked, rest, order[self.shared * size :][:routed])
            layout = block_layout(without(labels, always, shape.width), routed, f"{layer}.neurons", tensors)
            own = _router(ffn, representatives)
            names = {role: f"{layer}.router.{role}" for role in own}
            tensors |= {names[role]: PlanTensor.of(array) for role, array in own.items()}
            split = Split(**layout, router="analytic", k=self._chosen, weights="score", tensors_of=names)
            layers[layer] = (split,)
            evidence[layer] = {"shared_marks": float(rates[always].sum() / rates.sum())}
        return Plan({"name": "cmoe"} | asdict(self), layers, evidence, tensors=tensors)

    def marked(self, ffn: "FFNLayer", hidden: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Return which neurons are among the `marks` most active of each token, bool [T, F]."""
        import torch
        from torch.nn import functional

        with torch.no_grad():
            x = functional.normalize(torch.from_numpy(hidden), dim=1)
            value = x @ functional.normalize(ffn.up, dim=1).T
            if ffn.gate is None:
                value = ffn.activation(value)
            else:
                value = ffn.activation(x @ functional.normalize(ffn.gate, dim=1).T) * value
            best = value.abs().topk(min(self.marks, value.shape[1]), dim=1).indices
            marked: NDArray[np.bool_] = torch.zeros(value.shape, dtype=torch.bool).scatter(1, best, True).numpy()
        return marked


def _experts(
    marked: NDArray[np.bool_], neurons: NDArray[np.int64], centres: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the expert of each of `neurons`, and each expert's representative neuron."""
    columns = marked[:, neurons].astype(np.float32)  # [T, n]
    middle = marked[:, centres].astype(np.float32)  # [T, experts]
    # |a - b| of marks is a + b - 2 a b.
    distance = columns.sum(0)[:, None] + middle.sum(0)[None] - 2 * columns.T @ middle
    labels = balanced_assignment(distance.round().astype(np.int64), len(neurons) // len(centres))
    representatives = []
    for expert in range(len(centres)):
        own = np.flatnonzero(labels == expert)
        mean = columns[:, own].mean(axis=1, keepdims=True)
        representatives.append(neurons[own[np.abs(columns[:, own] - mean).sum(axis=0).argmin()]])
    return labels, np.array(representatives)


def _router(ffn: "FFNLayer", representatives: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    own = {"scale": np.zeros(len(representatives)), "bias": np.zeros(len(representatives))}
    if ffn.gate is None:
        own["gate"] = ffn.up[representatives].numpy()
        if ffn.up_bias is not None:
            own["offset"] = ffn.up_bias[representatives].numpy()
        return own
    return own | {"gate": ffn.gate[representatives].numpy(), "up": ffn.up[representatives].numpy()}
