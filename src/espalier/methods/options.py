"""Refuse values that a method's key does not take, naming the YAML, the key and what it takes."""

from typing import Any

from espalier.errors import UserError
from espalier.shape import ModelShape


def one_of(method: str, key: str, value: Any, known: tuple[Any, ...], why: str = "") -> None:
    """Raise UserError unless `value` is one of `known`; `why` may say more about a value that is refused."""
    if isinstance(value, bool) or value not in known:
        choices = ", ".join(map(str, known))
        raise UserError(f"conf/method/{method}.yaml: {key}={value} is not available{why}; available: {choices}.")


def whole_number(method: str, key: str, value: Any, least: int) -> None:
    """Raise UserError unless `value` is an int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"conf/method/{method}.yaml: {key}={value} is not a whole number >= {least}.")


def softmax_router(where: str, shape: ModelShape, what: str, remedy: str, *, plain: bool = False) -> None:
    """Raise UserError unless the router scores experts by a softmax; `plain`: and by nothing besides.

    `what` says what the method takes from the logits.
    """
    fits = shape.router == "softmax" if plain else shape.router.startswith("softmax")
    if not fits:
        raise UserError(f"{where}: {what}, but the router of {shape.family} is {shape.router}. {remedy}")
