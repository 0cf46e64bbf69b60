"""Runs transcripts: text files of commands and expectations (see scenarios/*.txt).

One line is one command.  Agents, and jobs, have one-word names that are also their ids.

    lease 2000                              the timing budget; first line, or 2000
    at 500                                  let time pass: deadlines come true, agents heartbeat
    job tiny min 2 max 3 last_call 500      submit (also: min_generation, step_timeout, failures, keep,
                                            every, best, priority, launch, backend)
    agent a,b joins workers 2 weighs yes    enrol if new, then open a session as a new process
    agent a reconnects held tiny 3          open a session as the same process
    agent a closes | beats | freezes | thaws | goodbye | leaving
    agent a fetches 1000                    a heartbeat that says how many bytes have come
    agent a stored                          a heartbeat that says that nothing is left to upload or report
    agent a accuses b                       of having served it wrong bytes
    agent a uploads wrong                   other bytes than it promised
    agent a ready holds 7 abcd of 1         Ready, perhaps with state of a step (and digest), and for which
                                            of its assignments
    agent a formed | released | finished | steps 1 5 | fails killed | shard 5 0/2
    agent a shard 5 0/2 at 900              it uploads so many bytes a second
    agent a vouches 5 2 [digest]            for the state of a checkpoint of 2 shards, of which it has none
                                            all take `in G` for another generation
    agent a fails collective misses b,c     it could not reach them
    operator pause | resume | stop | cancel | checkpoint | scale 1 2 [tiny]
    agent a evaluates 20 1.5                the loss on the held-out slices after a step
    operator pin 20 | unpin 20 | delete 20  a checkpoint of the job
    operator rollback 20                    to the checkpoint of that step
    operator drain a | quarantine a for 500 | release a | ban a
    coordinator restarts                    from what is durable
    expect ...                              about what came of the last command, or the state now
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from pathlib import Path

from coordinator.core import checkpoints
from coordinator.core.codec import decode_state, encode_state
from coordinator.core.forming import why
from coordinator.core.model import (
    AgentAction,
    AgentCommanded,
    AgentFacts,
    AgentId,
    CheckpointAction,
    CheckpointCommanded,
    CoordinatorStarted,
    DamageFound,
    EnrollAsked,
    Evaluation,
    EvaluationsReceived,
    Event,
    FailureKind,
    FinishedReceived,
    FormedReceived,
    Generation,
    GenerationPlanned,
    GoodbyeReceived,
    HeartbeatReceived,
    Job,
    JobAction,
    JobCommanded,
    JobId,
    JobScaled,
    JobSpec,
    JobSubmitted,
    LeaveAsked,
    NotYet,
    ProgressReceived,
    Push,
    Readiness,
    ReadyReceived,
    Record,
    Refused,
    ReleasedReceived,
    Reply,
    Requirements,
    RollbackAsked,
    SessionClosed,
    SessionId,
    SessionOpened,
    ShardAccepted,
    ShardReported,
    State,
    Tick,
    Timing,
    TokenAsked,
    TokenId,
    WorkerFailedReceived,
    WrongBytesReported,
    WrongBytesSent,
)
from coordinator.core.settle import next_deadline
from coordinator.core.step import step
from tests.core.invariants import Journal, check_nothing_held_was_given_up, check_state

TOKEN = TokenId("token")
Words = list[str]


class Scenario:
    """A coordinator's core under a script."""

    def __init__(self, lease_ms: int = 2_000) -> None:
        self.state = State(timing=Timing.from_lease(lease_ms))
        self.now_ms = 0
        self.journal = Journal(self.state)
        self.frozen: set[AgentId] = set()
        self.beaten_ms: dict[AgentId, int] = {}
        self.count = 0
        self.records: list[Record] = []
        self.pushes: list[Push] = []
        self.reply: Reply | None = None
        self.happen(TokenAsked(token_id=TOKEN, secret_sha256="s", note="", expires_ms=10**12, uses=10**6))

    # ---- running

    def run(self, path: Path) -> None:
        """Run the transcript at `path`; an AssertionError names the line."""
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                self.say(line.split("#")[0])
            except (AssertionError, ValueError, KeyError) as error:
                raise AssertionError(
                    f"{path.name}:{number}: {line.strip()}: {error}\n{self.told()}"
                ) from error
        self.journal.check_replay(self.state)

    def told(self) -> str:
        return "\n".join(f"  {item}" for item in (*self.records, *self.pushes, self.reply))

    def say(self, line: str) -> None:
        """Run one line."""
        words = line.split()
        if not words:
            return
        verb, rest = words[0], words[1:]
        if verb == "expect":
            self.expect(rest)
            return
        self.records, self.pushes, self.reply = [], [], None
        match verb:
            case "lease":
                self.__init__(int(rest[0]))  # type: ignore[misc]
            case "at":
                self.pass_time(int(rest[0]))
            case "job":
                self.submit(rest)
            case "agent":
                for name in rest[0].split(","):
                    self.agent(AgentId(name), rest[1], rest[2:])
            case "operator":
                self.operator(rest)
            case "coordinator":
                assert rest == ["restarts"], "only restarts is known"
                self.restart()
            case _:
                raise ValueError(f"unknown command {verb}")

    def happen(self, event: Event) -> None:
        held = {job.job_id: job.generation.holders for job in self.state.jobs.values() if job.generation}
        outcome = step(self.state, self.now_ms, event)
        self.records += outcome.records
        self.pushes += outcome.pushes
        self.reply = outcome.reply
        self.journal.check(outcome)
        check_nothing_held_was_given_up(self.state, held, outcome)
        check_state(self.state, self.now_ms)

    def pass_time(self, until_ms: int) -> None:
        assert until_ms >= self.now_ms, f"it is {self.now_ms} already"
        while True:
            deadline = next_deadline(self.state)
            beats = [
                (self.beaten_ms[a.agent_id] + self.state.timing.heartbeat_ms, a.agent_id)
                for a in self.state.agents.values()
                if a.session_id is not None and a.agent_id not in self.frozen
            ]
            beat = min(beats, default=(until_ms + 1, AgentId("")))
            if min(beat[0], until_ms + 1 if deadline is None else deadline) > until_ms:
                break
            if deadline is not None and deadline < beat[0]:
                self.now_ms = deadline
                self.happen(Tick())
            else:
                self.now_ms = beat[0]
                self.beat(beat[1])
        self.now_ms = until_ms

    def beat(self, name: AgentId, fetched_bytes: int = 0, *, all_stored: bool = False) -> None:
        agent = self.state.agents[name]
        assert agent.session_id is not None
        self.beaten_ms[name] = self.now_ms
        self.happen(
            HeartbeatReceived(
                agent_id=name,
                session_id=agent.session_id,
                step=agent.step,
                activity="",
                tokens_per_s=0.0,
                disk_free_bytes=0,
                fetched_bytes=fetched_bytes,
                all_stored=all_stored,
            )
        )

    def restart(self) -> None:
        self.state = decode_state(encode_state(self.state))
        self.frozen.clear()
        self.happen(CoordinatorStarted(spread_ms=0))

    # ---- commands

    def submit(self, words: Words) -> None:
        name, settings = words[0], dict(zip(words[1::2], words[2::2], strict=True))
        number = {key: int(value) for key, value in settings.items() if value.isdigit()}
        spec = JobSpec(
            name=name,
            spec_json="{}",
            dataset_json="",
            launch=settings.get("launch", "muster"),
            min_nodes=number.get("min", 1),
            max_nodes=number.get("max", 3),
            priority=number.get("priority", 0),
            requires=Requirements(backend=settings.get("backend")),
            max_failures=number.get("failures", 3),
            last_call_ms=number.get("last_call", 1_000),
            min_generation_ms=number.get("min_generation", 0),
            step_timeout_ms=number.get("step_timeout", 10_000),
            keep_checkpoints=number.get("keep", 2),
            keep_every=number.get("every", 0),
            keep_best=number.get("best", 0),
        )
        self.happen(JobSubmitted(job_id=JobId(name), spec=spec))

    def agent(self, name: AgentId, verb: str, rest: Words) -> None:
        match verb:
            case "joins":
                if name not in self.state.agents:
                    self.happen(
                        EnrollAsked(
                            token_id=TOKEN,
                            secret_sha256="s",
                            agent_id=name,
                            name=str(name),
                            certificate_serial="1",
                        )
                    )
                self.count += 1
                self.open(name, f"process-{self.count}", rest)
            case "reconnects":
                self.open(name, self.state.agents[name].incarnation, rest)
            case "closes":
                session_id = self.state.agents[name].session_id
                assert session_id is not None, f"{name} has no session"
                self.happen(SessionClosed(agent_id=name, session_id=session_id))
            case "beats":
                self.beat(name)
            case "fetches":
                self.beat(name, int(rest[0]))
            case "stored":
                self.beat(name, all_stored=True)
            case "freezes":
                self.frozen.add(name)
            case "thaws":
                self.frozen.discard(name)
                self.beat(name)
            case "goodbye":
                self.happen(GoodbyeReceived(agent_id=name, reason="done"))
            case "accuses":
                self.happen(WrongBytesReported(agent_id=name, peer_id=AgentId(rest[0]), digest="00"))
            case "uploads":
                self.happen(WrongBytesSent(agent_id=name, digest="00"))
            case "leaving":
                self.happen(LeaveAsked(agent_id=name, reason="shutting down"))
            case _:
                self.happen(self.about_job(name, verb, rest))

    def open(self, name: AgentId, incarnation: str, rest: Words) -> None:
        options = dict(zip(rest[::2], rest[1::2], strict=False))
        self.count += 1
        self.frozen.discard(name)
        self.beaten_ms[name] = self.now_ms
        held = rest[rest.index("held") + 1 :] if "held" in rest else ["", "0"]
        self.happen(
            SessionOpened(
                agent_id=name,
                session_id=SessionId(f"session-{self.count}"),
                incarnation=incarnation,
                facts=AgentFacts(
                    hostname=str(name),
                    worker_count=int(options.get("workers", 1)),
                    weighs_uploads=options.get("weighs") == "yes",
                    backends=(options.get("backend", "gloo"),),
                ),
                held_job=JobId(held[0]) if held[0] else None,
                held_generation=int(held[1]),
                torchrun_job=options.get("torchrun", ""),
            )
        )

    def about_job(self, name: AgentId, verb: str, rest: Words) -> Event:
        job = self.job_of(name)
        generation = job.generation_count
        if "in" in rest:
            place = rest.index("in")
            generation = int(rest[place + 1])
            rest = rest[:place] + rest[place + 2 :]
        rate = 0
        if "at" in rest:
            rate, rest = int(rest[-1]), rest[:-2]
        same = {"agent_id": name, "job_id": job.job_id, "generation": generation}
        match verb:
            case "ready":
                self.count += 1
                assignment = 0
                if "of" in rest:
                    assignment, rest = int(rest[-1]), rest[:-2]
                holds = "holds" in rest
                readiness = Readiness(
                    job_id=job.job_id,
                    store_host=str(name),
                    store_port=self.count,
                    holds_state=holds,
                    step=int(rest[1]) if holds else 0,
                    state_digest=rest[2] if len(rest) > 2 else "",
                    assignment=assignment,
                    generation=generation,
                )
                return ReadyReceived(agent_id=name, readiness=readiness)
            case "formed":
                at = int(rest[0]) if rest else job.committed_step
                digest = rest[1] if len(rest) > 1 else f"d{at}"
                return FormedReceived(**same, step=at, state_digest=digest)
            case "steps":
                first, last = int(rest[0]), int(rest[1])
                return ProgressReceived(
                    **same, first_step=first, last_step=last, tokens=10.0 * (last - first + 1)
                )
            case "evaluates":
                found = Evaluation(step=int(rest[0]), loss=float(rest[1]))
                return EvaluationsReceived(**same, evaluations=(found,))
            case "fails":
                missed = rest[rest.index("misses") + 1].split(",") if "misses" in rest else []
                at = int(rest[1]) if len(rest) > 1 and not missed else 0
                return WorkerFailedReceived(
                    **same,
                    kind=FailureKind(rest[0]),
                    detail=f"{rest[0]} at {name}",
                    step=at,
                    unreachable=tuple(AgentId(other) for other in missed),
                )
            case "finished":
                return FinishedReceived(**same, step=int(rest[0]) if rest else job.committed_step)
            case "released":
                return ReleasedReceived(**same)
            case "shard":
                index, count = rest[1].split("/")
                return ShardReported(
                    **same,
                    step=int(rest[0]),
                    index=int(index),
                    count=int(count),
                    digest=f"{rest[0]}-{index}",
                    bytes=100,
                    state_digest=rest[2] if len(rest) > 2 else f"d{rest[0]}",
                    header_json="{}",
                    upload_bytes_per_s=rate,
                )
            case "vouches":
                return ShardReported(
                    **same,
                    step=int(rest[0]),
                    index=0,
                    count=int(rest[1]),
                    digest="",
                    bytes=0,
                    state_digest=rest[2] if len(rest) > 2 else f"d{rest[0]}",
                    header_json="{}",
                    upload_bytes_per_s=rate,
                )
            case _:
                raise ValueError(f"unknown verb {verb}")

    def job_of(self, name: AgentId) -> Job:
        serves = self.state.agents[name].job_id
        return self.state.jobs[serves] if serves is not None else self.job()

    def job(self, name: str | None = None) -> Job:
        return self.state.jobs[JobId(name)] if name else next(reversed(self.state.jobs.values()))

    def operator(self, words: Words) -> None:
        verb, rest = words[0], words[1:]
        if verb == "scale":
            job = self.job(rest[2] if len(rest) > 2 else None)
            self.happen(JobScaled(job_id=job.job_id, min_nodes=int(rest[0]), max_nodes=int(rest[1])))
        elif verb in {action.value for action in CheckpointAction}:
            command = CheckpointCommanded(
                job_id=self.job().job_id, step=int(rest[0]), action=CheckpointAction(verb), by="olga"
            )
            self.happen(command)
        elif verb == "rollback":
            self.happen(RollbackAsked(job_id=self.job().job_id, step=int(rest[0]), by="olga"))
        elif verb == "finds":  # finds 20 damaged [other]
            step, job = int(rest[0]), self.job()
            found = next((c for c in job.checkpoints if c.step == step), None)
            digest = "other" if "other" in rest or found is None else found.manifest_digest
            self.happen(
                DamageFound(job_id=job.job_id, step=step, manifest_digest=digest, detail="shard 0: missing")
            )
        elif verb in {action.value for action in JobAction}:
            job = self.job(rest[0] if rest else None)
            self.happen(JobCommanded(job_id=job.job_id, action=JobAction(verb)))
        else:
            until_ms = self.now_ms + int(rest[2]) if len(rest) > 2 else None
            self.happen(
                AgentCommanded(
                    agent_id=AgentId(rest[0]), action=AgentAction(verb), reason="why not", until_ms=until_ms
                )
            )

    # ---- expectations

    def expect(self, words: Words) -> None:
        if words[0] == "no":
            held = True
            try:
                self.expect(words[1:])
            except AssertionError:
                held = False
            assert not held, "but it is so"
            return
        checks: dict[str, Callable[[Words], None]] = {
            "plan": self.expect_plan,
            "record": self.expect_record,
            "push": self.expect_push,
            "phase": self.expect_phase,
            "waiting": self.expect_waiting,
            "agent": self.expect_agent,
            "refused": lambda rest: _same(
                rest[0], self.reply.refusal.name if isinstance(self.reply, Refused) else self.reply
            ),
            "accepted": lambda _: _same(False, isinstance(self.reply, Refused)),
            "stored": lambda _: _same(ShardAccepted(committed=True), self.reply),
            "step": lambda rest: _same(int(rest[0]), self.job().committed_step),
            "checkpoints": lambda rest: _same(
                rest, [str(c.step) for c in self.job().checkpoints if not c.damaged]
            ),
            "kept": self.expect_kept,
            "vouched": self.expect_vouched,
            "pending": self.expect_pending,
            "failures": lambda rest: _same(int(rest[0]), self.job().failures),
            "deadline": lambda rest: _same(rest[0], str(next_deadline(self.state))),
        }
        checks[words[0]](words[1:])

    def expect_plan(self, words: Words) -> None:
        """`plan 2 [a b] abort memory@7 member_lost`: what is left out is not compared."""
        planned = [r.generation for r in self.records if isinstance(r, GenerationPlanned)]
        assert planned, "no generation was planned"
        generation = planned[-1]
        text = " ".join(words)
        if "[" in text:
            inside = text[text.index("[") + 1 : text.index("]")].split()
            _same(inside, [m.agent_id for m in generation.members])
            words = (text[: text.index("[")] + text[text.index("]") + 1 :]).split()
        for word in words:
            assert word in _facets(generation), f"{word} is not among {_facets(generation)}"

    def expect_record(self, words: Words) -> None:
        """`record AgentLost agent_id=a`: some record of this kind with these fields."""
        found = [r for r in self.records if type(r).__name__ == words[0]]
        assert any(all(_shows(record, word) for word in words[1:]) for record in found), f"found {found}"

    def expect_push(self, words: Words) -> None:
        """`push a plan 2`, `push a plan 2 holding=a,b`, `push a assignment`, ...: what is left out is not
        compared."""
        to_agent = [p for p in self.pushes if p.agent_id == words[0]]
        found = [_push_words(push) for push in to_agent]
        assert words[1:] in [f[: len(words) - 1] for f in found], f"{words[0]} was told {found}"

    def expect_phase(self, words: Words) -> None:
        job = self.job()
        _same(words, [job.phase.value, job.phase_why.value][: len(words)])

    def expect_waiting(self, words: Words) -> None:
        """`waiting below_min 1/2`, `waiting last_call until 500`"""
        waits = why(self.state, self.job().job_id)
        shown = [waits.why.value]
        if len(words) > 1 and "/" in words[1]:
            shown.append(f"{waits.have}/{waits.need}")
        if "until" in words:
            shown += ["until", str(waits.until_ms)]
        _same(words, shown)

    def expect_kept(self, words: Words) -> None:
        """`kept 20 last,best`: why a checkpoint is."""
        reasons = checkpoints.kept(self.job())[int(words[0])]
        _same(words[1:], [",".join(why.value for why in reasons)])

    def expect_vouched(self, words: Words) -> None:
        """`vouched 20 a,b` or `vouched 20 a only_member`: on whose word it was committed."""
        found = next(c for c in self.job().checkpoints if c.step == int(words[0]))
        who = ",".join(checkpoints.agreeing(found))
        _same(words[1:], [who, *([found.alone.value] if found.alone else [])])

    def expect_pending(self, words: Words) -> None:
        """`pending 20 one_witness 1/2 until 5000`: what keeps a checkpoint from being committed."""
        found = next(p for p in self.job().pending if p.step == int(words[0]))
        waits = checkpoints.vouched(self.state, self.job(), found, self.now_ms)
        assert isinstance(waits, NotYet), f"nothing: {waits}"
        shown = [waits.why.value, f"{waits.have}/{waits.need}"]
        _same(words[1:], [*shown, "until", str(waits.until_ms)] if waits.until_ms else shown)

    def expect_agent(self, words: Words) -> None:
        """`agent a lost`, `agent a quarantined`, `agent a strikes=2 job_id=tiny`"""
        agent = self.state.agents[AgentId(words[0])]
        for word in words[1:]:
            assert word in (agent.presence.value, agent.standing.value) or (
                "=" in word and _shows(agent, word)
            ), f"{word}: found {agent}"


def _same(expected: object, found: object) -> None:
    assert expected == found, f"expected {expected}, found {found}"


def _text(value: object) -> str:
    if isinstance(value, enum.Enum):
        return str(value.value)
    if isinstance(value, tuple):
        return ",".join(_text(item) for item in value)
    return str(value)


def _shows(thing: object, word: str) -> bool:
    name, _, value = word.partition("=")
    return _text(getattr(thing, name)) == value


def _facets(generation: Generation) -> list[str]:
    if generation.from_checkpoint_step is not None:
        source = f"checkpoint@{generation.from_checkpoint_step}"
    elif generation.fresh:
        source = "fresh"
    else:
        source = f"memory@{generation.committed_step}"
    facets = [str(generation.number), generation.cut.value, source, generation.why.value]
    if generation.checkpoint_before_cut:
        facets.append("checkpoint_before_cut")
    facets.append(f"leaving={_text(generation.leaving)}")
    facets.append(f"holders={_text(generation.holders)}")
    facets.append(f"weights={','.join(str(m.upload_weight) for m in generation.members)}")
    facets.append(f"ranks={','.join(str(m.first_rank) for m in generation.members)}")
    return facets


def _push_words(push: Push) -> Words:
    kind = type(push).__name__.removeprefix("Push").lower()
    generation = getattr(push, "generation", None)
    job_id = getattr(push, "job_id", None)
    if isinstance(generation, Generation):
        holding = ",".join(m.agent_id for m in generation.members if m.holds_state)
        return [kind, str(generation.number), f"holding={holding}"]
    return [kind, str(job_id)] if job_id else [kind]
