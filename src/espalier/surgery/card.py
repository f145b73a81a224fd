"""The model card (README.md) of a written checkpoint; imports no torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from espalier.plans.plan import Plan

LICENCE_KEYS = ("license", "license_name", "license_link")


def card_text(source: Path, plan: Plan, facts: dict[str, Any], shipped_code: Sequence[str]) -> str:
    """Return the card as Markdown with YAML front matter.

    `plan` is the whole plan from the base model on, with `model` and `counts`. `facts` may hold `calibration`,
    `scores` (Markdown) and `node`. The licence is the base's, as its own card in `source` says.
    """
    base = front_matter(source / "README.md")
    id = str(plan.model.get("id") or base.get("base_model") or source.name)
    licence = {key: base[key] for key in LICENCE_KEYS if key in base} or {"license": "other"}
    front = {"base_model": id, **licence, "library_name": "transformers", "tags": ["mixture-of-experts", "espalier"]}
    steps = _steps(plan.method)
    ratios = ", ".join(str(step["ratio"]) for step in steps if "ratio" in step)
    rows = {
        "Base model": id,
        "Base revision": plan.model.get("revision") or "unknown",
        "Method": ", then ".join(_describe(step) for step in steps),
        "Ratio (fraction removed)": ratios or "none",
        "Calibration": facts.get("calibration") or "none",
        "Parameters stored": f"{plan.counts['stored']:,.0f}",
        "Parameters after sharing (unique)": f"{plan.counts['unique']:,.0f}",
        "Parameters active per token, at most": f"{plan.counts['active']:,.0f}",
        "Licence": f"inherited from the base model: {licence['license']}"
        if "license" in base
        else "see the base model",
    }
    if facts.get("node"):
        rows["Espalier node"] = str(facts["node"])
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    scores = f"\n## Scores\n\n{facts['scores']}\n" if facts.get("scores") else ""
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {id}, compressed with Espalier\n\n"
        f"| | |\n| --- | --- |\n{table}\n\n## Who can load it\n\n{_loading(shipped_code)}\n{scores}\n"
        "`plan.json` holds every operation by layer, in the base model's expert ids.\n"
    )


def _loading(shipped_code: Sequence[str]) -> str:
    if shipped_code:
        return (
            "transformers with `AutoModelForCausalLM.from_pretrained(DIRECTORY, trust_remote_code=True)`: the\n"
            f"directory carries its modelling code, `{'`, `'.join(shipped_code)}`: torch and transformers are needed.\n"
            "Without `trust_remote_code=True` the stock class refuses the tensors, or loads them and skips nothing.\n"
            "vLLM, SGLang and llama.cpp do not know this layout."
        )
    return (
        "Stock transformers, without trusting any code: the base model's own layout, tensor names and class, with\n"
        "another number of experts in config.json where it changed. vLLM, SGLang and llama.cpp read it wherever\n"
        "they read the base model; that was not tried."
    )


def front_matter(path: Path) -> dict[str, Any]:
    """Return the YAML front matter of a model card; empty when there is none."""
    if not path.is_file():
        return {}
    parts = path.read_text(errors="replace").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        front = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return {}
    return front if isinstance(front, dict) else {}


def _steps(method: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the methods of a composed plan in order: `then` holds the one that followed."""
    own = {key: value for key, value in method.items() if key != "then"}
    return [own, *_steps(method["then"])] if "then" in method else [own]


def _describe(step: dict[str, Any]) -> str:
    settings = ", ".join(f"{key}={value}" for key, value in step.items() if key not in ("name", "ratio"))
    name = f"`{step.get('name', 'unnamed')}`"
    return f"{name} ({settings})" if settings else name
