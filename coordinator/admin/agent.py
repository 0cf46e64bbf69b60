"""`muster agent`: see and steer the volunteers' machines."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from coordinator.admin.options import duration, with_coordinator
from coordinator.admin.output import Column, Output, View, moment, number, percent, size

if TYPE_CHECKING:
    from coordinator.admin.connection import Coordinator


@click.group()
def agent() -> None:
    """See and steer the volunteers' machines.

    AGENT is an agent's id, a unique prefix of it, or its name if only one has it.
    """


@agent.command("list")
@click.option("--all", "-a", "gone_too", is_flag=True, help="Those that are gone or banned too.")
@with_coordinator
def list_agents(*, coordinator: Coordinator, output: Output, gone_too: bool) -> None:
    """Agents, in order of admission."""
    from protos import admin_pb2

    views = coordinator.views(coordinator.stub.ListAgents, admin_pb2.ListRequest(all=gone_too))
    columns = (
        Column(title="AGENT", value=lambda view: view.get("id")),
        Column(title="NAME", value=lambda view: view.get("name")),
        Column(title="PRESENCE", value=lambda view: view.get("presence")),
        Column(title="STANDING", value=standing),
        Column(title="JOB", value=lambda view: view.get("job_name") or view.get("job")),
        Column(title="STEP", value=lambda view: view.get("step") or None, right=True),
        Column(title="ACTIVITY", value=activity),
        Column(title="TOKENS/S", value=lambda view: number(view.get("tokens_per_s"), ",.0f"), right=True),
        Column(title="GPUS", value=_gpus),
        Column(title="DISK FREE", value=lambda view: size(view.get("disk_free_bytes")), right=True),
    )
    output.views(views, columns, "no agents; invite some with `muster token create`")


@agent.command()
@click.argument("agent_ref", metavar="AGENT")
@with_coordinator
def show(*, coordinator: Coordinator, output: Output, agent_ref: str) -> None:
    """All about one agent."""
    from protos import admin_pb2

    view = coordinator.view(coordinator.stub.GetAgent, admin_pb2.AgentRef(agent=agent_ref))
    output.view(
        view,
        [
            ("agent", view.get("id")),
            ("name", view.get("name")),
            ("presence", view.get("presence")),
            ("standing", standing(view)),
            ("strikes", view.get("strikes")),
            ("job", view.get("job_name") or view.get("job")),
            ("unmet", view.get("unmet")),
            ("step", view.get("step")),
            ("activity", activity(view)),
            ("tokens/s", number(view.get("tokens_per_s"), ",.0f")),
            ("gpus", _gpus(view)),
            ("disk free", size(view.get("disk_free_bytes"))),
            ("cached blobs", view.get("cached_blobs")),
            ("lends its cache", view.get("lends_cache")),
            ("served wrong bytes to", view.get("served_wrong_bytes_to")),
            ("admitted", moment(view.get("admitted_unix_ms"))),
            *(
                (title.replace("_", " "), fact)
                for title, fact in (view.get("facts") or {}).items()
                if title != "gpus"
            ),
        ],
    )


@agent.command()
@click.argument("agent_ref", metavar="AGENT")
@click.option("--reason", default="", help="For people.")
@with_coordinator
def drain(*, coordinator: Coordinator, output: Output, agent_ref: str, reason: str) -> None:
    """Let it finish the step, leave its job and take no more work."""
    _command(coordinator, output, "drain", agent_ref, reason)


@agent.command()
@click.argument("agent_ref", metavar="AGENT")
@click.option(
    "--for", "length", type=duration, default="0", help="How long, e.g. 10m; default until released."
)
@click.option("--reason", default="", help="For people.")
@with_coordinator
def quarantine(
    *, coordinator: Coordinator, output: Output, agent_ref: str, length: float, reason: str
) -> None:
    """Keep it from training for a time."""
    if 0 < length < 1:
        raise click.BadParameter("expected at least 1s", param_hint="--for")
    _command(coordinator, output, "quarantine", agent_ref, reason, round(length))


@agent.command()
@click.argument("agent_ref", metavar="AGENT")
@with_coordinator
def release(*, coordinator: Coordinator, output: Output, agent_ref: str) -> None:
    """End its quarantine or drain."""
    _command(coordinator, output, "release", agent_ref, "")


@agent.command()
@click.argument("agent_ref", metavar="AGENT")
@click.option("--reason", default="", help="For people.")
@with_coordinator
def ban(*, coordinator: Coordinator, output: Output, agent_ref: str, reason: str) -> None:
    """Revoke its identity and close its session, for good."""
    _command(coordinator, output, "ban", agent_ref, reason)


def activity(view: View) -> str:
    """What it does, and how far a fetch has come."""
    fetching = view.get("fetching")
    text = str(view.get("activity") or "")
    return f"{text} {percent(fetching)} of {size(fetching['of_bytes'])}" if fetching else text


def standing(view: View) -> str:
    """May it train: standing, until when and why, and whether it is draining."""
    text = str(view.get("standing") or "")
    if view.get("quarantined_until_unix_ms"):
        text += f" until {moment(view['quarantined_until_unix_ms'])}"
    detail = view.get("standing_detail") or view.get("standing_why")
    if detail and text != "eligible":
        text += f" ({detail})"
    return f"{text}, draining" if view.get("draining") else text


def _command(
    coordinator: Coordinator, output: Output, name: str, agent_ref: str, reason: str, seconds: int = 0
) -> None:
    from protos import admin_pb2

    request = admin_pb2.AgentCommandRequest(
        agent=agent_ref,
        kind=f"AGENT_COMMAND_KIND_{name.upper()}",
        reason=reason,
        seconds=seconds,
    )
    view = coordinator.view(coordinator.stub.CommandAgent, request)
    shown = (
        f"{view.get('id', agent_ref)}  {view.get('name', '')}  {view.get('presence', '')}  {standing(view)}"
    )
    output.done(view, shown.rstrip())


def _gpus(view: View) -> str:
    gpus = (view.get("facts") or {}).get("gpus") or []
    names = [str(gpu.get("name", "?")) for gpu in gpus]
    return ", ".join(f"{names.count(name)}x {name}" for name in dict.fromkeys(names)) or "cpu"
