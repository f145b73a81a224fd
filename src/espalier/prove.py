"""Proof of a written checkpoint in a fresh process: it loads whole and computes what the live plan computes.

`python -m espalier.prove SOURCE OUT [PLAN]` prints one JSON line. PLAN (default OUT/plan.json) is the plan
that led from SOURCE to OUT. Exit code 1 when the proof fails.
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch

from espalier.checkpoint import Checkpoint
from espalier.families import Family
from espalier.plan import Plan
from espalier.runtime import live, load, load_with_info, moe_blocks

ROWS, LENGTH = 4, 16
# Largest difference of two logits over the largest logit. Both models compute in fp32 whatever the
# checkpoint's dtype, so that rounding cannot hide a wrong tensor: measured 1e-7 to 3e-6.
TOLERANCE = 1e-4
# Rows where a token's choice of experts hangs on less than this relative gap are left out: rounding decides there.
GAP = 1e-5


def prove(source: Path, out: Path, plan: Plan) -> dict[str, Any]:
    """Compare the logits of the checkpoint `out` with those of `source` changed in memory by `plan`.

    Returns `max_abs_diff`, `max_abs_logit`, `tolerance` (relative), `rows` compared, or `error`: what is wrong.
    """
    checkpoint = Checkpoint(source)
    family = checkpoint.family
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, int(checkpoint.config["vocab_size"]), (ROWS, LENGTH), generator=generator)
    # The weights are merged and rounded in the checkpoint's own dtype, then both compute in fp32.
    model = live(load(source), plan, family).float()
    gaps = _watch_gaps(model, family)
    expected = _logits(model, ids)
    decided = torch.stack(gaps).amin(dim=0).reshape(ROWS, LENGTH).amin(dim=1) > GAP
    del model
    gc.collect()
    written, loading = load_with_info(out)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading[what]:
            return {"error": f"{what.replace('_', ' ')}: {', '.join(loading[what][:3])}"}
    difference = (_logits(written.float(), ids) - expected).abs().amax(dim=(1, 2))
    largest = float(expected.abs().max())
    compared = difference[decided] if decided.any() else difference
    worst = float(compared.max())
    report: dict[str, Any] = {
        "max_abs_diff": worst,
        "max_abs_logit": largest,
        "tolerance": TOLERANCE,
        "rows": len(compared),
    }
    if not worst <= TOLERANCE * largest:
        report |= {"error": f"logits differ by {worst:.3g} of {largest:.3g}, tolerance {TOLERANCE:g} of that"}
    return report


@torch.inference_mode()
def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits [ROWS, LENGTH, vocabulary] in fp32."""
    logits: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return logits.float()


def _watch_gaps(model: Any, family: Family) -> list[torch.Tensor]:
    """Return a list to which each router adds, a token, the relative gap between the last chosen and the next."""
    gaps: list[torch.Tensor] = []

    def watch(router: Any, inputs: Any, output: Any) -> None:
        probabilities = output[0].float().softmax(dim=-1).sort(dim=-1, descending=True).values  # [T, E]
        k = output[2].shape[-1]
        if k < probabilities.shape[-1]:
            gaps.append(1 - probabilities[:, k] / probabilities[:, k - 1])
        else:
            gaps.append(torch.ones_like(probabilities[:, 0]))

    for block in moe_blocks(model, family).values():
        getattr(block, family.router_module).register_forward_hook(watch)
    return gaps


def main(argv: list[str]) -> int:
    """Prove and print the report; return 1 when the proof fails."""
    source, out = Path(argv[0]), Path(argv[1])
    report = prove(source, out, Plan.load(Path(argv[2]) if len(argv) > 2 else out / "plan.json"))
    print(json.dumps(report))
    return 1 if "error" in report else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
