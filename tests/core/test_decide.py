"""Admission, tokens and the operator's commands: what is accepted, and what is refused by which code."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from coordinator.core.decide import decide
from coordinator.core.model import (
    Accepted,
    AgentAction,
    AgentAdmitted,
    AgentCommanded,
    AgentFacts,
    AgentId,
    AgentUnassigned,
    CertificateRenewed,
    EnrollAsked,
    Event,
    HeartbeatReceived,
    IdentityRenewed,
    JobAction,
    JobCommanded,
    JobId,
    JobScaled,
    JobSubmitted,
    Readiness,
    ReadyReceived,
    Refusal,
    Refused,
    SessionClosed,
    SessionId,
    SessionOpened,
    TokenAsked,
    TokenId,
    TokenRevokeAsked,
)
from tests.core.scenario import Scenario


@pytest.fixture
def scenario() -> Iterator[Scenario]:
    scenario = Scenario()
    yield scenario
    scenario.journal.check_replay(scenario.state)


def refusal(scenario: Scenario, event: Event) -> Refusal:
    decision = decide(scenario.state, scenario.now_ms, event)
    assert isinstance(decision.reply, Refused)
    assert decision.records == (), "a refusal comes without records"
    assert decision.reply.message
    return decision.reply.refusal


def enroll(token: str = "one", secret: str = "right", agent: str = "new") -> EnrollAsked:
    return EnrollAsked(
        token_id=TokenId(token),
        secret_sha256=secret,
        agent_id=AgentId(agent),
        name=agent,
        certificate_serial="7",
    )


def ask_for_token(uses: int = 1, expires_ms: int = 1_000) -> TokenAsked:
    return TokenAsked(
        token_id=TokenId("one"), secret_sha256="right", note="", expires_ms=expires_ms, uses=uses
    )


def test_a_token_admits_as_many_agents_as_it_allows(scenario: Scenario) -> None:
    scenario.happen(ask_for_token(uses=2))
    scenario.happen(enroll(agent="p"))
    scenario.happen(enroll(agent="q"))
    assert scenario.reply == Accepted()
    assert [r.agent_id for r in scenario.records if isinstance(r, AgentAdmitted)] == ["p", "q"]
    assert refusal(scenario, enroll(agent="r")) is Refusal.TOKEN_EXHAUSTED


def test_enrolment_is_refused_by_the_reason(scenario: Scenario) -> None:
    assert refusal(scenario, enroll()) is Refusal.TOKEN_UNKNOWN
    scenario.happen(ask_for_token(uses=5))
    assert refusal(scenario, enroll(secret="wrong")) is Refusal.TOKEN_UNKNOWN
    scenario.happen(enroll())
    assert refusal(scenario, enroll()) is Refusal.INVALID
    scenario.now_ms = 1_000
    assert refusal(scenario, enroll(agent="late")) is Refusal.TOKEN_EXPIRED
    scenario.happen(TokenRevokeAsked(token_id=TokenId("one")))
    assert refusal(scenario, enroll(agent="late")) is Refusal.TOKEN_REVOKED
    scenario.happen(TokenRevokeAsked(token_id=TokenId("one")))
    assert scenario.reply == Accepted()


def test_tokens_are_checked_when_they_are_made(scenario: Scenario) -> None:
    assert refusal(scenario, ask_for_token(uses=0)) is Refusal.INVALID
    assert refusal(scenario, ask_for_token(expires_ms=0)) is Refusal.INVALID
    scenario.happen(ask_for_token())
    assert refusal(scenario, ask_for_token()) is Refusal.INVALID
    assert refusal(scenario, TokenRevokeAsked(token_id=TokenId("none"))) is Refusal.UNKNOWN_TOKEN


def test_who_is_not_known_is_refused(scenario: Scenario) -> None:
    assert refusal(scenario, IdentityRenewed(agent_id=AgentId("x"), certificate_serial="1")) is (
        Refusal.UNKNOWN_AGENT
    )
    assert refusal(scenario, JobCommanded(job_id=JobId("x"), action=JobAction.STOP)) is Refusal.UNKNOWN_JOB
    assert refusal(scenario, JobScaled(job_id=JobId("x"), min_nodes=1, max_nodes=1)) is Refusal.UNKNOWN_JOB
    scenario.say("agent a joins")
    readiness = Readiness(
        job_id=JobId("x"), store_host="a", store_port=1, holds_state=False, step=0, state_digest=""
    )
    assert refusal(scenario, ReadyReceived(agent_id=AgentId("a"), readiness=readiness)) is Refusal.UNKNOWN_JOB


def test_a_store_that_a_plan_used_up_is_not_taken_again(scenario: Scenario) -> None:
    scenario.say("job tiny min 1 max 1")
    scenario.say("agent a joins")
    scenario.say("agent a ready")
    generation = scenario.job().generation
    assert generation is not None
    crossed = Readiness(
        job_id=scenario.job().job_id,
        store_host=generation.store_host,
        store_port=generation.store_port,
        holds_state=False,
        step=0,
        state_digest="",
    )
    scenario.happen(ReadyReceived(agent_id=AgentId("a"), readiness=crossed))
    assert scenario.reply == Accepted()
    assert scenario.state.agents[AgentId("a")].readiness is None


def test_a_renewed_certificate_is_kept(scenario: Scenario) -> None:
    scenario.say("agent a joins")
    scenario.happen(IdentityRenewed(agent_id=AgentId("a"), certificate_serial="99"))
    assert scenario.state.agents[AgentId("a")].certificate_serial == "99"
    assert any(isinstance(record, CertificateRenewed) for record in scenario.records)


def test_a_session_that_was_replaced_is_not_heard(scenario: Scenario) -> None:
    scenario.say("agent a joins")
    old = scenario.state.agents[AgentId("a")].session_id
    assert old is not None
    scenario.say("agent a reconnects")
    beat = HeartbeatReceived(
        agent_id=AgentId("a"), session_id=old, step=0, activity="", tokens_per_s=0.0, disk_free_bytes=0
    )
    assert refusal(scenario, beat) is Refusal.DUPLICATE_IDENTITY
    scenario.happen(SessionClosed(agent_id=AgentId("a"), session_id=old))
    assert scenario.state.agents[AgentId("a")].session_id is not None


def test_names_of_live_jobs_are_taken(scenario: Scenario) -> None:
    scenario.say("job tiny min 1 max 1")
    job = scenario.job()

    again = JobSubmitted(job_id=JobId("other"), spec=job.spec)
    assert refusal(scenario, again) is Refusal.NAME_TAKEN
    scenario.say("operator cancel")
    scenario.happen(again)
    assert scenario.reply == Accepted()
    assert refusal(scenario, again) is Refusal.INVALID


def test_an_agent_that_comes_back_with_less_is_taken_off_its_job(scenario: Scenario) -> None:
    scenario.say("job tiny min 1 max 1 backend gloo")
    scenario.say("agent a joins")
    scenario.say("agent a closes")
    scenario.say("agent a joins backend nccl")
    assert any(isinstance(record, AgentUnassigned) for record in scenario.records)
    assert scenario.state.agents[AgentId("a")].job_id is None


def test_an_agent_that_said_goodbye_is_not_heard_until_it_comes_again(scenario: Scenario) -> None:
    scenario.say("job tiny min 1 max 1")
    for line in ("agent a joins", "agent a goodbye", "agent a beats"):
        scenario.say(line)
    assert scenario.state.agents[AgentId("a")].presence.value == "absent"
    assert scenario.state.agents[AgentId("a")].job_id is None


def test_until_when_a_quarantine_lasts_is_in_the_future(scenario: Scenario) -> None:
    scenario.say("agent a joins")
    scenario.now_ms = 100
    command = AgentCommanded(agent_id=AgentId("a"), action=AgentAction.QUARANTINE, reason="", until_ms=100)
    assert refusal(scenario, command) is Refusal.INVALID


def test_decide_changes_nothing(scenario: Scenario) -> None:
    scenario.say("job tiny min 1 max 1")
    scenario.say("agent a joins")
    agents, jobs = dict(scenario.state.agents), dict(scenario.state.jobs)
    event = SessionOpened(
        agent_id=AgentId("a"),
        session_id=SessionId("s"),
        incarnation=scenario.state.agents[AgentId("a")].incarnation,
        facts=AgentFacts(hostname="elsewhere"),
        held_job=None,
        held_generation=0,
        torchrun_job="",
    )
    assert decide(scenario.state, 5, event).records
    assert scenario.state.agents == agents
    assert scenario.state.jobs == jobs
    scenario.happen(event)
    assert scenario.state.agents != agents
