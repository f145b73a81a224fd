"""What the rows of a table are called."""

from espalier.sweep import Config, Point
from espalier.tune_settings import Tuning


def is_seed(key: str) -> bool:
    """Whether a key of a sweep is a seed: rows that differ only in seeds are one line of the table."""
    return key.rpartition(".")[2] == "seed"


def row_label(config: Config, point: Point) -> str:
    """The name of a table's row: the method, what it removes, and what else the sweep varies but the seed."""
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
