"""A MoE block's experts on a GPU, in four launches: plan, gate and up, down, combine; with gradients.

Shapes: T tokens, K slots a token, R rows, E experts, D hidden, F expert width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from espalier.kernels import ragged_gate_up, ragged_matmul, ragged_outer, segment_combine
from espalier.kernels.chooser import Choice, choose
from espalier.kernels.expert_layout import OWN, ExpertLayout, own_inner
from espalier.kernels.jit import INSTALLED
from espalier.kernels.ragged_gate_up import Weights
from espalier.kernels.route_plan import NO_SKIP, RoutePlan, SkipRule, plan
