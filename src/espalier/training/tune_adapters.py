"""Low-rank adapters (LoRA, Hu et al., ICLR 2022, arXiv 2106.09685) in a loaded model, by peft, and merging them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

NAME = "default"


class Adapters:
    """Adapters of rank `rank`, scaled by `alpha` / rank, at the linear layers whose weights `names` lists.

    The model's own parameters are frozen; those of the adapters are to be trained. First numbers are drawn by `seed`.
    """

    def __init__(self, model: Any, names: Iterable[str], rank: int, alpha: int, seed: int) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        linear = [name.removesuffix(".weight") for name in names]
        config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, bias="none", target_modules=linear)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            inject_adapter_in_model(config, model, adapter_name=NAME)
        self.model = model
        self.layers: dict[str, nn.Module] = {name: model.get_submodule(name) for name in linear}

    def merged(self, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors by their names in the model without adapters: those trained as they are, weights merged.

        `trained` are the parameters that were trained, by their names in the model with adapters.
        """
        found = {name: tensor for name, tensor in trained.items() if ".lora_" not in name}
        with torch.no_grad():
            for name, layer in self.layers.items():
                base: Any = layer.base_layer
                found[f"{name}.weight"] = base.weight.float() + layer.get_delta_weight(NAME).float()  # type: ignore[operator]
        return found


def linear_weights(model: Any) -> list[str]:
    """Return the names of the weights of the decoder layers' linear layers, routers left out."""
    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return [f"{name}.weight" for name in linear if ".layers." in name and not {"router", "gate"} & set(name.split("."))]
