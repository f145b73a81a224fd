"""What the rows of a table are called."""

from espalier.sweep import LABEL, NAMES, Config, Point, is_shown, overrides_of, shown
from espalier.tune_settings import Tuning


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
