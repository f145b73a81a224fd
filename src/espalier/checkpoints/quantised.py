"""Which quantisation a checkpoint's config.json declares, and what makes plain weights of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from espalier.errors import UserError

OURS = ("fp8", "mxfp4")
ORIGINAL = "Use the unquantised model that it was made from"
GPTQMODEL = f"{ORIGINAL}, or gptqmodel.utils.model_dequant.dequantize_model(SOURCE, OUT) of GPTQModel"
TRANSFORMERS = "Write it again with transformers: AutoModelForCausalLM.from_pretrained(SOURCE)"
COMPRESSED = "compressed-tensors"
REMEDIES = {
    "gptq": GPTQMODEL,
    "awq": GPTQMODEL,
    "auto-round": GPTQMODEL,
    "bitsandbytes": f"{TRANSFORMERS}.dequantize().save_pretrained(OUT)",
    "higgs": f"{TRANSFORMERS}.dequantize().save_pretrained(OUT)",
    "gguf": f"{TRANSFORMERS[:-1]}, gguf_file=FILE).save_pretrained(OUT)",
    COMPRESSED: f"{ORIGINAL}, or convert_checkpoint with CompressedTensorsDequantizer of "
    "compressed_tensors.entrypoints.convert",
}


def quantisation(config: dict[str, Any]) -> dict[str, Any] | None:
    """Return the quantisation settings of a config.json, also those of a text model inside it; None without any.

    `quant_method` is always set, as transformers names it, or `unknown`.
    """
    for part in (config, config.get("text_config")):
        for key in ("quantization_config", "compression_config"):
            found = part.get(key) if isinstance(part, dict) else None
            if found is not None:
                settings = dict(found) if isinstance(found, dict) else {}
                return settings | {"quant_method": _method(settings, key)}
    return None


def without_quantisation(config: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a config.json that declares plain weights."""
    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "compression_config")}
    if isinstance(plain.get("text_config"), dict):
        plain["text_config"] = without_quantisation(plain["text_config"])
    return plain


def refuse_quantised(directory: Path, config: dict[str, Any]) -> None:
    """Raise UserError, with the method's name and what to do, when the weights in `directory` are quantised."""
    settings = quantisation(config)
    if settings is None:
        return
    method = settings["quant_method"]
    if method in OURS:
        remedy = f"Run `espalier dequantise {directory} OUT` and use OUT"
    else:
        remedy = REMEDIES.get(method, ORIGINAL)
    raise UserError(
        f"{directory / 'config.json'}: quantization_config: the weights are quantised ({method}). {remedy}."
    )


def _method(settings: dict[str, Any], key: str) -> str:
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return "bitsandbytes"  # whose older files do not name it
    return str(settings.get("quant_method") or (COMPRESSED if key == "compression_config" else "unknown"))
