"""Tune tiles on the GPU at hand: time the chooser's few candidates, keep the best by number of tokens.

A file holds them keyed by the number of tokens, as vLLM's do: {"experts": E, ..., "tiles": {"16": {"gate_up": {...},
"down": {...}}}}. Numbers between two take the next larger one's tiles.

Shapes: T tokens, K chosen, E experts, D hidden, F expert width.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from espalier.errors import UserError
from espalier.kernels import device, ragged
from espalier.kernels.chooser import Choice, Work, rank
from espalier.kernels.expert_layout import ExpertLayout
from espalier.kernels.tile import TileConfig

FORMAT = "espalier.tiles/1"
TOKENS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 1536, 2048, 3072, 4096)  # vLLM's
TILES = "espalier_tiles"  # an experts module's attribute: Choice by number of tokens
REPEATS = 20

Timer = Callable[[Callable[[], Any]], float]
Tiles = Mapping[int, Choice]


def tune(experts: Any, k: int, tokens: Sequence[int] = TOKENS, timer: Timer | None = None) -> dict[int, Choice]:
    """Return the fastest tiles for each number of tokens, of `k` experts each, drawn evenly.

    `experts` is an experts module on a GPU; `timer` gives the seconds of a call (default: events, the median of a few).
    UserError where the kernels do not run.
    """
    layout, down = ExpertLayout.of(experts), experts.down_proj
    reason = ragged.unsupported(layout, down.dtype, down.device)
    if reason is not None:
        raise UserError(f"{type(experts).__name__}: its tiles cannot be tuned: {reason}.")
    target, timer = device.target_of(down.device), timer or _events
    found: dict[int, Choice] = {}
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for number in tokens:
            hidden = torch.randn(number, layout.hidden, generator=generator).to(down)
            picks = torch.rand(number, layout.experts, generator=generator).argsort(dim=1)[:, :k].to(down.device)
            weights = torch.full((number, k), 1 / k).to(down)
            work = Work.expected(layout.hidden, layout.width, number, layout.experts, k, layout.gated)
            times: list[tuple[float, int, Choice]] = []
            for choice in rank(work, target):
                run = _call(experts, layout, hidden, picks, weights, choice)
                times.append((timer(run), len(times), choice))
            found[number] = min(times)[2]
    return found


def _call(experts: Any, layout: ExpertLayout, *given: Any) -> Callable[[], Any]:
    hidden, picks, weights, choice = given
    return lambda: ragged.forward(experts, layout, hidden, picks, weights, choice=choice)


def _events(call: Callable[[], Any]) -> float:
    call()  # compiles
    seconds = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        seconds.append(float(start.elapsed_time(end)) * 1e-3)
    return sorted(seconds)[REPEATS // 2]


def save_tiles(path: Path, experts: Any, tiles: Tiles) -> None:
    """Write tuned tiles of modules like `experts` as JSON."""
    layout = ExpertLayout.of(experts)
    document = {
        "format": FORMAT,
        **_sizes(layout),
        "device": torch.cuda.get_device_name(experts.down_proj.device) if experts.down_proj.is_cuda else "interpreter",
        "tiles": {
            str(number): {"gate_up": choice.gate_up.document(), "down": choice.down.document()}
            for number, choice in sorted(tiles.items())
        },
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


def use_tiles(model: torch.nn.Module, path: Path) -> int:
    """Let every experts module of `model` that has the file's sizes use its tiles, and return how many these are.

    UserError for a file of another format, or that fits no module.
    """
    document = json.loads(path.read_text())
    if document.get("format") != FORMAT:
        raise UserError(f"{path}: format={document.get('format')!r} is not {FORMAT}. Write it with save_tiles.")
    tiles = {
        int(number): Choice(TileConfig(**one["gate_up"]), TileConfig(**one["down"]), 0.0)
        for number, one in document["tiles"].items()
    }
    wanted = {key: document[key] for key in ("experts", "hidden", "width", "gated")}
    number = 0
    for module in model.modules():
        if hasattr(module, "_is_expert_parallel") and _sizes(ExpertLayout.of(module)) == wanted:
            setattr(module, TILES, tiles)
            number += 1
    if not number:
        raise UserError(f"{path}: no experts of the model have its sizes {wanted}. Tune for this model.")
    return number


def _sizes(layout: ExpertLayout) -> dict[str, Any]:
    return {"experts": layout.experts, "hidden": layout.hidden, "width": layout.width, "gated": layout.gated}
