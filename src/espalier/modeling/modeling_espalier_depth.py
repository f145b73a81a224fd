"""A causal language model some of whose layers a token may skip; made by Espalier.

This file, `routed_depth.py` and `ragged_cache.py` lie in the checkpoint's directory and need torch and transformers
only: `AutoModelForCausalLM.from_pretrained(DIRECTORY, trust_remote_code=True)`. It is the stock class, or what Espalier
made of it before, with the layers that `depth` in config.json's `espalier` names routed.
"""

from typing import Any, ClassVar

from transformers import LlamaForCausalLM as BaseForCausalLM

from .routed_depth import ROUTER, route_depth


class EspalierForCausalLM(BaseForCausalLM):  # type: ignore[misc]
    """The model with the routed layers that `config.espalier` describes."""

    # A bfloat16 router would decide ties by rounding.
    _keep_in_fp32_modules_strict: ClassVar[set[str]] = {
        *(BaseForCausalLM._keep_in_fp32_modules_strict or ()),
        ROUTER,
    }
    # Masks of packed tokens are known to these only.
    _supports_flash_attn = False
    _supports_flex_attn = False
    _can_compile_fullgraph = False

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return bool(BaseForCausalLM._supports_default_dynamic_cache())

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return bool(BaseForCausalLM._can_set_experts_implementation())

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        route_depth(self, config.espalier["depth"])
