"""What becomes of a checkpoint's files under a plan, whatever kind of model it is."""

from dataclasses import dataclass
from pathlib import Path
from re import sub
from typing import TYPE_CHECKING, Any

from espalier.checkpoints.shards import OutputTensor

if TYPE_CHECKING:
    from espalier.checkpoints.checkpoint import Checkpoint
    from espalier.plans.plan import Plan

CLASS = "EspalierForCausalLM"


@dataclass(frozen=True)
class Rewrite:
    """Tensors by source shard, how many of the source's had which fate, config.json, and code by file name."""

    shards: list[list[OutputTensor]]
    fates: dict[str, int]
    config: dict[str, Any]
    code: dict[str, str]  # empty where a stock model stands for the result


def rewrite_of(checkpoint: "Checkpoint", plan: "Plan") -> Rewrite:
    """Return what `plan` makes of `checkpoint`; UserError where it does not fit."""
    from espalier.surgery.depth_rewrite import rewrite_depth, without_depth

    rest, depth = without_depth(plan)
    if checkpoint.is_dense:
        from espalier.surgery.dense_rewrite import rewrite_dense

        return rewrite_depth(checkpoint, rewrite_dense(checkpoint, rest), depth, plan)
    from espalier.surgery.moe_rewrite import rewrite_moe

    return rewrite_depth(checkpoint, rewrite_moe(checkpoint, rest), depth, plan)


def own_text(name: str) -> str:
    """Return the text of a file of `espalier.modeling`."""
    return (Path(__file__).parents[1] / "modeling" / name).read_text()


def auto_map(code: str) -> dict[str, str]:
    """Return what config.json says of the class in the file `code`."""
    return {"AutoModelForCausalLM": f"{code.removesuffix('.py')}.{CLASS}"}


def shipped_code(architecture: str, *files: str) -> dict[str, str]:
    """Return the files to ship, the first with the stock class `architecture` to derive from."""
    texts = {name: own_text(name) for name in files}
    line = rf"\g<1>{architecture} as StockForCausalLM"
    return texts | {files[0]: sub(r"(?m)^(from transformers import )\w+ as StockForCausalLM", line, texts[files[0]])}
