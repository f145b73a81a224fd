"""Probes: what a calibration pass adds up of each MoE block, dense FFN or attention, as arrays for methods; one a file.

One instance observes one layer. All sums are float64; only tokens that the attention mask keeps count.
"""

from espalier.probes.attention_rank import AttentionRank
from espalier.probes.coactivation import Coactivation
from espalier.probes.ffn_energy import FFNEnergy
from espalier.probes.ffn_inputs import FFNInputs
from espalier.probes.inputs import Inputs
from espalier.probes.logit_gram import LogitGram
from espalier.probes.mean_output import MeanOutput
from espalier.probes.neuron_energy import NeuronEnergy
from espalier.probes.output_norm import OutputNorm
from espalier.probes.probe import Arrays, DenseProbe, LayerProbe, Probe
from espalier.probes.residual_gram import ResidualGram
from espalier.probes.routed_moments import RoutedMoments
from espalier.probes.routing import Routing
from espalier.probes.token_importance import TokenImportance
from espalier.probes.usage import Usage

__all__ = ["DENSE_PROBES", "LAYER_PROBES", "PROBES", "Arrays", "DenseProbe", "LayerProbe", "Probe"]

# In this order they see a trace: residual_gram after mean_output, whose outputs it can then share.
PROBES: dict[str, type[Probe]] = {
    "usage": Usage,
    "output_norm": OutputNorm,
    "routed_moments": RoutedMoments,
    "neuron_energy": NeuronEnergy,
    "logit_gram": LogitGram,
    "coactivation": Coactivation,
    "routing": Routing,
    "token_importance": TokenImportance,
    "inputs": Inputs,
    "mean_output": MeanOutput,
    "residual_gram": ResidualGram,
}

# Those of a dense model's FFNs.
DENSE_PROBES: dict[str, type[DenseProbe]] = {"ffn_energy": FFNEnergy, "ffn_inputs": FFNInputs}

# Those of the attention of either kind of model's decoder layers.
LAYER_PROBES: dict[str, type[LayerProbe]] = {"attention_rank": AttentionRank}
