"""Ids: how they are made, and how what a person typed is resolved to one."""

from __future__ import annotations

import secrets
import string
from collections.abc import Iterable, Sequence
from typing import TypeVar

from coordinator.core.model import ENDED, Agent, Job, Refusal, State, Token

_ALPHABET = string.ascii_lowercase + string.digits
Named = TypeVar("Named", Agent, Job)


class UnknownNameError(Exception):
    """What was typed names nothing, or more than one thing."""

    def __init__(self, refusal: Refusal, message: str) -> None:
        super().__init__(message)
        self.refusal = refusal


def new_id(prefix: str, taken: Iterable[str]) -> str:
    """A fresh random id: `prefix` and 8 characters of [a-z0-9]."""
    known = frozenset(taken)
    while (made := prefix + "".join(secrets.choice(_ALPHABET) for _ in range(8))) in known:
        pass
    return made


def job(state: State, text: str) -> Job:
    """The job with this id, name (the live one first, else the newest) or unique id prefix."""
    jobs = list(state.jobs.values())
    named = [one for one in jobs if one.spec.name == text]
    live = [one for one in named if one.phase not in ENDED]
    named = live[-1:] or named[-1:]
    return _one(
        text,
        {str(one.job_id): one for one in jobs},
        named,
        what="job",
        listing="muster job list --all",
        refusal=Refusal.UNKNOWN_JOB,
    )


def agent(state: State, text: str) -> Agent:
    """The agent with this id, unique name or unique id prefix."""
    agents = list(state.agents.values())
    return _one(
        text,
        {str(one.agent_id): one for one in agents},
        [one for one in agents if one.name == text],
        what="agent",
        listing="muster agent list --all",
        refusal=Refusal.UNKNOWN_AGENT,
    )


def token(state: State, text: str) -> Token:
    """The token with this public id or unique prefix of it."""
    return _one(
        text,
        {str(one.token_id): one for one in state.tokens.values()},
        [],
        what="token",
        listing="muster token list --all",
        refusal=Refusal.UNKNOWN_TOKEN,
    )


Thing = TypeVar("Thing", Agent, Job, Token)


def _one(
    text: str, by_id: dict[str, Thing], named: Sequence[Thing], *, what: str, listing: str, refusal: Refusal
) -> Thing:
    if text in by_id:
        return by_id[text]
    found = list(named) or [thing for id_, thing in by_id.items() if text and id_.startswith(text)]
    if len(found) == 1:
        return found[0]
    if not found:
        raise UnknownNameError(refusal, f"{what}: there is no {what} {text!r}; see `{listing}`")
    raise UnknownNameError(
        refusal,
        f"{what}: {text!r} could be any of {len(found)} {what}s; give more of the id (see `{listing}`)",
    )
