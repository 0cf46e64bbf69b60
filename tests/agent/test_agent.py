"""The whole agent in this process: real TLS, real control sockets, real worker processes, real torch
elastic; a coordinator that says what the test wants."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
from pathlib import Path

import pytest

from agent.errors import RefusedByCoordinator
from agent.home import ask
from agent.peers import Lending
from protos import agent_pb2
from tests.agent.conftest import Volunteer, alive, eventually, member
from tests.agent.fake_coordinator import FakeCoordinator


async def test_assignment_leads_to_ready_with_a_store_that_accepts_connections(
    volunteer: Volunteer, coordinator: FakeCoordinator
) -> None:
    await volunteer.start()
    volunteer.assign()
    ready = await coordinator.heard("ready")
    assert ready.job_id == "j1"
    assert not ready.holds_state
    assert ready.store_host == "127.0.0.1"
    _, writer = await asyncio.open_connection("127.0.0.1", ready.store_port)
    writer.close()


async def test_plan_reaches_the_worker_and_its_confirmation_the_coordinator(
    volunteer: Volunteer, coordinator: FakeCoordinator
) -> None:
    await volunteer.start()
    volunteer.assign({"steps": 3})
    ready = await coordinator.heard("ready")
    volunteer.plan(1, ready, from_checkpoint=True)
    formed = await coordinator.heard("formed")
    assert (formed.generation, formed.step, formed.state_digest) == (1, 0, "ab")
    finished = await coordinator.heard("finished")
    assert (finished.generation, finished.step) == (1, 3)
    records = [record for m in coordinator.messages for record in m.progress.steps]
    assert [record.step for record in records] == [1, 2, 3]
    assert records[0].data_digest == 2**63 + 1
    (plan,) = volunteer.told("plan")
    assert (plan["rank"], plan["world_size"], plan["source"]) == (0, 1, "fresh")


async def test_a_leader_whose_store_was_used_offers_another(
    volunteer: Volunteer, coordinator: FakeCoordinator
) -> None:
    await volunteer.start()
    volunteer.assign()
    first = await coordinator.heard("ready")
    volunteer.plan(1, first)
    second = await coordinator.heard("ready")
    assert second.store_port != first.store_port
    await coordinator.heard("formed")


async def test_second_plan_aborts_the_first_and_keeps_the_process(
    volunteer: Volunteer, coordinator: FakeCoordinator
) -> None:
    await volunteer.start()
    volunteer.assign()
    ready = await coordinator.heard("ready")
    volunteer.plan(1, ready)
    await coordinator.heard("formed")
    ready = await coordinator.heard("ready")
    volunteer.plan(2, ready, members=[member("a1", 0), member("a2", 1)], committed_step=7)
    formed = await coordinator.heard("formed")
    assert formed.generation == 2
    assert [abort["generation"] for abort in volunteer.told("abort")] == [1]
    plans = volunteer.told("plan")
    assert len({plan["pid"] for plan in plans}) == 1
    assert (plans[1]["world_size"], plans[1]["committed_step"], plans[1]["source"]) == (2, 7, "memory")


async def test_planned_cut_sends_no_abort(volunteer: Volunteer, coordinator: FakeCoordinator) -> None:
    await volunteer.start()
    volunteer.assign()
    volunteer.plan(1, await coordinator.heard("ready"))
    await coordinator.heard("formed")
    volunteer.plan(2, await coordinator.heard("ready"), cut=agent_pb2.CUT_AFTER_STEP)
    await coordinator.heard("formed")
    assert not volunteer.told("abort")


async def test_repeated_and_older_plans_change_nothing(
    volunteer: Volunteer, coordinator: FakeCoordinator
) -> None:
    await volunteer.start()
    volunteer.assign()
    ready = await coordinator.heard("ready")
    volunteer.plan(2, ready)
    await coordinator.heard("formed")
    volunteer.plan(2, ready)
    volunteer.plan(1, ready)
    volunteer.plan(3, await coordinator.heard("ready"))
    await coordinator.heard("formed", lambda formed: formed.generation == 3)
    assert [plan["generation"] for plan in volunteer.told("plan")] == [2, 3]


async def test_killed_worker_is_reported_replaced_and_ready_again(
    volunteer: Volunteer, coordinator: FakeCoordinator
) -> None:
    await volunteer.start()
    volunteer.assign()
    volunteer.plan(1, await coordinator.heard("ready"))
    await coordinator.heard("formed")
    await coordinator.heard("ready")
    (plan,) = volunteer.told("plan")
    os.kill(plan["pid"], signal.SIGKILL)
    failed = await coordinator.heard("failed")
    assert (failed.kind, failed.generation) == (agent_pb2.FAILURE_KIND_KILLED, 1)
    assert "SIGKILL" in failed.detail
    ready = await coordinator.heard("ready")
    assert not ready.holds_state
    volunteer.plan(2, ready)
    await coordinator.heard("formed", lambda formed: formed.generation == 2)
    assert volunteer.told("plan")[-1]["pid"] != plan["pid"]


async def test_worker_that_cannot_start_is_reported_with_its_last_words(
    volunteer: Volunteer, coordinator: FakeCoordinator
) -> None:
    await volunteer.start()
    volunteer.assign({"die_before_warm": True})
    failed = await coordinator.heard("failed")
    assert failed.kind == agent_pb2.FAILURE_KIND_PREPARE
    assert failed.generation == 0
    assert "status 3" in failed.detail
    assert "model.layers: found 0" in failed.detail
    lines = await coordinator.heard("logs")
    assert "ValueError: model.layers: found 0" in list(lines.lines)


async def test_failed_collective_is_evidence_and_the_process_lives_on(
    volunteer: Volunteer, coordinator: FakeCoordinator
) -> None:
    await volunteer.start()
    volunteer.assign({"fail": "collective"})
    volunteer.plan(1, await coordinator.heard("ready"))
    failed = await coordinator.heard("failed")
    assert (failed.kind, failed.detail) == (agent_pb2.FAILURE_KIND_COLLECTIVE, "as told")
    volunteer.plan(2, await coordinator.heard("ready"))
    await coordinator.heard("formed", lambda formed: formed.generation == 2)
    assert len({plan["pid"] for plan in volunteer.told("plan")}) == 1


async def test_worker_that_does_not_confirm_a_plan_is_killed_as_wedged(
    volunteer: Volunteer, coordinator: FakeCoordinator
) -> None:
    await volunteer.start()
    volunteer.assign({"silent": True})
    volunteer.plan(1, await coordinator.heard("ready"))
    failed = await coordinator.heard("failed")
    assert failed.kind == agent_pb2.FAILURE_KIND_WEDGED
    assert "did not confirm generation 1" in failed.detail
    await coordinator.heard("ready", lambda ready: True)


@pytest.mark.parametrize(
    ("fake", "words"),
    [
        ({"activity": "computing", "since_s": 5.0}, "computing for 5.0 s"),
        ({"deaf": True}, "answered no ping"),
    ],
)
async def test_worker_beyond_its_step_timeout_is_killed_as_wedged(
    volunteer: Volunteer, coordinator: FakeCoordinator, fake: dict[str, object], words: str
) -> None:
    await volunteer.start()
    volunteer.assign(fake, elastic={"step_timeout": "500ms"})
    failed = await coordinator.heard("failed")
    assert failed.kind == agent_pb2.FAILURE_KIND_WEDGED
    assert words in failed.detail


async def test_worker_that_waits_for_a_peer_is_never_killed_for_it(
    volunteer: Volunteer, coordinator: FakeCoordinator
) -> None:
    await volunteer.start()
    volunteer.assign({"activity": "reducing", "since_s": 500.0}, elastic={"step_timeout": "200ms"})
    await coordinator.heard("ready")
    await eventually(lambda: len(volunteer.told("ping")) >= 5)
    assert coordinator.count("failed") == 0


async def test_release_leaves_the_worker_warm_and_ready(
    volunteer: Volunteer, coordinator: FakeCoordinator
) -> None:
    await volunteer.start()
    volunteer.assign()
    volunteer.plan(1, await coordinator.heard("ready"))
    await coordinator.heard("formed")
    volunteer.plan(
        2, await coordinator.heard("ready"), members=[member("a2", 0)], cut=agent_pb2.CUT_AFTER_STEP
    )
    released = await coordinator.heard("released")
    assert (released.job_id, released.generation) == ("j1", 2)
    ready = await coordinator.heard("ready")
    assert ready.holds_state
    release = volunteer.told("plan")[-1]
    assert release["release"]
    volunteer.plan(3, ready)
    await coordinator.heard("formed", lambda formed: formed.generation == 3)
    assert volunteer.told("plan")[-1]["pid"] == release["pid"]


async def test_unassigned_job_leaves_no_process(volunteer: Volunteer, coordinator: FakeCoordinator) -> None:
    await volunteer.start()
    volunteer.assign()
    volunteer.plan(1, await coordinator.heard("ready"))
    await coordinator.heard("formed")
    (plan,) = volunteer.told("plan")
    coordinator.say(unassign=agent_pb2.Unassign(job_id="j1", reason="cancelled"))
    await eventually(lambda: not alive(plan["pid"]))
    await coordinator.heard("heartbeat", lambda beat: beat.activity == "idle")
    volunteer.assign(job_id="j2")
    await coordinator.heard("ready", lambda ready: ready.job_id == "j2")


async def test_steps_unacknowledged_when_the_coordinator_dies_are_sent_again_and_nobody_restarts(
    volunteer: Volunteer, coordinator: FakeCoordinator
) -> None:
    await volunteer.start()
    coordinator.answer_progress = False
    volunteer.assign({"steps": 5})
    volunteer.plan(1, await coordinator.heard("ready"))
    await coordinator.heard("finished")
    (plan,) = volunteer.told("plan")
    port = coordinator.port
    await coordinator.stop()
    coordinator.messages.clear()
    coordinator._read.clear()
    coordinator.answer_progress = True
    await coordinator.start(port)
    progress = await coordinator.heard("progress")
    assert [record.step for record in progress.steps] == [1, 2, 3, 4, 5]
    assert (await coordinator.heard("formed")).generation == 1
    await coordinator.heard("finished")
    assert coordinator.session.hello.held == agent_pb2.Membership(job_id="j1", generation=1)
    assert alive(plan["pid"])
    assert len(volunteer.told("plan")) == 1


async def test_a_member_that_becomes_leader_sends_what_the_dead_leader_may_not_have(
    volunteer: Volunteer, coordinator: FakeCoordinator
) -> None:
    await volunteer.start()
    volunteer.assign({"steps": 4, "finish": False})
    ready = await coordinator.heard("ready")
    volunteer.plan(1, ready, members=[member("a2", 0), member("a1", 1)])
    await coordinator.heard("formed")
    await eventually(lambda: volunteer.agent and volunteer.agent.status()["job"]["unacknowledged_steps"] == 4)
    assert coordinator.count("progress") == 0
    members = [member("a1", 0, holds_state=True), member("a2", 1)]
    volunteer.plan(2, ready, members=members, committed_step=2)
    progress = await coordinator.heard("progress")
    assert [record.step for record in progress.steps] == [3, 4]


async def test_evidence_of_the_current_generation_survives_a_reconnect_once(
    volunteer: Volunteer, coordinator: FakeCoordinator
) -> None:
    await volunteer.start()
    volunteer.assign()
    volunteer.plan(1, await coordinator.heard("ready"))
    await coordinator.heard("formed")
    (plan,) = volunteer.told("plan")
    port = coordinator.port
    await coordinator.stop()
    os.kill(plan["pid"], signal.SIGKILL)
    await eventually(lambda: not alive(plan["pid"]))
    await coordinator.start(port)
    failed = await coordinator.heard("failed")
    assert failed.generation == 1

    def beats_since() -> int:
        kinds = [message.WhichOneof("body") for message in coordinator.session.heard]
        return kinds[kinds.index("failed") :].count("heartbeat") if "failed" in kinds else 0

    await coordinator.until(lambda: beats_since() >= 3)  # the first one's answer was heard: it was delivered
    coordinator.session.hang_up()
    await coordinator.until(lambda: len(coordinator.sessions) >= 3)
    await coordinator.heard("ready")
    assert coordinator.count("failed") == 1


async def test_what_is_stored_nowhere_else_is_never_evicted_also_when_its_job_is_over(
    volunteer: Volunteer, coordinator: FakeCoordinator
) -> None:
    coordinator.refuse_blobs = agent_pb2.REFUSAL_NO_SPACE
    await volunteer.start(cache_bytes=0)
    volunteer.assign({"shard": "weights", "steps": 1})
    volunteer.plan(1, await coordinator.heard("ready"))
    digest = hashlib.sha256(b"weights").hexdigest()
    told = await coordinator.heard("cached", lambda cached: bytes.fromhex(digest) in cached.added)
    assert told.peer_port == volunteer.agent.status()["peer_port"] > 0
    coordinator.say(unassign=agent_pb2.Unassign(job_id="j1", reason="it is over"))
    await eventually(lambda: volunteer.agent and volunteer.agent.status()["job"] is None)
    assert volunteer.agent is not None
    await volunteer.agent.trim_cache()
    assert (volunteer.home.blobs / digest).exists()
    coordinator.refuse_blobs = 0
    await coordinator.until(lambda: coordinator.shards)
    await eventually(lambda: volunteer.agent and not volunteer.agent._reports.waiting)
    os.utime(volunteer.home.blobs / digest, (0, 0))
    await volunteer.agent.trim_cache()
    assert not (volunteer.home.blobs / digest).exists()
    told = await coordinator.heard("cached", lambda cached: bytes.fromhex(digest) in cached.removed)
    assert not told.whole


async def test_a_volunteer_who_says_no_lends_nothing_from_then_on(
    volunteer: Volunteer, coordinator: FakeCoordinator
) -> None:
    await volunteer.start()
    port = (await coordinator.heard("cached", lambda cached: cached.whole)).peer_port
    assert port > 0
    assert (await asyncio.to_thread(ask, volunteer.home, "keep"))["lends_cache"] is False
    await coordinator.heard("cached", lambda cached: cached.peer_port == 0)
    assert (await asyncio.to_thread(ask, volunteer.home, "lend"))["lends_cache"] is True
    await coordinator.heard("cached", lambda cached: cached.peer_port == port)
    await volunteer.stop()
    await volunteer.start(lending=Lending(allowed=False))
    assert (await coordinator.heard("cached", lambda cached: cached.whole)).peer_port == 0


async def test_shards_are_stored_and_reported_before_finished(
    volunteer: Volunteer, coordinator: FakeCoordinator
) -> None:
    await volunteer.start()
    coordinator.refuse_blobs = agent_pb2.REFUSAL_NO_SPACE
    volunteer.assign({"shard": "weights", "steps": 1})
    volunteer.plan(1, await coordinator.heard("ready"))
    await coordinator.heard("progress")
    assert coordinator.count("finished") == 0
    coordinator.refuse_blobs = 0
    await coordinator.heard("finished")
    (shard,) = coordinator.shards
    assert coordinator.blobs[shard.digest] == b"weights"
    assert (shard.count, shard.header_json) == (1, '{"step":0}')


async def test_workers_are_told_their_weights_and_the_coordinator_how_fast_they_were_stored(
    volunteer: Volunteer, coordinator: FakeCoordinator
) -> None:
    await volunteer.start()
    volunteer.assign({"shard": "w" * (2 << 20), "steps": 1})
    members = [member("a1", 0), member("a2", 1, 2), member("a3", 3)]
    members[2].group_rank = 2
    for one, weight in zip(members, (100, 31, 1000), strict=True):
        one.upload_weight = weight
    volunteer.plan(1, await coordinator.heard("ready"), members=members)
    await coordinator.heard("finished")
    assert coordinator.sessions[0].hello.weighs_uploads
    assert volunteer.told("plan")[0]["upload_weights"] == [100, 15, 15, 1000]
    (shard,) = coordinator.shards
    assert shard.upload_bytes_per_s > 0


async def test_without_everybodys_weight_parts_are_equal(
    volunteer: Volunteer, coordinator: FakeCoordinator
) -> None:
    await volunteer.start()
    volunteer.assign()
    members = [member("a1", 0), member("a2", 1)]
    members[0].upload_weight = 100
    volunteer.plan(1, await coordinator.heard("ready"), members=members)
    await coordinator.heard("formed")
    assert volunteer.told("plan")[0]["upload_weights"] == []


async def test_a_worker_without_a_shard_is_heard_though_nothing_can_be_stored(
    volunteer: Volunteer, coordinator: FakeCoordinator
) -> None:
    await volunteer.start()
    coordinator.refuse_blobs = agent_pb2.REFUSAL_NO_SPACE
    volunteer.assign({"vouch": True, "steps": 1})
    volunteer.plan(1, await coordinator.heard("ready"))
    await coordinator.heard("finished")
    (word,) = coordinator.shards
    assert (word.digest, word.bytes, word.state_digest, word.count) == ("", 0, "ab", 1)
    assert coordinator.blobs == {}


async def test_drain_asks_the_coordinator_leaves_after_the_cut_and_says_goodbye(
    volunteer: Volunteer, coordinator: FakeCoordinator
) -> None:
    await volunteer.start()
    volunteer.assign()
    volunteer.plan(1, await coordinator.heard("ready"))
    await coordinator.heard("formed")
    ready = await coordinator.heard("ready")
    (plan,) = volunteer.told("plan")
    assert volunteer.agent is not None
    assert volunteer.task is not None
    volunteer.agent.drain("its owner wants the machine")
    leaving = await coordinator.heard("leaving")
    assert "owner" in leaving.reason
    volunteer.plan(2, ready, members=[member("a2", 0)], cut=agent_pb2.CUT_AFTER_STEP)
    await coordinator.heard("released")
    coordinator.say(unassign=agent_pb2.Unassign(job_id="j1", reason="drained"))
    await coordinator.heard("goodbye")
    await asyncio.wait_for(volunteer.task, 10)
    assert not alive(plan["pid"])


async def test_drain_of_an_idle_agent_is_a_goodbye(
    volunteer: Volunteer, coordinator: FakeCoordinator
) -> None:
    await volunteer.start()
    assert volunteer.agent is not None
    assert volunteer.task is not None
    volunteer.agent.drain("over")
    await coordinator.heard("goodbye")
    await asyncio.wait_for(volunteer.task, 10)


async def test_drain_without_a_coordinator_ends_after_the_grace(
    volunteer: Volunteer, coordinator: FakeCoordinator
) -> None:
    await volunteer.start(drain_grace_s=0.3)
    volunteer.assign()
    await coordinator.heard("ready")
    await coordinator.stop()
    assert volunteer.agent is not None
    assert volunteer.task is not None
    volunteer.agent.drain("over")
    await asyncio.wait_for(volunteer.task, 15)


async def test_second_agent_with_one_identity_is_told_so_and_gives_up(
    volunteer: Volunteer, coordinator: FakeCoordinator
) -> None:
    await volunteer.start()
    coordinator.say(
        go_away=agent_pb2.GoAway(
            reason=agent_pb2.REFUSAL_DUPLICATE_IDENTITY, message="another process has this identity"
        )
    )
    assert volunteer.task is not None
    with pytest.raises(
        RefusedByCoordinator, match=r"another process has this identity.*DUPLICATE_IDENTITY"
    ) as caught:
        await asyncio.wait_for(volunteer.task, 10)
    assert caught.value.exit_code == 4


async def test_go_away_with_retry_is_followed_by_a_return(
    volunteer: Volunteer, coordinator: FakeCoordinator
) -> None:
    await volunteer.start()
    coordinator.say(go_away=agent_pb2.GoAway(message="the coordinator is stopping", retry=True))
    await coordinator.until(lambda: len(coordinator.sessions) == 2)
    assert coordinator.sessions[0].hello.incarnation == coordinator.sessions[1].hello.incarnation


async def test_session_in_which_nothing_is_heard_for_a_lease_is_given_up(
    volunteer: Volunteer, coordinator: FakeCoordinator
) -> None:
    coordinator.answer_heartbeats = False
    await volunteer.start()
    await coordinator.until(lambda: len(coordinator.sessions) == 2)


async def test_certificate_is_renewed_without_dropping_the_session(
    volunteer: Volunteer, coordinator: FakeCoordinator
) -> None:
    from datetime import timedelta

    from agent.daemon import Agent, Settings
    from protos.wire import Identity
    from tests.agent.conftest import WORKER

    identity = coordinator.authority.identity("a1", coordinator.address, timedelta(seconds=6))
    identity.save(volunteer.home.identity)
    volunteer.agent = Agent(volunteer.home, identity, Settings(worker_command=WORKER, gpus=()))
    volunteer.task = asyncio.create_task(volunteer.agent.run())
    await coordinator.until(lambda: coordinator.renewed and coordinator.sessions)
    await eventually(
        lambda: Identity.load(volunteer.home.identity).certificate_pem != identity.certificate_pem
    )
    assert Identity.load(volunteer.home.identity).key_pem != identity.key_pem
    await coordinator.heard("heartbeat", lambda beat: beat.sequence > 5)
    assert len(coordinator.sessions) == 1


def entries(folder: str) -> int:
    """How many file descriptors or threads this process has."""
    return sum(1 for _ in Path("/proc/self", folder).iterdir())


async def test_many_generations_leak_neither_descriptors_nor_threads(
    volunteer: Volunteer, coordinator: FakeCoordinator
) -> None:
    await volunteer.start()
    volunteer.assign()
    held: list[tuple[int, ...]] = []
    for generation in range(1, 61):
        ready = await coordinator.heard("ready")
        cut = agent_pb2.CUT_AFTER_STEP if generation % 3 else agent_pb2.CUT_ABORT
        volunteer.plan(generation, ready, cut=cut)
        await coordinator.heard("formed", lambda formed, wanted=generation: formed.generation == wanted)
        if generation % 20 == 5:
            await coordinator.heard("ready")
            os.kill(volunteer.told("plan")[-1]["pid"], signal.SIGKILL)
            await coordinator.heard("failed")
        held.append((entries("fd"), entries("task")))
    descriptors, threads = zip(*held, strict=True)
    assert max(descriptors[30:]) <= max(descriptors[:30]) + 2, descriptors
    assert max(threads[30:]) <= max(threads[:30]) + 1, threads
