"""Refuse values that a method's key does not take, naming the YAML, the key and what it takes."""

from typing import Any

from espalier.checkpoints.shape import ModelShape
from espalier.errors import UserError


def one_of(method: str, key: str, value: Any, known: tuple[Any, ...], why: str = "") -> None:
    """Raise UserError unless `value` is one of `known`; `why` may say more about a value that is refused."""
    if isinstance(value, bool) or value not in known:
        choices = ", ".join(map(str, known))
        raise UserError(f"conf/method/{method}.yaml: {key}={value} is not available{why}; available: {choices}.")


def whole_number(method: str, key: str, value: Any, least: int) -> None:
    """Raise UserError unless `value` is an int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"conf/method/{method}.yaml: {key}={value} is not a whole number >= {least}.")


def number(method: str, key: str, value: Any, least: float, most: float) -> None:
    """Raise UserError unless `value` is a number in [least, most]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise UserError(f"conf/method/{method}.yaml: {key}={value} is not a number in {least}..{most}.")


def softmax_router(where: str, shape: ModelShape, what: str, remedy: str, *, plain: bool = False) -> None:
    """Raise UserError unless the router scores experts by a softmax; `plain`: and by nothing besides.

    `what` says what the method takes from the logits.
    """
    fits = shape.router == "softmax" if plain else shape.router.startswith("softmax")
    if not fits:
        raise UserError(f"{where}: {what}, but the router of {shape.family} is {shape.router}. {remedy}")


def fraction(method: str, ratio: Any, of: int, what: str) -> int:
    """Return round(ratio * of), the number of `what` to remove.

    UserError unless ratio is in (0, 1) and removes at least one, but not all.
    """
    where = f"conf/method/{method}.yaml: ratio={ratio}"
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < 1:
        raise UserError(f"{where} is not a fraction in (0, 1) of {what} to remove.")
    removed = round(ratio * of)
    if removed == 0:
        raise UserError(f"{where} removes none of {of} {what}. Use ratio >= {1 / of:g}.")
    if removed == of:
        raise UserError(f"{where} leaves none of {of} {what}. Use ratio <= {int((of - 1) / of * 1000) / 1000:g}.")
    return removed
