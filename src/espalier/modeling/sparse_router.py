"""Routers of a sparse FFN: which of its units a token runs, and with what weight; made by Espalier.

Shipped beside `sparse_ffn.py` in a checkpoint's directory; needs torch only.

Shapes: T tokens, D hidden, U units.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Router(nn.Module):
    """Scores the units of a FFN for each token and returns their weights; computes in float32, under autocast too.

    `straight_through` (training): a unit that does not run still has the gradient of its gate (DSMoE, eq. 10).
    `gates` keeps those of the last call, [T, U], with their gradient: what DSMoE's loss makes small.
    """

    straight_through: bool = True

    def __init__(self, hidden: int, units: int, settings: dict[str, Any]) -> None:
        super().__init__()
        self.kind, self.choose, self.weigh = settings["kind"], settings["choose"], settings["weights"]
        self.k, self.threshold, self.scale_by = settings["k"], settings["threshold"], settings["scale"]
        self.normalise, self.level, self.units = settings["normalise"], settings["level"], units
        sizes = {
            "weight": (units, hidden),
            "gate": (units, hidden),
            "up": (units, hidden),
            "first": (settings["hidden"], hidden),
            "second": (units, settings["hidden"]),
            "bias": (units,),
            "scale": (units,),
            "offset": (units,),
        }
        for role in settings["tensors"]:
            self.register_parameter(role, nn.Parameter(torch.zeros(sizes[role], dtype=torch.float32)))
        # A choice has no gradient; only what weighs the chosen has one.
        self.learns = self.weigh != "one" and self.kind != "oracle"
        if self.kind == "analytic" and self.has("bias"):
            self.own("bias").requires_grad_(False)
        self.gates: Tensor | None = None

    def own(self, role: str) -> Tensor:
        """Return the parameter that has this role."""
        return self.get_parameter(role)

    def has(self, role: str) -> bool:
        """Whether there is a parameter for this role."""
        return role in self._parameters

    def scores(self, hidden: Tensor, activation: Any) -> Tensor:
        """Return the units' scores, float32 [T, U]."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self._scores(hidden.float(), activation)

    def _scores(self, x: Tensor, activation: Any) -> Tensor:
        # A model that was cast as a whole (model.half()) has its routers' weights in that dtype.
        own = {role: parameter.float() for role, parameter in self._parameters.items() if parameter is not None}
        if self.normalise:
            x = functional.normalize(x, dim=-1)
        if self.kind == "linear":
            return functional.linear(x, own["weight"], own.get("bias"))
        if self.kind == "mlp":
            return functional.linear(functional.linear(x, own["first"]).tanh(), own["second"])
        found: Tensor = activation(functional.linear(x, own["gate"], own.get("offset")))
        if "up" in own:
            found = found * functional.linear(x, own["up"])
        return found.abs().softmax(dim=-1)

    def forward(self, hidden: Tensor, activation: Any) -> Tensor:
        """Return the weights of the units, float32 [T, U]; 0 where a unit does not run."""
        scores = self.scores(hidden, activation)
        if self.choose == "threshold":
            return self._gated(scores)
        ranked = scores
        if self.kind == "analytic" and self.has("bias"):
            ranked = scores + self.own("bias")
        chosen = torch.zeros_like(scores).scatter(1, ranked.topk(self.k, dim=1).indices, 1.0)
        if self.weigh == "softmax":
            return scores.masked_fill(chosen == 0, float("-inf")).softmax(dim=-1).mul(self.scale_by)
        if self.weigh == "score":
            return chosen * (1 + scores * self.own("scale"))
        return chosen.mul(self.scale_by)

    def _gated(self, scores: Tensor) -> Tensor:
        """Return q U / (units chosen) of the units whose q = sigmoid(score) exceeds the threshold."""
        q = scores.sigmoid()
        chosen = q > self.threshold
        # None may do so: then the largest runs, since the number of units chosen is divided by.
        chosen = chosen | functional.one_hot(q.argmax(dim=1), self.units).bool() & ~chosen.any(dim=1, keepdim=True)
        self.gates = gated = q * chosen
        weights: Tensor
        if self.weigh == "one":
            weights = chosen.to(q.dtype) * self.scale_by
            return weights
        if self.training and self.straight_through:
            gated = gated.detach() + q - q.detach()
        weights = gated * (self.units / chosen.sum(dim=1, keepdim=True))
        return weights
