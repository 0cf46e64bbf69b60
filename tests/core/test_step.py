"""The turn of the core as the shell sees it: cost, deadlines, pushes and what is said anew."""

from __future__ import annotations

import pytest

from coordinator.core.model import (
    AgentId,
    CoordinatorStarted,
    GenerationPlanned,
    HeartbeatReceived,
    LeaseRenewed,
    LeasesRefreshed,
    PushAssignment,
    PushPlan,
    Tick,
    Timing,
)
from coordinator.core.pushes import resync
from coordinator.core.settle import next_deadline
from coordinator.core.step import step
from tests.core.scenario import Scenario


def crowd(count: int) -> Scenario:
    scenario = Scenario()
    scenario.say("job tiny min 1 max 2")
    for number in range(count):
        scenario.say(f"agent a{number} joins")
    return scenario


def beat(scenario: Scenario, name: str) -> HeartbeatReceived:
    session_id = scenario.state.agents[AgentId(name)].session_id
    assert session_id is not None
    return HeartbeatReceived(
        agent_id=AgentId(name),
        session_id=session_id,
        step=3,
        activity="computing",
        tokens_per_s=1.5,
        disk_free_bytes=9,
    )


def test_a_heartbeat_puts_nothing_on_the_agenda() -> None:
    scenario = crowd(40)
    due = dict(scenario.state.agenda.due)
    outcome = step(scenario.state, 100, beat(scenario, "a7"))
    assert [type(record) for record in outcome.records] == [LeaseRenewed]
    assert outcome.pushes == ()
    assert scenario.state.agenda.due == due, "a renewed lease is noted only when the old one would end"
    agent = scenario.state.agents[AgentId("a7")]
    assert (agent.step, agent.activity, agent.lease_until_ms) == (3, "computing", 2_100)


def test_the_next_deadline_is_exact_though_leases_are_renewed_in_silence() -> None:
    scenario = crowd(3)
    assert next_deadline(scenario.state) == 2_000
    for at_ms, name in ((100, "a0"), (200, "a1"), (300, "a2")):
        step(scenario.state, at_ms, beat(scenario, name))
    assert next_deadline(scenario.state) == 2_100
    step(scenario.state, 400, beat(scenario, "a0"))
    assert next_deadline(scenario.state) == 2_200
    assert step(scenario.state, 2_199, Tick()).records == ()
    assert step(scenario.state, 2_200, Tick()).records != ()


def test_nothing_is_due_when_nobody_is_there() -> None:
    assert next_deadline(Scenario().state) is None


def test_the_agenda_does_not_grow_with_time() -> None:
    scenario = crowd(5)
    for round_ms in range(100, 400_000, 500):
        for number in range(5):
            step(scenario.state, round_ms, beat(scenario, f"a{number}"))
        next_deadline(scenario.state)
    assert len(scenario.state.agenda.heap) < 100


def test_the_step_that_hears_of_a_death_carries_the_plan_to_every_survivor() -> None:
    scenario = Scenario()
    for line in (
        "job tiny min 1 max 3",
        "agent a,b,c joins",
        "agent a,b,c ready",
        "agent a ready",
        "agent a,b,c formed",
        "agent b fails killed",
    ):
        scenario.say(line)
    planned = [record for record in scenario.records if isinstance(record, GenerationPlanned)]
    plans = {push.agent_id: push for push in scenario.pushes if isinstance(push, PushPlan)}
    assert len(planned) == 1
    assert plans.keys() == {"a", "b", "c"}
    assert all(push.generation == planned[0].generation for push in plans.values())
    assert [m.agent_id for m in plans[AgentId("a")].generation.members] == ["a", "c"]


def test_an_agent_that_comes_is_told_everything_once() -> None:
    scenario = Scenario()
    for line in ("job tiny min 1 max 3", "agent a joins"):
        scenario.say(line)
    told = [push for push in scenario.pushes if push.agent_id == "a"]
    assert told == [PushAssignment(agent_id=AgentId("a"), job_id=scenario.job().job_id, number=1)]
    assert tuple(told) == resync(scenario.state, AgentId("a"))


def test_nobody_is_pushed_to_without_a_session() -> None:
    scenario = Scenario()
    for line in ("job tiny min 1 max 3", "agent a joins", "agent a closes"):
        scenario.say(line)
    assert resync(scenario.state, AgentId("a")) == ()
    scenario.say("operator drain a")
    assert scenario.pushes == []


def test_leases_after_a_start_are_fresh_and_spread() -> None:
    scenario = crowd(4)
    scenario.now_ms = 10_000
    outcome = step(scenario.state, 10_000, CoordinatorStarted(spread_ms=400))
    refreshed = [record for record in outcome.records if isinstance(record, LeasesRefreshed)]
    assert [until_ms for _, until_ms in refreshed[0].until_ms] == [12_000, 12_100, 12_200, 12_300]
    assert next_deadline(scenario.state) == 12_000


def test_leases_after_a_start_last_until_all_of_a_large_fleet_can_be_back() -> None:
    scenario = crowd(400)
    scenario.now_ms = 10_000
    outcome = step(scenario.state, 10_000, CoordinatorStarted(spread_ms=0))
    refreshed = [record for record in outcome.records if isinstance(record, LeasesRefreshed)]
    assert {until_ms for _, until_ms in refreshed[0].until_ms} == {12_400}


@pytest.mark.parametrize("lease_ms", [1_000, 15_000, 600_000])
def test_one_lease_gives_the_whole_budget(lease_ms: int) -> None:
    timing = Timing.from_lease(lease_ms)
    assert timing.heartbeat_ms * 2 < timing.lease_ms
    assert timing.grace_ms < timing.lease_ms <= timing.rebuild_timeout_ms
