"""`muster job`: submit, watch and steer training jobs."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coordinator.admin.errors import JobNotCompleted, Unreachable, one_line
from coordinator.admin.options import node_range, with_coordinator
from coordinator.admin.output import Column, Output, View, cell, moment, number

if TYPE_CHECKING:
    from coordinator.admin.connection import Coordinator
    from protos import admin_pb2

ENDED = ("COMPLETED", "FAILED", "CANCELLED")
POLL_S = 1.0


_CHECKPOINT = re.compile(r"(?:(.+)@)?([1-9][0-9]{0,17})", re.ASCII)


@click.group()
def job() -> None:
    """Submit, watch and steer training jobs.

    JOB is a job's id, a unique prefix of it, or the name of a live job.
    """


@job.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--name", help="Name of the job, instead of the file's.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="A.B=VALUE",
    help="Replace one value of the job file (YAML); repeatable.",
)
@click.option("--wait", "wait_for_end", is_flag=True, help="Wait until the job has ended.")
@with_coordinator
def submit(
    *,
    coordinator: Coordinator,
    output: Output,
    file: Path,
    name: str | None,
    settings: tuple[str, ...],
    wait_for_end: bool,
) -> None:
    """Check the job FILE, upload the parts of its dataset that are missing, and submit it."""
    from coordinator.admin.submission import read_job_file, submit_job

    submission = read_job_file(file, settings, name)
    job_id = submit_job(coordinator, submission)
    if wait_for_end:
        _wait(coordinator, output, job_id)
    else:
        output.done({"job_id": job_id, "name": submission.name}, f"{job_id}  {submission.name} submitted")


@job.command("list")
@click.option("--all", "-a", "ended_too", is_flag=True, help="Ended jobs too.")
@with_coordinator
def list_jobs(*, coordinator: Coordinator, output: Output, ended_too: bool) -> None:
    """Jobs, in order of submission."""
    from protos import admin_pb2

    views = coordinator.views(coordinator.stub.ListJobs, admin_pb2.ListRequest(all=ended_too))
    columns = (
        Column(title="JOB", value=lambda view: view.get("id")),
        Column(title="NAME", value=lambda view: view.get("name")),
        Column(title="PHASE", value=lambda view: view.get("phase")),
        Column(title="STEP", value=step_of_total, right=True),
        Column(title="LOSS", value=lambda view: number(view.get("loss"), ".4f"), right=True),
        Column(title="TOKENS/S", value=lambda view: number(view.get("tokens_per_s"), ",.0f"), right=True),
        Column(title="NODES", value=_nodes, right=True),
        Column(title="WHY", value=why),
    )
    output.views(views, columns, "no jobs" if ended_too else "no live jobs (--all shows the ended ones)")


@job.command()
@click.argument("job_ref", metavar="JOB")
@with_coordinator
def show(*, coordinator: Coordinator, output: Output, job_ref: str) -> None:
    """All about one job."""
    from coordinator.admin.waiting import fetching

    view = get_job(coordinator, job_ref)
    generation = view.get("generation") or {}
    output.view(
        view,
        [
            ("job", view.get("id")),
            ("name", view.get("name")),
            ("phase", view.get("phase")),
            ("why", why(view)),
            ("submitted", moment(view.get("submitted_unix_ms"))),
            ("step", step_of_total(view)),
            ("loss", view.get("loss")),
            ("tokens/s", number(view.get("tokens_per_s"), ",.0f")),
            ("dataset", view.get("dataset")),
            ("newest checkpoint", view.get("newest_checkpoint_step")),
            ("rolled back", _rolled_back(view.get("rollback"))),
            ("nodes", f"{view.get('min_nodes', '?')} to {view.get('max_nodes', '?')}"),
            ("generation", generation.get("number")),
            ("world size", generation.get("world_size")),
            ("members", members(view)),
            ("formed because", generation.get("reason")),
            ("standbys", _names(view.get("standbys"))),
            ("fetching", fetching(view)),
            ("failures", view.get("failures")),
            ("last failure", view.get("last_failure")),
        ],
    )


def _rolled_back(rollback: Mapping[str, Any] | None) -> str:
    if not rollback:
        return ""
    steps = f"from step {rollback.get('from_step')} to {rollback.get('to_step')}"
    return f"{steps} by {rollback.get('by')}, {moment(rollback.get('at_unix_ms'))}"


def _command(name: str, help: str) -> None:
    """Add `muster job NAME JOB`, which sends the command of that name."""

    @job.command(name, help=help)
    @click.argument("job_ref", metavar="JOB")
    @with_coordinator
    def command(*, coordinator: Coordinator, output: Output, job_ref: str) -> None:
        from protos import admin_pb2

        view = coordinator.view(
            coordinator.stub.CommandJob,
            admin_pb2.JobCommandRequest(job=job_ref, kind=f"JOB_COMMAND_KIND_{name.upper()}"),
        )
        output.done(view, f"{view.get('id', job_ref)}  {view.get('phase', '')}  {why(view)}".rstrip())


_command("pause", "Leave after the current step, with a checkpoint; keep the job.")
_command("resume", "Let a paused job gather agents again.")
_command("stop", "Leave after the current step, with a checkpoint, and end as COMPLETED.")
_command("cancel", "End at once, without a checkpoint.")
_command("checkpoint", "Take a checkpoint after the current step.")


@job.command()
@click.argument("job_ref", metavar="JOB")
@click.option(
    "--to", "target", metavar="CHECKPOINT", required=True, help="A checkpoint of it: its step, or JOB@STEP."
)
@with_coordinator
def rollback(*, coordinator: Coordinator, output: Output, job_ref: str, target: str) -> None:
    """Go back to a checkpoint, whatever the members hold.

    The steps after it are rolled back and made anew.  Newer checkpoints are kept until training has come
    past them, and never restored.  Works while the job runs, recovers, waits or is paused.
    """
    from protos import admin_pb2

    match = _CHECKPOINT.fullmatch(target)
    if match is None or match[1] not in (None, job_ref):
        raise click.BadParameter(f"--to {target!r}: expected a step from 1 on, or {job_ref}@STEP.")
    step = int(match[2])
    request = admin_pb2.RollBackJobRequest(job=job_ref, step=step)
    view = coordinator.view(coordinator.stub.RollBackJob, request)
    output.done(view, f"{view.get('id', job_ref)}  {view.get('phase', '')}  goes on from step {step}")


@job.command()
@click.argument("job_ref", metavar="JOB")
@click.argument("nodes", metavar="MIN:MAX", type=node_range)
@with_coordinator
def scale(*, coordinator: Coordinator, output: Output, job_ref: str, nodes: tuple[int, int]) -> None:
    """Change how many agents the job needs and takes."""
    from protos import admin_pb2

    request = admin_pb2.ScaleJobRequest(job=job_ref, min_nodes=nodes[0], max_nodes=nodes[1])
    view = coordinator.view(coordinator.stub.ScaleJob, request)
    output.done(view, f"{view.get('id', job_ref)}  needs {nodes[0]}, takes up to {nodes[1]} agents")


@job.command()
@click.argument("job_ref", metavar="JOB")
@with_coordinator
def wait(*, coordinator: Coordinator, output: Output, job_ref: str) -> None:
    """Wait until the job has ended; exit 0 if COMPLETED, 5 otherwise."""
    _wait(coordinator, output, job_ref)


@job.command()
@click.argument("job_ref", metavar="JOB")
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes.")
@click.option("--tail", type=click.IntRange(min=1), default=None, help="Start with the last so many lines.")
@with_coordinator
def logs(*, coordinator: Coordinator, output: Output, job_ref: str, follow: bool, tail: int | None) -> None:
    """What the job's workers printed."""
    from protos import admin_pb2

    def request(after: int) -> admin_pb2.LogsRequest:
        # The tail is asked for once; a resumed stream goes on from the last line seen.
        return admin_pb2.LogsRequest(
            job=job_ref, after_sequence=after, follow=follow, tail=(tail or 0) if after == 0 else 0
        )

    for line in _streamed(coordinator, coordinator.stub.Logs, request, follow):
        output.line(
            {
                "sequence": line.sequence,
                "unix_ms": line.unix_ms,
                "agent_id": line.agent_id,
                "line": line.line,
            },
            f"{_clock(line.unix_ms)} {line.agent_id[:8]:<8} {line.line}",
        )


@job.command()
@click.argument("job_ref", metavar="[JOB]", default="")
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes.")
@click.option(
    "--after", type=click.IntRange(min=0), default=0, help="Only events after this sequence number."
)
@with_coordinator
def events(*, coordinator: Coordinator, output: Output, job_ref: str, follow: bool, after: int) -> None:
    """What the coordinator decided about the job (without JOB: about everything)."""
    from protos import admin_pb2

    def request(position: int) -> admin_pb2.WatchRequest:
        return admin_pb2.WatchRequest(job=job_ref, after_sequence=position, follow=follow)

    for event in _streamed(coordinator, coordinator.stub.Watch, request, follow, after):
        output.line(
            {
                "sequence": event.sequence,
                "unix_ms": event.unix_ms,
                "kind": event.kind,
                "text": event.text,
                "record": json.loads(event.json) if event.json else None,
            },
            f"{_clock(event.unix_ms)} {event.sequence:>6} {event.text or event.kind}",
        )


@job.command()
@click.argument("job_ref", metavar="JOB")
@click.option("-f", "--follow", is_flag=True, help="Go on until the job ends.")
@click.option("--after", type=click.IntRange(min=0), default=0, help="Only steps after this one.")
@with_coordinator
def steps(*, coordinator: Coordinator, output: Output, job_ref: str, follow: bool, after: int) -> None:
    """The committed steps: loss, learning rate, data digest.  With -o json one object a line."""
    if not output.json:
        click.echo(
            f"{'step':>8} {'loss':>9} {'lr':>10} {'grad norm':>9} {'tokens':>9} {'seconds':>8} generation"
        )
    for entry in step_entries(coordinator, job_ref, after=after, follow=follow):
        if entry["type"] == "evaluation":
            text = f"{entry['step']:>8} {entry['loss']:>9.4f} evaluation"
        else:
            text = (
                f"{entry['step']:>8} {entry['loss']:>9.4f} {entry['lr']:>10.3e} {entry['grad_norm']:>9.3f} "
                f"{entry['tokens']:>9,.0f} {entry['duration_s']:>8.3f} {entry['generation']}"
                + (" skipped" if entry["skipped"] else "")
            )
        output.line(entry, text)


# ----------------------------------------------------------------------------------- shared with others


def get_job(coordinator: Coordinator, job_ref: str) -> dict[str, Any]:
    """The job's view."""
    from protos import admin_pb2

    return coordinator.view(coordinator.stub.GetJob, admin_pb2.JobRef(job=job_ref))


def step_entries(
    coordinator: Coordinator, job_ref: str, *, after: int = 0, follow: bool = False
) -> Iterator[dict[str, Any]]:
    """Committed steps after `after` in order (`type` is "step"), and evaluations ("evaluation")."""
    from protos import admin_pb2

    def request(position: int) -> admin_pb2.StepsRequest:
        return admin_pb2.StepsRequest(job=job_ref, after_step=position, follow=follow)

    def position(reply: admin_pb2.StepsReply) -> int:
        return max((record.step for record in reply.steps), default=0)

    evaluated = after
    for reply in _streamed(coordinator, coordinator.stub.Steps, request, follow, after, position):
        for record in reply.steps:
            yield {
                "type": "step",
                "step": record.step,
                "loss": record.loss,
                "lr": record.lr,
                "grad_norm": record.grad_norm,
                "tokens": record.tokens,
                "slices": record.slices,
                "data_digest": str(record.data_digest),
                "skipped": record.skipped,
                "generation": record.generation,
                "duration_s": record.duration_s,
            }
        for evaluation in reply.evaluations:
            if evaluation.step > evaluated:
                evaluated = evaluation.step
                yield {"type": "evaluation", "step": evaluation.step, "loss": evaluation.loss}


def why(view: View) -> str:
    """Why the job is in its phase, and what it waits for, as one line."""
    waiting = view.get("waiting")
    text = waiting.get("text") or waiting.get("why", "") if isinstance(waiting, Mapping) else waiting or ""
    reasons = [str(view.get("detail") or view.get("why") or ""), str(text)]
    return one_line("; ".join(dict.fromkeys(reason for reason in reasons if reason)))


def members(view: View) -> str:
    """Who is in the job's generation, by name, in order of rank."""
    return _names((view.get("generation") or {}).get("members"))


def step_of_total(view: View) -> str:
    """`120/300`, as far as known."""
    committed, total = view.get("committed_step"), view.get("steps_total")
    return f"{committed or 0}/{total}" if total else str(committed or 0)


def wait_for_end(
    coordinator: Coordinator, job_ref: str, show: Callable[[View], None] = lambda _: None
) -> dict[str, Any]:
    """The view of the job once it has ended; a coordinator that is away is waited for up to ten minutes.

    `show` hears of every view on the way."""
    from coordinator.admin.connection import RECONNECT_WINDOW_S

    lost_at: float | None = None
    view = get_job(coordinator, job_ref)
    while view.get("phase") not in ENDED:
        show(view)
        time.sleep(POLL_S)
        try:
            view = get_job(coordinator, str(view.get("id", job_ref)))
            lost_at = None
        except Unreachable:
            if lost_at is None:
                lost_at = time.monotonic()
                click.echo(f"muster: lost the coordinator at {coordinator.address}; reconnecting", err=True)
            if time.monotonic() - lost_at > RECONNECT_WINDOW_S:
                raise
    return view


def _wait(coordinator: Coordinator, output: Output, job_ref: str) -> None:
    from rich.console import Console

    from coordinator.admin.waiting import shown

    with shown(Console(stderr=True)) as show:
        view = wait_for_end(coordinator, job_ref, show)
    sentence = f"{view.get('id', job_ref)}  {view['phase']} at step {step_of_total(view)}"
    output.done(view, sentence)
    if view["phase"] != "COMPLETED":
        reason = why(view) or str(view.get("last_failure") or "")
        raise JobNotCompleted(
            f"job {view.get('name', job_ref)} ended {view['phase']}: {reason or 'no reason given'}"
        )


def _streamed(
    coordinator: Coordinator,
    method: Any,
    request: Any,
    follow: bool,
    after: int = 0,
    position: Any = lambda message: message.sequence,
) -> Iterator[Any]:
    if follow:
        return coordinator.resumed(method, request, after, position)
    return coordinator.stream(method, request(after), timeout_s=300)


def _clock(unix_ms: int) -> str:
    return datetime.fromtimestamp(unix_ms / 1_000).astimezone().strftime("%H:%M:%S")


def _names(agents: object) -> str:
    if not isinstance(agents, list):
        return cell(agents)
    return ", ".join(
        str(agent.get("name") or agent.get("agent_id") or agent.get("id"))
        if isinstance(agent, Mapping)
        else str(agent)
        for agent in agents
    )


def _nodes(view: View) -> str:
    present = len((view.get("generation") or {}).get("members") or ())
    return f"{present} of {view.get('min_nodes', '?')}:{view.get('max_nodes', '?')}"
