"""Carries blows out on a fleet of real processes, and is their supervisor: what ends is started again."""

from __future__ import annotations

import heapq
import itertools
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence

from bench.processes import send
from bench.trace import StepTrace
from tests.chaos.blows import Blow, Kind, Whom
from tests.e2e.fleet import AgentProcess, Fleet

DRAIN_LIMIT_S = 90.0
"""Until an agent that was told to drain has left: its step, a coordinator that is away, a last upload."""
CLOSE_LIMIT_S = 30.0
UNREACHABLE = 3
"""What an agent that cannot enrol ends with: a stranger that comes while the coordinator is away."""
LOOK_S = 0.1


class Fallen(Exception):
    """A process ended that nobody had struck, or did not end as it should."""


class Storm:
    """The supervisor of one coordinator and of agents that are on the fleet already."""

    def __init__(
        self, fleet: Fleet, trace: StepTrace, token: str, tell: Callable[[str], None] = print
    ) -> None:
        self.struck: Counter[str] = Counter()
        self.spared = 0
        """Blows that found nobody to strike."""
        self.excused = 0
        """Blows that left no member alive and well that held the state: a checkpoint may have to serve."""
        self._fleet = fleet
        self._trace = trace
        self._token = token
        self._tell = tell
        self._names = list(fleet.agents)
        self._addresses = dict(fleet.addresses)
        self._frozen: dict[str, list[int]] = {}  # agents, and which of their processes are stopped
        self._leaving: dict[str, float] = {}  # agents told to drain, and until when they have time
        self._absent: dict[str, None] = {}  # agents that are down until they are started again
        self._starting: set[str] = set()  # agents told to drain that did not listen yet
        self._launches = Counter(self._names)
        self._dead: set[int] = set()  # workers that were killed and may still be listed
        self._coordinator = "up"
        self._strangers = itertools.count()
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def rage(self, blows: Sequence[Blow], seconds: float) -> None:
        """Carry the blows out.  Raises Fallen."""
        since_s = time.monotonic()
        for blow in blows:
            self._at(since_s + blow.at_s, lambda blow=blow: self._strike(blow))
        self._until(since_s + seconds)

    def heal(self) -> None:
        """Wake whoever is stopped, and start whoever is down, at once; wait for those who are leaving."""
        self._tell("  healing")
        now_s = time.monotonic()
        self._due = [(now_s, number, act) for _, number, act in self._due]
        heapq.heapify(self._due)
        while self._due or self._leaving:
            self._until(time.monotonic() + LOOK_S)

    # ------------------------------------------------------------------------- time

    def _at(self, when_s: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._due, (when_s, next(self._order), act))

    def _later(self, seconds: float, act: Callable[[], None]) -> None:
        self._at(time.monotonic() + seconds, act)

    def _until(self, end_s: float) -> None:
        while (now_s := time.monotonic()) < end_s:
            self._look()
            while self._due and self._due[0][0] <= now_s:
                heapq.heappop(self._due)[2]()
            next_s = min(end_s, now_s + LOOK_S, self._due[0][0] if self._due else end_s)
            self._trace.wait(lambda _: False, max(0.0, next_s - time.monotonic()))

    def _look(self) -> None:
        """Nobody ends without a blow, and who drains ends well."""
        coordinator = self._fleet.coordinator
        assert coordinator is not None
        if self._coordinator in ("up", "stopped") and coordinator.poll() is not None:
            raise Fallen(f"the coordinator ended by itself with status {coordinator.returncode}")
        for name in self._names:
            if name in self._absent:
                continue
            status = self._fleet.agents[name].process.poll()
            if name in self._leaving:
                if status is not None:
                    del self._leaving[name]
                    if status != 0 and not (status == -signal.SIGTERM and name in self._starting):
                        raise Fallen(f"agent {name} drained and ended with status {status}")
                    self._tell(f"  agent {name} has left")
                    self._absent[name] = None
                    self._later(0.2, lambda name=name: self._start(name))
                elif time.monotonic() > self._leaving[name]:
                    raise Fallen(f"agent {name} was told to drain and is there {DRAIN_LIMIT_S:g} s later")
            elif status == UNREACHABLE and not (self._fleet.root / name / "identity.json").exists():
                self._absent[name] = None
                self._later(1.0, lambda name=name: self._start(name))
            elif status is not None:
                raise Fallen(f"agent {name} ended by itself with status {status}")

    # ------------------------------------------------------------------------- blows

    def _strike(self, blow: Blow) -> None:
        holders = self._holders()
        name = self._names[blow.target % len(self._names)]
        match blow.whom:
            case Whom.COORDINATOR:
                hit = self._strike_coordinator(blow)
            case Whom.EVERYONE:
                struck = [self._strike_agent(blow, each) for each in self._names]
                hit = any(struck)
            case Whom.WORKER:
                hit = self._strike_worker(blow, name)
            case _:
                hit = self._strike_agent(blow, name)
        if not hit:
            self.spared += 1
            return
        self.struck[f"{blow.kind.value} {blow.whom.value}"] += 1
        about = "" if blow.whom in (Whom.COORDINATOR, Whom.EVERYONE) else f" ({name})"
        if holders and not self._holders():
            self.excused += 1
            about += ", and with it the state"
        self._tell(f"  {blow}{about}")

    def _strike_coordinator(self, blow: Blow) -> bool:
        process = self._fleet.coordinator
        assert process is not None
        if self._coordinator != "up":
            return False
        if blow.kind is Kind.STOP:
            self._coordinator = "stopped"
            send(process.pid, signal.SIGSTOP)
            self._later(blow.seconds, self._wake_coordinator)
            return True
        self._coordinator = "down"
        if blow.kind is Kind.KILL:
            process.kill()
        else:
            process.terminate()
        limit_s = time.monotonic() + CLOSE_LIMIT_S
        self._later(blow.seconds, lambda: self._start_coordinator(limit_s))
        return True

    def _wake_coordinator(self) -> None:
        assert self._fleet.coordinator is not None
        send(self._fleet.coordinator.pid, signal.SIGCONT)
        self._coordinator = "up"

    def _start_coordinator(self, limit_s: float) -> None:
        process = self._fleet.coordinator
        assert process is not None
        status = process.poll()
        if status is None:
            if time.monotonic() > limit_s:
                raise Fallen(f"the coordinator was told to end and is there {CLOSE_LIMIT_S:g} s later")
            self._later(LOOK_S, lambda: self._start_coordinator(limit_s))
            return
        if status not in (0, -signal.SIGKILL):
            raise Fallen(f"the coordinator closed with status {status}")
        self._fleet.start_coordinator(ports=self._addresses)
        self._coordinator = "up"

    def _strike_worker(self, blow: Blow, name: str) -> bool:
        workers = self._here(name).workers() if name not in self._absent else []
        if not workers or name in self._frozen:
            return False
        victim = workers[blow.target % len(workers)]
        if blow.kind is Kind.STOP:
            self._freeze(name, [victim], blow.seconds)
        else:
            self._dead.add(victim)
            send(victim, signal.SIGKILL if blow.kind is Kind.KILL else signal.SIGTERM)
        return True

    def _strike_agent(self, blow: Blow, name: str) -> bool:
        if name in self._absent or name in self._frozen:
            return False
        agent = self._here(name)
        match blow.kind:
            case Kind.KILL:
                self._leaving.pop(name, None)
                self._absent[name] = None
                agent.kill()
                if blow.forgets:
                    self._later(blow.seconds, lambda: self._replace(name))
                else:
                    self._later(blow.seconds, lambda: self._start(name))
            case Kind.STOP:
                workers = agent.workers() if blow.whom is not Whom.AGENT_ONLY else []
                self._freeze(name, [agent.process.pid, *workers], blow.seconds)
            case Kind.TERM:
                if name in self._leaving:
                    return False
                self._leaving[name] = time.monotonic() + DRAIN_LIMIT_S
                self._starting.discard(name)
                if not self._has_started(name):
                    self._starting.add(name)
                agent.process.terminate()
        return True

    def _freeze(self, name: str, pids: list[int], seconds: float) -> None:
        self._frozen[name] = pids
        for pid in pids:
            send(pid, signal.SIGSTOP)
        self._later(seconds, lambda: self._thaw(name))

    def _thaw(self, name: str) -> None:
        for pid in self._frozen.pop(name):
            send(pid, signal.SIGCONT)

    def _here(self, name: str) -> AgentProcess:
        return self._fleet.agents[name]

    def _has_started(self, name: str) -> bool:
        """Whether the agent says that it listens; before that SIGTERM just ends it."""
        log = (self._fleet.root / f"{name}.log").read_text(errors="replace")
        return log.count('"event": "agent.started"') >= self._launches[name]

    def _start(self, name: str) -> None:
        self._launches[name] += 1
        self._fleet.launch(name, self._token)
        self._absent.pop(name, None)

    def _replace(self, name: str) -> None:
        """Somebody else comes in its place."""
        stranger = f"{name.split('.', maxsplit=1)[0]}.{next(self._strangers)}"
        self._names[self._names.index(name)] = stranger
        self._absent.pop(name, None)
        del self._fleet.agents[name]
        self._start(stranger)

    # ------------------------------------------------------------------------- who holds the state

    def _holders(self) -> list[str]:
        """Agents that are well and whose living worker has committed a step in the newest generation."""
        commits = self._trace.commits(max(0, len(self._trace) - 200))
        newest = max((commit.generation for commit in commits), default=0)
        trained = {commit.pid for commit in commits if commit.generation == newest}
        return [
            name
            for name in self._names
            if name not in self._absent and name not in self._frozen and name not in self._leaving
            if any(pid in trained and pid not in self._dead for pid in self._here(name).workers())
        ]
