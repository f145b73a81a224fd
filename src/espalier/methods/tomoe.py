"""ToMoE: overlapping subsets of an FFN's neurons as experts, of which each token runs one; the model stays frozen.

Gao et al., TMLR 2026 (arXiv 2501.15316). Which neurons an expert has and which expert a token runs is learnt
(`espalier.fits.tomoe`); what an expert gives is not weighed. With `experts=1` every token runs the same neurons: static
pruning by the same training, as DISP-LLM (arXiv 2410.11988) does.

The learnt widths differ by layer and expert. One number is added to all logits of all masks so that experts hold the
fraction 1 - ratio of the neurons, mean over layers: with `exact=widest` the widest of each layer, what the budget term
of the loss asks for; with `mean` their average, about what tokens run, since load is balanced; with `none` no number.

With `attention=pairs` queries and keys lose rotary pairs, and the ratio is of the parameters of FFNs, queries and keys.
With `all` tokens also leave out dimensions of their values, as in the paper, whose loss counts them; since that saves
nothing, they are no part of the ratio here.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from espalier.checkpoints.shape import DenseShape
from espalier.collecting.stats import Stats
from espalier.errors import UserError, nearest
from espalier.methods.options import fraction, whole_number
from espalier.methods.signatures import pieces, segments_of
from espalier.plans.narrow_attention import ROLES, NarrowAttention
from espalier.plans.operations import Operation
from espalier.plans.plan import Plan
from espalier.plans.plan_tensors import PlanTensor
from espalier.plans.split import Split
from espalier.training.fit_settings import Fitting

if TYPE_CHECKING:
    from espalier.models.ffn_weights import FFNWeights

WHERE = "conf/method/tomoe.yaml"
POSITIVE = ("temperature", "rate")
EXACT = ("widest", "mean", "none")
ATTENTION = ("none", "pairs", "all")
MEDIAN = -math.log(math.log(2))  # of the noise that masks are learnt with
VALUE_OFFSET = 3.0  # b of the masks of values
NUMBERS = ("offset", "prior", "distill", "budget", "union", "balance")


@dataclass(frozen=True)
class Tomoe:
    """Split each FFN into `experts` overlapping ones, the widest of the fraction 1 - ratio of its neurons.

    The other keys are those of the fit: `fits.tomoe` has the loss; `tokens` are read in all, `batch` sequences a step.
    """

    ratio: float
    experts: int = 8
    exact: str = "widest"
    embedding: int = 128
    temperature: float = 0.4
    offset: float = 3.0
    prior: float = 0.0
    attention: str = "none"
    distill: float = 2.0
    budget: float = 16.0
    union: float = 3.0
    balance: float = 1.0
    rate: float = 0.001
    tokens: int = 65536
    batch: int = 4
    seed: int = 0
    dense: ClassVar[bool] = True
    probes: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        whole_number("tomoe", "experts", self.experts, 1)
        whole_number("tomoe", "embedding", self.embedding, 4)
        if self.embedding % 4:
            raise UserError(
                f"{WHERE}: embedding={self.embedding} is not a multiple of 4. Use {self.embedding // 4 * 4}."
            )
        for key in (*POSITIVE, *NUMBERS):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int | float) or (key in POSITIVE and value <= 0):
                raise UserError(f"{WHERE}: {key}={value} is not a number{' above 0' if key in POSITIVE else ''}.")
        if self.attention not in ATTENTION:
            raise UserError(f"{WHERE}: attention={self.attention!r}; {nearest(str(self.attention), list(ATTENTION))}.")
        if self.exact not in EXACT:
            raise UserError(f"{WHERE}: exact={self.exact!r}; {nearest(str(self.exact), list(EXACT))}.")
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, int | float) or not 0 < self.ratio < 1:
            raise UserError(
                f"{WHERE}: ratio={self.ratio} is not a fraction in (0, 1) of neurons that a token leaves out."
            )
        _ = self.fit  # its own keys are refused now, not when it runs

    @property
    def fit(self) -> Fitting:
        """The settings of what is learnt."""
        own: dict[str, Any] = {
            "experts": self.experts,
            "embedding": self.embedding,
            "target": 1 - float(self.ratio),
            "seed": self.seed,
        }
        own |= {key: float(getattr(self, key)) for key in ("temperature", *NUMBERS)}
        if self.attention != "none":
            own["attention"] = self.attention
        return Fitting(
            "tomoe", self.rate, 1, self.batch, schedule="constant", weight_decay=0.05, tokens=self.tokens,
            seed=self.seed, own=own,
        )  # fmt: skip

    def check(self, shape: DenseShape, tokens: int) -> None:
        """Raise UserError for a ratio that leaves all neurons, or none."""
        fraction("tomoe", self.ratio, shape.width, "neurons")
        if self.attention != "none" and not shape.pairs:
            raise UserError(f"{WHERE}: attention={self.attention}: {shape.family} does not say how wide heads are.")

    def plan(self, stats: Stats, shape: DenseShape, ffns: "FFNWeights") -> Plan:
        """Evidence per layer: widths of the experts, stored neurons, stretches of storage that an expert lies in."""
        learnt = dict(stats.layers("tomoe"))
        shift = self._shift(list(learnt.values()), shape) if self.exact != "none" else 0.0
        layers: dict[int, tuple[Operation, ...]] = {}
        evidence: dict[int, dict[str, Any]] = {}
        tensors: dict[str, PlanTensor] = {}
        for layer, arrays in learnt.items():
            masks = _masks(arrays["logits"], shift)
            neurons, segments, units = segments_of(masks)
            name, weight = f"{layer}.neurons", f"{layer}.router.weight"
            tensors[name] = PlanTensor.of(neurons)
            router: dict[str, Any] = {"router": "none"}
            if self.experts > 1:
                tensors[weight] = PlanTensor.of(arrays["router"])
                router = {"router": "linear", "k": 1, "units": units, "tensors_of": {"weight": weight}}
            layers[layer] = (Split(segments, neurons=name, **router),)
            widths = masks.sum(axis=1)
            evidence[layer] = {"widths": widths.tolist(), "stored": len(neurons), "pieces": pieces(units)}
            if self.attention != "none":
                narrow, own = self._narrow(layer, arrays, shift)
                layers[layer] = (*layers[layer], narrow)
                tensors |= own
                evidence[layer]["pairs"] = narrow.kept
        return Plan({"name": "tomoe"} | asdict(self), layers, evidence, tensors=tensors)

    def _narrow(
        self, layer: int, arrays: Mapping[str, NDArray[Any]], shift: float
    ) -> tuple[NarrowAttention, dict[str, PlanTensor]]:
        """Return what attention leaves out, with the tensors that say it."""
        pairs = np.flatnonzero(_masks(arrays["pairs"][None], shift)[0])
        tensors = {f"{layer}.pairs": PlanTensor.of(pairs)}
        own: dict[str, Any] = {"pairs": f"{layer}.pairs", "kept": len(pairs)}
        if self.attention == "all":
            names = {role: f"{layer}.values.{role}" for role in ROLES}
            tensors |= {name: PlanTensor.of(arrays[role]) for role, name in names.items()}
            own |= {"values": names, "embedding": self.embedding, "offset": VALUE_OFFSET + MEDIAN}
        return NarrowAttention(**own), tensors

    def _shift(self, learnt: list[dict[str, NDArray[Any]]], shape: DenseShape) -> float:
        """Return the number that makes experts, and pairs, as many as the ratio asks for, by bisection."""
        wanted = 1 - self.ratio
        neuron, pair = shape.neuron_parameters, 0 if self.attention == "none" else shape.pair_parameters
        whole = neuron * shape.width + pair * shape.pairs

        def part(arrays: Mapping[str, NDArray[Any]], shift: float) -> float:
            widths = _masks(arrays["logits"], shift).sum(axis=1)
            used = neuron * float(widths.max() if self.exact == "widest" else widths.mean())
            if pair:
                used += pair * float(_masks(arrays["pairs"][None], shift).sum())
            return used / whole

        def fraction(shift: float) -> float:
            return float(np.mean([part(arrays, shift) for arrays in learnt]))

        low, high = -1.0, 1.0
        while fraction(low) > wanted:
            low *= 2
        while fraction(high) < wanted:
            high *= 2
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if fraction(middle) < wanted else (low, middle)
        return min((low, high), key=lambda shift: abs(fraction(shift) - wanted))


def _masks(logits: NDArray[np.float32], shift: float) -> NDArray[np.bool_]:
    """Return what the logits [E, F] keep, bool; a row without any keeps that of its largest logit."""
    masks: NDArray[np.bool_] = logits + shift > 0
    for expert in np.flatnonzero(~masks.any(axis=1)):
        masks[expert, logits[expert].argmax()] = True
    return masks
