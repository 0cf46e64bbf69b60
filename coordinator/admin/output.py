"""What goes to standard output: one JSON document (or one a line for streams), or tables for people."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import click

View = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column of a table: its title and how to read it from a view.  `right` for numbers."""

    title: str
    value: Callable[[View], object]
    right: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """Where a command's result goes.  With `json` nothing but JSON reaches standard output."""

    json: bool

    def views(self, views: Sequence[View], columns: Sequence[Column], empty: str) -> None:
        """A list: one JSON array, or a table, or the sentence `empty`."""
        if self.json:
            _print_json(list(views))
        elif not views:
            click.echo(empty)
        else:
            _print_table(views, columns)

    def view(self, view: View, facts: Sequence[tuple[str, object]] | None = None) -> None:
        """One thing: one JSON object, or its facts (default: all its keys), one a line."""
        if self.json:
            _print_json(view)
            return
        shown = [(title, cell(value)) for title, value in (facts if facts is not None else view.items())]
        width = max((len(title) for title, text in shown if text), default=0)
        for title, text in shown:
            if text:
                click.echo(f"{title:<{width}}  {text}")

    def done(self, view: View, sentence: str) -> None:
        """The result of a command: its view as JSON, or one sentence."""
        if self.json:
            _print_json(view)
        else:
            click.echo(sentence)

    def line(self, value: View, text: str) -> None:
        """One item of a stream: compact JSON on one line, or `text`."""
        click.echo(json.dumps(value, ensure_ascii=False) if self.json else text)


def _print_json(value: object) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def _print_table(views: Sequence[View], columns: Sequence[Column]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column.title, justify="right" if column.right else "left", overflow="fold")
    for view in views:
        table.add_row(*(Text(cell(column.value(view)) or "-") for column in columns))
    console = Console(highlight=False)
    if not console.is_terminal:
        # A pipe has no width: rows must not be folded for grep and awk.
        console = Console(highlight=False, width=400)
    with console.capture() as captured:
        console.print(table)
    click.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))


def cell(value: object) -> str:
    """A value as people read it; empty for what is absent."""
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.6g}"
        case Mapping():
            return ", ".join(f"{key}={cell(item)}" for key, item in value.items() if cell(item))
        case list() | tuple():
            return ", ".join(cell(item) for item in value)
        case _:
            return str(value)


def size(count: object) -> str:
    """Bytes as `1.5 GiB`."""
    if not isinstance(count, int | float):
        return ""
    number, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(number) >= 1_024 and len(units) > 1:
        number /= 1_024
        units.pop(0)
    return f"{number:.0f} {units[0]}" if units[0] == "B" else f"{number:.1f} {units[0]}"


def percent(part: View) -> str:
    """How much of `of_bytes` the `bytes` are."""
    return f"{100 * part['bytes'] // max(1, part['of_bytes'])} %"


def moment(unix_ms: object) -> str:
    """A time in milliseconds since the epoch as local date and time."""
    if not isinstance(unix_ms, int | float) or not unix_ms:
        return ""
    return datetime.fromtimestamp(unix_ms / 1_000, tz=UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def number(value: object, form: str) -> str:
    """`value` by a format specification; empty if it is absent."""
    return format(value, form) if isinstance(value, int | float) else ""
