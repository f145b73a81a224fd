"""MoEfication: cluster the neurons of an FFN into blocks, of which a router chooses some for each token.

Zhang et al., Findings of ACL 2022 (arXiv 2110.01786). The split: size-constrained k-means on the neurons' normalised
input weights, the rows of the gate where there is one. A block's score on a token is the sum of its neurons'
activations, here |a_j| ||W_down,j||_2, since a SwiGLU's may be negative. What a block gives is not weighted. Routers:

    similarity   -||x / ||x|| - c_b||^2, c_b the mean of the block's normalised rows
    mlp          B tanh(A x / ||x||), learnt: binary cross entropy against scores / (largest of the token's)
    oracle       the true scores, which only exist once all blocks have run

`shared` is a fraction of all neurons that always run (those of the largest root mean square activation times the norm
of their column of W_down), which the paper does not have.
"""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from espalier.checkpoints.shape import DenseShape
from espalier.collecting.stats import Stats
from espalier.errors import UserError
from espalier.methods import neuron_scores
from espalier.methods.blocks import block_layout, without
from espalier.methods.options import one_of, whole_number
from espalier.methods.partition import active_blocks, balanced_kmeans, block_size, contiguous, random
from espalier.plans.plan import Plan
from espalier.plans.plan_tensors import PlanTensor
from espalier.plans.split import Split

if TYPE_CHECKING:
    from espalier.models.ffn_weights import FFNLayer, FFNWeights

SPLITS = ("kmeans", "random", "contiguous")
ROUTERS = ("similarity", "mlp", "oracle")
WHERE = "conf/method/moefication.yaml"


@dataclass(frozen=True)
class Moefication:
    """Let a token run so many of `blocks` blocks that the fraction `ratio` of the neurons is left out.

    The blocks share what `shared` leaves. `epochs`, `rate` and `batch` are those of the router `mlp`, which is learnt
    from the sampled inputs of the calibration.
    """

    ratio: float
    blocks: int = 32
    split: str = "kmeans"
    router: str = "mlp"
    shared: float = 0.0
    epochs: int = 30
    rate: float = 0.01
    batch: int = 512
    seed: int = 0
    dense: ClassVar[bool] = True

    def __post_init__(self) -> None:
        one_of("moefication", "split", self.split, SPLITS)
        one_of("moefication", "router", self.router, ROUTERS)
        for key, least in (("blocks", 2), ("epochs", 1), ("batch", 1), ("seed", 0)):
            whole_number("moefication", key, getattr(self, key), least)
        for key, low in (("shared", 0.0), ("rate", 1e-12)):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value < 1:
                raise UserError(f"{WHERE}: {key}={value} is not a number in [0, 1){' above 0' if low else ''}.")

    @property
    def probes(self) -> tuple[str, ...]:
        return (*(("ffn_energy",) if self.shared else ()), *(("ffn_inputs",) if self.router == "mlp" else ()))

    def check(self, shape: DenseShape, tokens: int) -> None:
        """Raise UserError for blocks that do not divide the neurons, or a ratio that does not fit them."""
        self._sizes(shape)

    def _sizes(self, shape: DenseShape) -> tuple[int, int]:
        """Return the number of neurons that always run, and of blocks that a token chooses."""
        always = round(self.shared * shape.width)
        size = block_size("moefication", shape.width - always, self.blocks, "neurons that do not always run")
        if not always:
            return 0, active_blocks("moefication", self.ratio, self.blocks)
        k = round((shape.width * (1 - self.ratio) - always) / size)
        if not 1 <= k < self.blocks:
            raise UserError(
                f"{WHERE}: ratio={self.ratio} with shared={self.shared} leaves {k} of {self.blocks} blocks to choose. "
                "Use a smaller shared or another ratio."
            )
        return always, k

    def plan(self, stats: Stats, shape: DenseShape, ffns: "FFNWeights") -> Plan:
        """Evidence per layer: of the learnt router, the share of the scores that its choice captures."""
        always, k = self._sizes(shape)
        layers, evidence = {}, {}
        tensors: dict[str, PlanTensor] = {}
        for layer in shape.layers:
            ffn = ffns.layer(layer)
            front = np.zeros(0, np.int64)
            if always:
                scores = neuron_scores.activation(stats.layer("ffn_energy", layer), ffn, stats.tokens)
                front = neuron_scores.best(scores, always)
            labels = without(self._labels(ffn, front, layer), front, shape.width)
            layout = block_layout(labels, self.blocks, f"{layer}.neurons", tensors)
            if self.router == "oracle":
                layers[layer] = (Split(**layout, router="oracle", k=k),)
                continue
            centres = _centres(_rows(ffn), labels, self.blocks)
            if self.router == "similarity":
                own = {"weight": 2 * centres, "bias": -(centres**2).sum(axis=1)}
                kind: dict[str, Any] = {"router": "linear"}
            else:
                hidden = stats.layer("ffn_inputs", layer)["hidden"]
                own, captured = self._learn(ffn, hidden, labels, centres, k, layer)
                kind = {"router": "mlp", "hidden_units": self.blocks}
                evidence[layer] = {"captured_score": captured}
            names = {role: f"{layer}.router.{role}" for role in own}
            tensors |= {names[role]: PlanTensor.of(array) for role, array in own.items()}
            layers[layer] = (Split(**layout, **kind, k=k, normalise=True, tensors_of=names),)
        return Plan({"name": "moefication"} | asdict(self), layers, evidence, tensors=tensors)

    def _labels(self, ffn: "FFNLayer", front: NDArray[np.int64], layer: int) -> NDArray[np.int64]:
        """Return the block of each neuron that does not always run."""
        rest = np.setdiff1d(np.arange(len(ffn.up)), front)
        if self.split == "contiguous":
            return contiguous(len(rest), self.blocks)
        if self.split == "random":
            return random(len(rest), self.blocks, np.random.default_rng([self.seed, layer]))
        return balanced_kmeans(_rows(ffn)[rest], self.blocks, self.seed)

    def _learn(
        self,
        ffn: "FFNLayer",
        hidden: NDArray[np.float32],
        labels: NDArray[np.int64],
        centres: NDArray[np.float64],
        k: int,
        layer: int,
    ) -> tuple[dict[str, NDArray[Any]], float]:
        """Return the tensors of the learnt router and the share of the scores that its choices capture."""
        import torch
        from torch.nn import functional

        inputs = torch.from_numpy(hidden)
        scores = neuron_scores.unit_scores(ffn, inputs, labels, self.blocks)
        targets = scores / scores.amax(dim=1, keepdim=True).clamp_min(1e-30)
        inputs = functional.normalize(inputs, dim=1)
        first = torch.from_numpy(centres).float().requires_grad_()
        second = torch.eye(self.blocks).requires_grad_()
        optimizer = torch.optim.Adam([first, second], lr=self.rate)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + layer)
        for _ in range(self.epochs):
            for rows in torch.split(torch.randperm(len(inputs), generator=generator), self.batch):
                found = functional.linear(functional.linear(inputs[rows], first).tanh(), second)
                loss = functional.binary_cross_entropy_with_logits(found, targets[rows])
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
        with torch.no_grad():
            found = functional.linear(functional.linear(inputs, first).tanh(), second)
            chosen = scores.gather(1, found.topk(k, dim=1).indices).sum()
            captured = float(chosen / scores.topk(k, dim=1).values.sum().clamp_min(1e-30))
        return {"first": first.detach().numpy(), "second": second.detach().numpy()}, captured


def _rows(ffn: "FFNLayer") -> NDArray[np.float64]:
    """Return the neurons' input weights, each of length 1, [F, D]."""
    from torch.nn import functional

    rows: NDArray[np.float64] = functional.normalize(ffn.rows, dim=1).double().numpy()
    return rows


def _centres(rows: NDArray[np.float64], labels: NDArray[np.int64], blocks: int) -> NDArray[np.float64]:
    """Return the mean row of each block, [blocks, D]."""
    return np.stack([rows[labels == block].mean(axis=0) for block in range(blocks)])
