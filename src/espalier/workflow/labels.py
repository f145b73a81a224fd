"""What the rows of a table are called."""

from typing import Any

from espalier.training.tune_settings import Tuning
from espalier.workflow.sweep import LABEL, NAMES, PAPER, Config, Point, is_shown, overrides_of, shown


def row_label(config: Config, point: Point) -> str:
    """The name of a table's row: the sweep's own, or the method, what it removes, and what else varies but the seed."""
    if LABEL in point:
        return str(point[LABEL])
    method, then, names = config["method"], config["then"], point.get(NAMES, {})
    parts = [names.get("method", "full" if method["name"] == "none" else method["name"])]
    if method.get("ratio") is not None:
        parts.append(names.get("method.ratio", f"{100 * method['ratio']:g} %"))
    if then["name"] != "none":
        parts = [] if method["name"] == "none" else [*parts, "+"]
        parts.append(names.get("method@then", then["name"]))
    if config["tuning"]["name"] != "none":
        parts += ["+", names.get("tuning", Tuning.of(config["tuning"]).label)]
    if config["after"]["name"] != "none":
        parts += ["+", names.get("method@after", config["after"]["name"])]
    known = {"method", "method@then", "method.ratio", "tuning", "method@after"}
    others = [key for key in overrides_of(point) if key not in known and is_shown(key)]
    parts += [f"{key.removeprefix('method.')}={shown(point, key)}" for key in others]
    return " ".join(parts)


def model_name(model: Config) -> str:
    """What a model is called among others: its id without the organisation."""
    return str(model["id"]).rstrip("/").rpartition("/")[2]


def published_row(config: Config, point: Point) -> dict[str, Any]:
    """Return how a paper prints a row: the model's id, the ratio, and what the sweep says in keys `paper.*`."""
    said = {key.removeprefix(PAPER): str(value) for key, value in point.items() if key.startswith(PAPER)}
    return {"model": str(config["model"]["id"]), "ratio": config["method"].get("ratio")} | said


def left(config: Config) -> float | None:
    """Return the share that a row leaves of what its method takes away: rows of equal shares are compared in pairs.

    1 - ratio, or the target or capacity of what tokens run or enter. None where nothing says how much is left.
    """
    method, tuning = config["method"], config["tuning"]
    if method.get("ratio") is not None:
        return round(1 - float(method["ratio"]), 9)
    for share in (tuning.get("target"), method.get("capacity")):
        if share is not None:
            return round(float(share), 9)
    return None
