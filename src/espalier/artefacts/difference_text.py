"""Differences between two results as tables on the terminal."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from espalier.artefacts.difference import Change, Comparison, Value
from espalier.artefacts.lineage import short

MOST = 40  # values that are printed
LONG = 120  # columns of a terminal that is none


def render(found: Comparison) -> None:
    """Print what differs: configuration, code and machine, values."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=LONG)
    console.print(f"A  {escape(found.a.name)}\nB  {escape(found.b.name)}", highlight=False)
    if found.changes:
        console.print("\nconfiguration, the furthest upstream first", highlight=False)
        console.print(_changes("stage", found.changes))
        line = f"They part at {found.changes[0].stage}."
        if found.followers:
            line += f" Different only in what it was made from: {', '.join(found.followers)}."
        console.print(line, highlight=False)
    else:
        console.print("Same configuration: all that both have is made from the same nodes.", highlight=False)
    if found.facts:
        console.print("\ncode and machine, which change no id", highlight=False)
        console.print(_changes("made by", found.facts))
    _values(console, found)


def _changes(first: str, changes: list[Change]) -> Table:
    table = Table()
    for column in (first, "key", "A", "B"):
        table.add_column(column, overflow="fold")
    for change in changes:
        table.add_row(*map(escape, (change.stage, change.key, short(change.a), short(change.b))))
    return table


def _values(console: Console, found: Comparison) -> None:
    different = [value for value in found.values if value.a != value.b]
    both = [value for value in found.values if value.a is not None and value.b is not None]
    if both and not different:
        console.print(f"All {len(both)} values that both have are equal.", highlight=False)
    if not different:
        return
    console.print(f"\nvalues: {len(different)} of {len(found.values)} differ", highlight=False)
    table = Table()
    for column in ("", "A", "B", "B - A"):
        table.add_column(column, justify="left" if not column else "right", overflow="fold")
    for value in different[:MOST]:
        table.add_row(*map(escape, (value.name, _text(value.a), _text(value.b), _gap(value))))
    console.print(table)
    if len(different) > MOST:
        console.print(f"and {len(different) - MOST} more", highlight=False)


def _text(value: float | str | None) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float | int) else short(value)


def _gap(value: Value) -> str:
    numbers = isinstance(value.a, float | int) and isinstance(value.b, float | int)
    return f"{value.b - value.a:+.4g}" if numbers else ""  # type: ignore[operator]
