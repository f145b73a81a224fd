"""A causal language model whose feed-forward networks run some of their neurons for each token; made by Espalier.

This file, `sparse_ffn.py`, `sparse_router.py` and `sparse_attention.py` lie in the checkpoint's directory and need
torch and transformers only: `AutoModelForCausalLM.from_pretrained(DIRECTORY, trust_remote_code=True)`. It is the stock
class with feed-forward networks and attention projections replaced as `espalier` in config.json says.
"""

from typing import Any, ClassVar

from transformers import LlamaForCausalLM as StockForCausalLM

from .sparse_attention import narrow_attention
from .sparse_ffn import SparseFFN


class EspalierForCausalLM(StockForCausalLM):  # type: ignore[misc]
    """The stock model with the sparse FFNs that `config.espalier` describes."""

    # A bfloat16 router would decide ties by rounding.
    _keep_in_fp32_modules_strict: ClassVar[set[str]] = {
        *(StockForCausalLM._keep_in_fp32_modules_strict or ()),
        "router",
    }

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return bool(StockForCausalLM._supports_default_dynamic_cache())

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        settings = config.espalier
        for index, layer in settings["layers"].items():
            decoder = self.model.layers[int(index)]
            stock = getattr(decoder, settings["module"])
            setattr(decoder, settings["module"], SparseFFN(stock, settings["modules"], layer))
        narrowed = settings.get("attention", {"layers": {}})
        for index, layer in narrowed["layers"].items():
            attention = getattr(self.model.layers[int(index)], narrowed["module"])
            narrow_attention(attention, narrowed["modules"], narrowed["head"], layer)
