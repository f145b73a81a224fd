"""FactorLLM: consecutive blocks of neurons, and a router that is taught which of them come closest to the whole FFN.

Zhao et al., 2024 (arXiv 2408.11855). Of E blocks a token runs K, times E / K. The router is linear; the teacher says
which K blocks have the least squared distance between E / K times what they give and the FFN's output, and the router
learns softmax scores by the KL divergence from the even distribution over those. The paper trains it together with the
model; here it is learnt from sampled inputs of each layer, and the model may be tuned afterwards (`tuning`).
"""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from numpy.typing import NDArray

from espalier.checkpoints.shape import DenseShape
from espalier.collecting.stats import Stats
from espalier.errors import UserError
from espalier.methods.options import whole_number
from espalier.methods.partition import active_blocks, block_size
from espalier.plans.plan import Plan
from espalier.plans.plan_tensors import PlanTensor
from espalier.plans.split import Split

if TYPE_CHECKING:
    from espalier.models.ffn_weights import FFNLayer, FFNWeights

WHERE = "conf/method/factor_llm.yaml"


@dataclass(frozen=True)
class FactorLlm:
    """Cut the FFN into `blocks` consecutive blocks, of which a token runs the fraction 1 - ratio."""

    ratio: float
    blocks: int = 4
    epochs: int = 30
    rate: float = 0.01
    batch: int = 512
    seed: int = 0
    dense: ClassVar[bool] = True
    probes: ClassVar[tuple[str, ...]] = ("ffn_inputs",)

    def __post_init__(self) -> None:
        for key, least in (("blocks", 2), ("epochs", 1), ("batch", 1), ("seed", 0)):
            whole_number("factor_llm", key, getattr(self, key), least)
        if isinstance(self.rate, bool) or not isinstance(self.rate, int | float) or not self.rate > 0:
            raise UserError(f"{WHERE}: rate={self.rate} is not a number above 0.")

    def check(self, shape: DenseShape, tokens: int) -> None:
        """Raise UserError for blocks that do not divide the neurons or a ratio that leaves none out, or none in."""
        block_size("factor_llm", shape.width, self.blocks)
        active_blocks("factor_llm", self.ratio, self.blocks)

    def plan(self, stats: Stats, shape: DenseShape, ffns: "FFNWeights") -> Plan:
        """Evidence per layer: the share of the teacher's choices that the router makes too."""
        self.check(shape, 0)
        k, size = active_blocks("factor_llm", self.ratio, self.blocks), shape.width // self.blocks
        layers, evidence = {}, {}
        tensors: dict[str, PlanTensor] = {}
        for layer in shape.layers:
            own, agreed = self._learn(ffns.layer(layer), stats.layer("ffn_inputs", layer)["hidden"], k, layer)
            names = {role: f"{layer}.router.{role}" for role in own}
            tensors |= {names[role]: PlanTensor.of(array) for role, array in own.items()}
            units = tuple((block,) for block in range(self.blocks))
            router = {"router": "linear", "k": k, "scale": self.blocks / k, "tensors_of": names}
            layers[layer] = (Split((size,) * self.blocks, units, **router),)  # type: ignore[arg-type]
            evidence[layer] = {"agreement": agreed}
        return Plan({"name": "factor_llm"} | asdict(self), layers, evidence, tensors=tensors)

    def teacher_choice(self, ffn: "FFNLayer", hidden: Any, k: int) -> Any:
        """Return the k blocks closest to the FFN's output on each token, int64 [T, k], for inputs [T, D]."""
        import torch

        inner = ffn.inner(hidden)
        target, size = inner @ ffn.down.T, inner.shape[1] // self.blocks
        parts = [
            inner[:, start : start + size] @ ffn.down[:, start : start + size].T
            for start in range(0, inner.shape[1], size)
        ]
        distance = torch.stack([(part * self.blocks / k - target).square().sum(1) for part in parts], dim=1)
        return (-distance).topk(k, dim=1).indices

    def _learn(
        self, ffn: "FFNLayer", hidden: NDArray[Any], k: int, layer: int
    ) -> tuple[dict[str, NDArray[Any]], float]:
        import torch
        from torch.nn import functional

        inputs = torch.from_numpy(hidden)
        chosen = self.teacher_choice(ffn, inputs, k)
        targets = torch.zeros(len(inputs), self.blocks).scatter(1, chosen, 1.0 / k)
        # Of unit scale, so that one rate serves every layer; undone in the weights.
        scale = inputs.square().mean().sqrt().clamp_min(1e-30)
        weight = torch.zeros(self.blocks, inputs.shape[1], requires_grad=True)
        bias = torch.zeros(self.blocks, requires_grad=True)
        optimizer = torch.optim.Adam([weight, bias], lr=self.rate)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + layer)
        for _ in range(self.epochs):
            for rows in torch.split(torch.randperm(len(inputs), generator=generator), self.batch):
                scores = functional.linear(inputs[rows] / scale, weight, bias).log_softmax(dim=1)
                loss = functional.kl_div(scores, targets[rows], reduction="batchmean")
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
        with torch.no_grad():
            made = functional.linear(inputs / scale, weight, bias).topk(k, dim=1).indices
            agreed = float((targets.gather(1, made) > 0).float().mean())
        return {"weight": (weight / scale).detach().numpy(), "bias": bias.detach().numpy()}, agreed
