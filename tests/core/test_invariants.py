"""Random lives: whatever happens, in whatever order, the promises hold after every event."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator.core.model import (
    AgentId,
    FailureKind,
    GenerationPlanned,
    JobId,
    JobPhase,
    Tick,
)
from tests.core.scenario import Scenario

NAMES = tuple("abcdef")
VERBS = (
    *["joins", "reconnects held tiny 1", "closes", "beats", "goodbye", "leaving", "freezes", "thaws"],
    *["ready", "ready", "ready", "ready holds {step}", "ready holds 99999"],
    *["formed", "formed", "formed", "formed in 1", "formed {step} other"],
    *["steps {next} {after}", "steps {next} {next}", "steps {after} {after}", "steps 1 {next} in 1"],
    *[f"fails {kind.value}" for kind in FailureKind],
    *["fails killed", "fails collective", "fails restore {step}"],
    *["finished {step}", "released", "released", "released in 1"],
    *["shard {step} 0/2", "shard {step} 1/2", "shard {next} 0/1", "shard 500 0/1"],
)
OPERATOR = (
    *["pause", "resume", "resume", "checkpoint", "scale 1 2", "scale 2 4"],
    *["drain {name}", "quarantine {name} for 500", "quarantine {name}", "release {name}", "release {name}"],
)
RARE = ("stop", "cancel", "ban {name}")

Choice = tuple[int, int, int]


def duty(scenario: Scenario, name: AgentId, whim: int) -> str:
    """What a healthy agent would do next."""
    agent = scenario.state.agents.get(name)
    if agent is None or agent.session_id is None:
        return f"agent {name} joins"
    if name in scenario.frozen:
        return f"agent {name} thaws"
    if agent.job_id is None:
        return f"at {scenario.now_ms + 500}"
    job = scenario.state.jobs[agent.job_id]
    generation = job.generation
    step = job.committed_step
    if generation is not None and name in generation.leaving:
        return f"agent {name} " + ("released", f"shard {step} {whim % 2}/2")[whim % 4 == 0 and step > 0]
    if agent.readiness is None:
        holds = generation is not None and name in generation.holders
        return f"agent {name} ready" + (f" holds {step}" if holds else "")
    if generation is None or not any(m.agent_id == name for m in generation.members):
        return f"at {scenario.now_ms + 500}"
    if name not in generation.formed:
        return f"agent {name} formed"
    if whim % 5 == 0 and step:
        return f"agent {name} shard {step} {whim % 2}/2"
    if whim % 19 == 0:
        return f"agent {name} finished"
    return f"agent {name} steps {step + 1} {step + 1 + whim % 3}"


def command(scenario: Scenario, choice: Choice) -> str:
    """A command from three numbers: mostly what is expected of an agent, at times anything at all."""
    kind, first, second = choice
    name = AgentId(NAMES[first % len(NAMES)])
    if kind < 75:
        return duty(scenario, name, second)
    step = max(job.committed_step for job in scenario.state.jobs.values())
    fill = {"name": name, "step": max(1, step), "next": step + 1, "after": step + 1 + second % 3}
    if kind < 87:
        return f"agent {name} {VERBS[second % len(VERBS)]}".format(**fill)
    if kind < 92:
        return f"at {scenario.now_ms + (10, 300, 1_100, 2_600, 7_000, 20_000)[second % 6]}"
    if kind < 96:
        return "operator " + OPERATOR[second % len(OPERATOR)].format(**fill)
    if kind < 97 and second % 4 == 0:
        return "operator " + RARE[second % len(RARE)].format(**fill)
    if kind < 98:
        return "coordinator restarts"
    if second % 3 == 0 and len(scenario.state.jobs) < 6:
        return (
            f"job job{len(scenario.state.jobs)} min {1 + first % 2} max {2 + first % 3} priority {second % 2}"
        )
    return f"at {scenario.now_ms + 50}"


def possible(scenario: Scenario, text: str) -> bool:
    words = text.split()
    agents = scenario.state.agents
    if words[0] == "operator":
        named = words[2] if words[1] in ("drain", "quarantine", "release", "ban") else None
        return named in agents if named else bool(scenario.state.jobs)
    if words[0] != "agent" or words[2] == "joins":
        return True
    agent = agents.get(AgentId(words[1]))
    if agent is None:
        return False
    return agent.session_id is not None or words[2] not in ("closes", "beats", "thaws")


def live(choices: list[Choice]) -> Scenario:
    scenario = Scenario()
    scenario.say("job tiny min 2 max 3 failures 50 last_call 200 step_timeout 500")
    for name in NAMES[:4]:
        scenario.say(f"agent {name} joins")
        scenario.say(f"agent {name} ready")
    for choice in choices:
        text = command(scenario, choice)
        if possible(scenario, text):
            scenario.say(text)
    return scenario


CHOICES = st.tuples(st.integers(0, 99), st.integers(0, 99), st.integers(0, 999))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(choices=st.lists(CHOICES, max_size=80))
def test_any_sequence_of_events_keeps_the_promises(choices: list[Choice]) -> None:
    # Each command checks the state and the order of its records; replaying them gives the same state.
    scenario = live(choices)
    scenario.journal.check_replay(scenario.state)


@pytest.mark.parametrize("seed", range(12))
def test_a_long_life_keeps_the_promises(seed: int) -> None:
    rng = random.Random(seed)
    choices = [(rng.randrange(100), rng.randrange(100), rng.randrange(1_000)) for _ in range(400)]
    scenario = live(choices)
    scenario.journal.check_replay(scenario.state)


@pytest.mark.parametrize("seed", range(12))
def test_a_job_runs_again_once_faults_stop(seed: int) -> None:
    rng = random.Random(1_000 + seed)
    choices = [(rng.randrange(92), rng.randrange(100), rng.randrange(1_000)) for _ in range(150)]
    scenario = live(choices)
    scenario.say("job last min 2 max 3 priority 9")
    for name in ("x", "y", "z"):
        scenario.say(f"agent {name} joins")
    settle_down(scenario, lambda: scenario.state.jobs[JobId("last")].phase is JobPhase.RUNNING)


def settle_down(scenario: Scenario, done: Callable[[], bool]) -> None:
    """Every agent does what is expected of it from now on; soon it is `done`."""
    for _ in range(60):
        for name in (*NAMES, "x", "y", "z"):
            if done():
                return
            text = duty(scenario, AgentId(name), 1)
            if possible(scenario, text):
                scenario.say(text)
        scenario.say(f"at {scenario.now_ms + 500}")
    raise AssertionError("the job did not come to run")


def test_the_same_events_give_the_same_records() -> None:
    rng = random.Random(7)
    choices = [(rng.randrange(100), rng.randrange(100), rng.randrange(1_000)) for _ in range(300)]
    assert live(choices).journal.lines == live(choices).journal.lines


def test_a_tick_without_anything_due_changes_nothing() -> None:
    scenario = live([])
    before = len(scenario.journal.lines)
    scenario.records = []
    scenario.happen(Tick())
    assert scenario.records == []
    assert len(scenario.journal.lines) == before
    assert not any(isinstance(record, GenerationPlanned) for record in scenario.records)
