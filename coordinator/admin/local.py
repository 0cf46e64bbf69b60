"""`muster local`: a whole fleet on this machine trains one job, loses an agent if asked to, and is judged."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coordinator.admin.errors import BadInput, OperationFailed, Unreachable, one_line
from coordinator.admin.options import duration, with_output
from coordinator.admin.output import Output, View, number

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from coordinator.admin.connection import Coordinator
    from coordinator.admin.fleet import Fleet
    from coordinator.admin.submission import Submission

POLL_S = 0.5
PLAIN_LINE_S = 3.0
FALL = 0.9
"""The mean loss of the last tenth of the steps must be below this part of the first tenth's."""
QUIET = frozenset(
    {
        "TokenCreated", "AgentAdmitted", "AgentSuspected", "AgentUnassigned", "StepsCommitted", "MemberFormed",
        "MemberReleased", "MemberStored", "MemberFinished", "ShardRecorded", "CheckpointRetired",
    }
)  # fmt: skip
"""Events that a progress view does not show."""
SAMPLE_PROMPT = "The "


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option(
    "--agents", type=click.IntRange(1, 64), default=3, show_default=True, help="How many agents to start."
)
@click.option("--kill-after", type=duration, help="SIGKILL one agent after so long of training.")
@click.option("--rejoin-after", type=duration, help="Start a fresh agent so long after the kill.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Write loss.png, sample.txt, steps.jsonl, summary.json here.",
)
@click.option("--keep", is_flag=True, help="Keep the fleet's temporary home.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="A.B=VALUE",
    help="Replace one value of the job file; repeatable.",
)
@click.option("--limit", type=duration, default="30m", show_default=True, help="Give up after so long.")
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="cuda: agents take the cards in turn and may share one.",
)
@with_output
def local(
    *,
    output: Output,
    config: Path,
    agents: int,
    kill_after: float | None,
    rejoin_after: float | None,
    out: Path | None,
    keep: bool,
    settings: tuple[str, ...],
    limit: float,
    device: str,
) -> None:
    """Start a coordinator and agents here, train the job file CONFIG, and judge the result.

    Exit status 0 means: the job completed, the loss fell, and every step was committed exactly once.
    """
    from coordinator.admin.submission import open_dataset, read_job_file

    if rejoin_after is not None and kill_after is None:
        raise click.UsageError("--rejoin-after needs --kill-after: nobody is missing otherwise.")
    submission = read_job_file(config, settings)
    _check(submission, agents)
    assert submission.training is not None
    open_dataset(submission.training.data)
    if out is not None and out.exists() and not out.is_dir():
        raise BadInput(f"--out {out}: is a file; name a directory")

    run = Run(
        submission=submission,
        agent_count=agents,
        kill_after_s=kill_after,
        rejoin_after_s=rejoin_after,
        limit_s=limit,
        device=device,
    )
    home = Path(tempfile.mkdtemp(prefix="muster-local-"))
    try:
        with _terminated_like_interrupted():
            summary = run.carry_out(home, output, out)
    finally:
        if keep:
            click.echo(f"muster: the fleet's home is kept in {home}", err=True)
        else:
            shutil.rmtree(home, ignore_errors=True)
    _report(output, summary, out)
    if summary["problems"]:
        raise OperationFailed("; ".join(summary["problems"]))


@dataclass(slots=True, kw_only=True)
class Run:
    """One run of a fleet: what was asked, and what has been seen so far."""

    submission: Submission
    agent_count: int
    kill_after_s: float | None
    rejoin_after_s: float | None
    limit_s: float
    device: str
    token: str = ""
    started: int = 0
    job: Mapping[str, Any] = field(default_factory=dict)
    entries: list[dict[str, Any]] = field(default_factory=list)
    sequence: int = 0
    notes: deque[str] = field(default_factory=lambda: deque(maxlen=8))
    training_since: float | None = None
    killed: str | None = None
    killed_at: float | None = None
    rejoined: str | None = None
    joined: bool = False  # whether it has been a member
    begin: float = field(default_factory=time.monotonic)

    def carry_out(self, home: Path, output: Output, out: Path | None) -> dict[str, Any]:
        """Start the fleet, train, collect the results and end the fleet; returns the summary."""
        from coordinator.admin.connection import Coordinator
        from coordinator.admin.fleet import Fleet
        from coordinator.admin.submission import submit_job

        with Fleet(home=home, environment=_environment(self.agent_count, self.device)) as fleet:
            try:
                fleet.start_coordinator()
                with Coordinator.open(fleet.identity_path, fleet.addresses["main"]) as coordinator:
                    self.token = self._create_token(coordinator)
                    for _ in range(self.agent_count):
                        self._start_agent(fleet)
                    job_id = submit_job(coordinator, self.submission)
                    with _progress(output) as show:
                        self._watch(fleet, coordinator, job_id, show)
                    summary = self._judge(coordinator, job_id)
                    if out is not None:
                        self._write_results(coordinator, job_id, out, summary)
            finally:
                if out is not None:
                    fleet.keep_logs(out / "logs")
        return summary

    # ------------------------------------------------------------------------------- while it runs

    def _watch(self, fleet: Fleet, coordinator: Coordinator, job_id: str, show: Progress) -> None:
        """Poll until the job has ended, killing and starting agents when their time comes."""
        from coordinator.admin.job import ENDED, get_job, members

        while True:
            try:
                self.job = get_job(coordinator, job_id)
                fresh = self._new_events(coordinator)
            except Unreachable as error:
                if fleet.coordinator is None or fleet.coordinator.poll() is None:
                    raise
                raise OperationFailed(f"the coordinator ended: {fleet.last_words('coordinator')}") from error
            now = time.monotonic()
            if (
                self.training_since is None
                and self.job.get("phase") == "RUNNING"
                and self.job.get("committed_step")
            ):
                self.training_since = now
            self.joined = self.joined or self.rejoined in members(self.job).split(", ")
            fresh += self._disturb(fleet, now) + _gone(fleet)
            self.notes.extend(fresh)
            show.update(self, fresh)
            if self.job.get("phase") in ENDED:
                return
            if not fleet.agents:
                raise OperationFailed(
                    f"every agent ended; the last said: {fleet.last_words(f'a{self.started}')}"
                )
            if now - self.begin > self.limit_s:
                raise OperationFailed(
                    f"the job is {self.job.get('phase')} at step {self.job.get('committed_step')} after "
                    f"{self.limit_s:g} s (--limit)"
                )
            time.sleep(POLL_S)

    def _disturb(self, fleet: Fleet, now: float) -> list[str]:
        if self.training_since is None:
            return []
        due = self.kill_after_s is not None and now - self.training_since >= self.kill_after_s
        if due and self.killed is None and fleet.agents:
            self.killed, self.killed_at = self._victim(fleet), now
            fleet.kill_agent(self.killed)
            return [f"killed agent {self.killed} with SIGKILL at step {self.job.get('committed_step')}"]
        waited = self.killed_at is not None and now - self.killed_at >= (self.rejoin_after_s or 0.0)
        if waited and self.rejoin_after_s is not None and self.rejoined is None:
            self.rejoined = self._start_agent(fleet)
            return [f"started agent {self.rejoined}"]
        return []

    def _victim(self, fleet: Fleet) -> str:
        """The last member by rank, or any agent if none of the members is one of ours."""
        from coordinator.admin.job import members

        names = [name for name in members(self.job).split(", ") if name in fleet.agents]
        return names[-1] if names else next(reversed(fleet.agents))

    def _start_agent(self, fleet: Fleet) -> str:
        self.started += 1
        name = f"a{self.started}"
        if self.device == "cuda":
            card = (self.started - 1) % _card_count()
            # Ranks that share a card must look like machines of their own, or NCCL refuses them.
            fleet.start_agent(name, self.token, "--gpus", str(card), "--interface", "lo", NCCL_HOSTID=name)
        else:
            fleet.start_agent(name, self.token, "--gpus", "none")
        return name

    def _create_token(self, coordinator: Coordinator) -> str:
        from protos import admin_pb2

        request = admin_pb2.CreateTokenRequest(ttl_s=86_400, uses=self.agent_count + 1, note="muster local")
        token: str = coordinator.call(coordinator.stub.CreateToken, request).token
        return token

    def _new_events(self, coordinator: Coordinator) -> list[str]:
        """What the coordinator decided since the last look, with names in place of ids."""
        from protos import admin_pb2

        fresh = []
        request = admin_pb2.WatchRequest(after_sequence=self.sequence)
        for event in coordinator.stream(coordinator.stub.Watch, request):
            self.sequence = event.sequence
            if event.kind not in QUIET:
                fresh.append(event.text or event.kind)
        if not fresh:
            return []
        agents = coordinator.views(coordinator.stub.ListAgents, admin_pb2.ListRequest(all=True))
        names = {str(view["id"]): str(view["name"]) for view in (*agents, self.job)}
        return [_named(text, names) for text in fresh]

    # ------------------------------------------------------------------------------- afterwards

    def _judge(self, coordinator: Coordinator, job_id: str) -> dict[str, Any]:
        from coordinator.admin.job import step_entries, why

        assert self.submission.training is not None
        self.entries = list(step_entries(coordinator, job_id))
        steps = [entry for entry in self.entries if entry["type"] == "step"]
        problems = judge(steps, self.submission.training.train.steps)
        if self.job.get("phase") != "COMPLETED":
            problems.insert(0, f"the job ended {self.job.get('phase')}: {why(self.job)}")
        if self.kill_after_s is not None and self.killed is None:
            click.echo("muster: the job ended before anyone was to be killed; give it more steps", err=True)
        elif self.rejoin_after_s is not None and not self.joined:
            click.echo(
                "muster: the job ended before the fresh agent was a member; give it more steps", err=True
            )
        first, last = first_and_last_loss(steps)
        return {
            "job_id": job_id,
            "name": self.submission.name,
            "phase": self.job.get("phase"),
            "steps": len(steps),
            "first_loss": first,
            "last_loss": last,
            "generations": (self.job.get("generation") or {}).get("number"),
            "killed": self.killed,
            "rejoined": self.rejoined if self.joined else None,
            "seconds": round(time.monotonic() - self.begin, 1),
            "problems": problems,
        }

    def _write_results(
        self, coordinator: Coordinator, job_id: str, out: Path, summary: dict[str, Any]
    ) -> None:
        """Steps, curve, sample and summary.  What cannot be made becomes a problem of the summary."""
        from coordinator.admin.checkpoint import CheckpointName, downloaded
        from coordinator.admin.generate import sample
        from coordinator.admin.submission import run_trainer

        out.mkdir(parents=True, exist_ok=True)
        steps = out / "steps.jsonl"
        steps.write_text("".join(json.dumps(step) + "\n" for step in self.entries), encoding="utf-8")
        try:
            run_trainer("plot", ["--steps", str(steps), "--out", str(out / "loss.png")], 120)
            with downloaded(coordinator, CheckpointName(job=job_id, step=0)) as checkpoint:
                text = sample(checkpoint, SAMPLE_PROMPT, ["--max-tokens", "200"])
            (out / "sample.txt").write_text(text + "\n", encoding="utf-8")
            summary["sample"] = text
        except OperationFailed as error:
            summary["problems"].append(one_line(error.message))
        (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def judge(steps: Sequence[Mapping[str, Any]], total: int) -> list[str]:
    """What is wrong with a finished run's step log: empty if every step from 1 to `total` is there exactly
    once, in order, and the loss fell."""
    problems = []
    numbers = [step["step"] for step in steps]
    if numbers != list(range(1, total + 1)):
        missing = sorted(set(range(1, total + 1)) - set(numbers))
        twice = sorted({step for step in numbers if numbers.count(step) > 1})
        problems.append(
            f"the step log is not 1 to {total}, each once: {len(numbers)} entries, "
            f"missing {missing[:5] or 'none'}, repeated {twice[:5] or 'none'}"
        )
    first, last = first_and_last_loss(steps)
    if first is None or last is None:
        problems.append("no step was committed")
    elif not last < FALL * first:
        problems.append(f"the loss did not fall: {first:.4f} over the first tenth, {last:.4f} over the last")
    return problems


def first_and_last_loss(steps: Sequence[Mapping[str, Any]]) -> tuple[float | None, float | None]:
    """Mean loss of the first and of the last tenth of the steps."""
    if not steps:
        return None, None
    tenth = max(1, len(steps) // 10)
    losses = [float(step["loss"]) for step in steps]
    return sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth


# ----------------------------------------------------------------------------------- showing


class Progress:
    """Plain lines: every event, and the state of things every few seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown_at = 0.0

    def update(self, run: Run, fresh: Sequence[str]) -> None:
        for note in fresh:
            self._print(f"         {note}")
        now = time.monotonic()
        if now - self._shown_at >= PLAIN_LINE_S:
            self._shown_at = now
            facts = [f"{title} {text}" for title, text in _facts(run) if text]
            self._print(f"{now - run.begin:6.1f} s {', '.join(facts)}")

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class LiveProgress(Progress):
    """A view that is redrawn in place on a terminal."""

    def __init__(self, console: Console) -> None:
        from rich.live import Live

        super().__init__(console)
        self.live = Live(console=console, auto_refresh=False, transient=False)

    def update(self, run: Run, fresh: Sequence[str]) -> None:
        self.live.update(_drawn(run), refresh=True)


@contextlib.contextmanager
def _progress(output: Output) -> Iterator[Progress]:
    from rich.console import Console

    console = Console(stderr=output.json)
    if not console.is_terminal:
        yield Progress(console)
        return
    progress = LiveProgress(console)
    with progress.live:
        yield progress


def _named(text: str, names: Mapping[str, str]) -> str:
    """`text` with known ids replaced by names."""
    for id_, name in names.items():
        text = text.replace(f"{id_} ({name})", name).replace(id_, name)
    return text


def _facts(run: Run) -> list[tuple[str, str]]:
    from coordinator.admin.job import members, step_of_total, why

    view = run.job
    generation = view.get("generation") or {}
    return [
        ("phase", str(view.get("phase", ""))),
        ("generation", str(generation.get("number") or "")),
        ("members", members(view).replace(", ", " ")),
        ("step", step_of_total({"steps_total": _steps_total(run), **view})),
        ("loss", number(view.get("loss"), ".4f")),
        ("tokens/s", number(view.get("tokens_per_s"), ",.0f")),
        ("why", why(view) if view.get("phase") != "RUNNING" else ""),
    ]


def _steps_total(run: Run) -> int:
    assert run.submission.training is not None
    return run.submission.training.train.steps


def _drawn(run: Run) -> RenderableType:
    from rich.console import Group
    from rich.panel import Panel
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for title, text in _facts(run):
        table.add_row(Text(title, style="dim"), Text(text))
    bar = ProgressBar(total=_steps_total(run), completed=run.job.get("committed_step") or 0)
    notes = [Text(note, style="dim", overflow="ellipsis", no_wrap=True) for note in run.notes]
    elapsed = f"{time.monotonic() - run.begin:.0f} s"
    return Panel(Group(table, bar, *notes), title=f"muster local: {run.submission.name}", subtitle=elapsed)


def _report(output: Output, summary: View, out: Path | None) -> None:
    first, last = number(summary["first_loss"], ".4f"), number(summary["last_loss"], ".4f")
    sentence = (
        f"{summary['phase']} after {summary['seconds']} s: {summary['steps']} steps, loss {first} -> {last}, "
        f"{summary['generations']} generations"
    )
    if summary["killed"]:
        sentence += f", {summary['killed']} killed"
    if summary["rejoined"]:
        sentence += f", {summary['rejoined']} joined"
    if summary.get("sample"):
        sentence += f"\n\n{summary['sample']}\n"
    if out is not None:
        sentence += f"\nresults in {out}"
    output.done(summary, sentence)


# ----------------------------------------------------------------------------------- surroundings


def _check(submission: Submission, agents: int) -> None:
    """Refuse what could never train here."""
    if submission.training is None:
        raise BadInput(f"{submission.file}: launch is torchrun, but `muster local` runs Muster's own trainer")
    elastic = submission.spec.get("elastic") or {}
    needed = elastic.get("min_nodes", 1)
    if needed > agents:
        raise BadInput(
            f"{submission.file}: elastic.min_nodes is {needed}, but --agents is {agents}; change one of them"
        )


def _environment(agents: int, device: str) -> dict[str, str]:
    """The fleet's environment: no threads beyond the cores, no card unless asked for, nothing of the operator's Muster."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MUSTER_")}
    environment |= {"OMP_NUM_THREADS": str(max(1, cores // agents)), "PYTHONUNBUFFERED": "1"}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment


def _card_count() -> int:
    import pynvml

    try:
        pynvml.nvmlInit()
        count = int(pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError as error:
        raise BadInput(f"--device cuda: no NVIDIA driver answers ({error}); use --device cpu") from error
    if count == 0:
        raise BadInput("--device cuda: the driver has no card; use --device cpu")
    return count


def _gone(fleet: Fleet) -> list[str]:
    """Agents that ended by themselves; they are forgotten."""
    gone = [name for name, agent in fleet.agents.items() if agent.process.poll() is not None]
    return [
        f"agent {name} ended with status {fleet.agents.pop(name).process.returncode}: {fleet.last_words(name)}"
        for name in gone
    ]


@contextlib.contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Let SIGTERM unwind the stack as Ctrl-C does, so that the fleet is ended."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
