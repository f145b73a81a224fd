"""What conf/calibration may say, checked before any text is read."""

from typing import Any

from espalier.errors import UserError, nearest

KEYS = ("name", "source", "domains", "samples", "length", "seed", "draw", "path", "text", "shards")
HUB_KEYS = ("id", "revision", "file")


def check_calibration(calibration: dict[str, Any]) -> None:
    """Raise UserError for a wrong key or value, or a missing one, of a composed calibration."""
    where = f"conf/calibration/{calibration.get('name')}.yaml"
    known = [*KEYS, *HUB_KEYS]
    for key in calibration:
        if key not in known and key != "content" and not key.startswith("_"):
            raise UserError(f"{where}: unknown key {key!r}; {nearest(key, known)}.")
    if calibration.get("source") == "windows":  # made by the graph
        return
    needed = {"embedded": ("domains",), "file": ("path",), "hub": HUB_KEYS}
    source = calibration.get("source")
    if source not in needed:
        raise UserError(f"{where}: source={source!r}; {nearest(str(source), list(needed))}.")
    for key in ("samples", "length", "seed", *needed[source]):
        if key not in calibration:
            raise UserError(f"{where}: key {key!r} has no value. Give calibration.{key}=... .")
    draw = calibration.get("draw", "blocks")
    if draw not in ("blocks", "documents"):
        raise UserError(f"{where}: draw={draw!r}; {nearest(str(draw), ['blocks', 'documents'])}.")
    for key, least in (("samples", 1), ("length", 2), ("seed", 0)):
        value = calibration[key]
        if value is None and key == "samples" and draw == "blocks":
            continue  # all blocks
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"{where}: {key}={value}, expected a whole number >= {least}.")
