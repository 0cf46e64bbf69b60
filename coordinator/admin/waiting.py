"""What a person sees who waits for a job: its steps, and what its agents are still fetching, as bars."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from coordinator.admin.output import View, percent, size

if TYPE_CHECKING:
    from rich.console import Console

MOST_FETCHING = 8
"""Agents that get a bar of their own."""


def bars(view: View) -> list[tuple[str, int, int, str]]:
    """(title, done, of, words) of each bar that a job's view asks for."""
    total = view.get("steps_total") or 0
    done = view.get("committed_step") or 0
    found = [(str(view.get("phase", "")), done, total, f"step {done} of {total or '?'}")]
    for agent in (view.get("fetching") or [])[:MOST_FETCHING]:
        words = f"{size(agent['bytes'])} of {size(agent['of_bytes'])}"
        found.append((f"{agent['name']} fetches", agent["bytes"], agent["of_bytes"], words))
    return found


def fetching(view: View) -> str:
    """What a job's agents are fetching, in one line."""
    return ", ".join(
        f"{agent['name']} {percent(agent)} of {size(agent['of_bytes'])}"
        for agent in view.get("fetching") or ()
    )


@contextlib.contextmanager
def shown(console: Console) -> Iterator[Callable[[View], None]]:
    """A function that draws a job's view in place, if the console is a terminal; it is gone at the end."""
    if not console.is_terminal:
        yield lambda _: None
        return
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[words]}"))
    with Progress(*columns, console=console, transient=True) as drawn:

        def show(view: View) -> None:
            for task in drawn.task_ids:
                drawn.remove_task(task)
            for title, done, total, words in bars(view):
                drawn.add_task(title, completed=done, total=total or None, words=words)
            drawn.refresh()

        yield show
