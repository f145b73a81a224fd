"""Where the package's own model, texts and tasks lie."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent / "assets"


def model_directory() -> Path:
    """The embedded OLMoE checkpoint."""
    return ROOT / "model"


def text_directory() -> Path:
    """The committed excerpts, `{domain}/{calibration,validation}.jsonl`."""
    return ROOT / "text"


def task_directory() -> Path:
    """The lm-eval task files."""
    return ROOT / "tasks"
