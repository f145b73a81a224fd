"""What the rows of a table are called."""

from espalier.sweep import LABEL, Config, Point, is_seed
from espalier.tune_settings import Tuning


def row_label(config: Config, point: Point) -> str:
    """The name of a table's row: the sweep's own, or the method, what it removes, and what else varies but the seed."""
    if LABEL in point:
        return str(point[LABEL])
    method, then = config["method"], config["then"]
    parts = ["full" if method["name"] == "none" else method["name"]]
    if method.get("ratio") is not None:
        parts.append(f"{100 * method['ratio']:g} %")
    if then["name"] != "none":
        parts = [] if method["name"] == "none" else [*parts, "+"]
        parts.append(then["name"])
    if config["tuning"]["name"] != "none":
        parts += ["+", Tuning.of(config["tuning"]).label]
    if config["after"]["name"] != "none":
        parts += ["+", config["after"]["name"]]
    known = {"method", "method@then", "method.ratio", "tuning", "method@after"}
    shown = {key: value for key, value in point.items() if key not in known and not is_seed(key)}
    parts += [f"{key.removeprefix('method.')}={value}" for key, value in shown.items()]
    return " ".join(parts)
