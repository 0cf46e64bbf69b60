"""Agents in network namespaces of their own: links are cut without anybody being told, and made slow.

One fleet serves all tests: each begins with three agents that train together, and puts the links right.
`make chaos` also runs those that are marked long."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest

from bench.churn import largest_error, undisturbed_losses
from bench.fleets.fleet import REPOSITORY
from tests.chaos.network import Network, unavailable
from tests.chaos.run import LOSS_TOLERANCE, job_of, prepare
from tests.e2e.fleet import Fleet
from tests.e2e.oracle import check_exactly_once, check_slices

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

AGENTS = ("a", "b", "c")


@dataclass(kw_only=True)
class Wired:
    """Three agents and a coordinator, each on its own machine of a network."""

    network: Network
    fleet: Fleet
    job: str
    config: dict[str, Any]
    dataset: Path

    def together(self, after: int = 0) -> int:
        """Wait until all three train together in a generation greater than `after`."""
        return self.fleet.wait_generation(self.job, members=len(AGENTS), after=after)

    def members(self) -> list[str]:
        """Names of the newest generation's members, by rank."""
        return [member["name"] for member in self.fleet.job(self.job)["generation"]["members"]]

    def train(self, steps: int) -> None:
        """Wait for so many more committed steps."""
        self.fleet.wait_step(self.job, self.fleet.job(self.job)["committed_step"] + steps)

    def workers(self) -> dict[str, list[int]]:
        return {name: self.fleet.agents[name].workers() for name in AGENTS}

    def without(self, name: str, after: int) -> int:
        """Wait until the others train without `name`; then nobody of them may have lost its worker."""
        before = self.workers()
        number = self.fleet.wait_generation(self.job, members=len(AGENTS) - 1, after=after)
        assert name not in self.members()
        self.train(10)
        for other in self.members():
            assert self.workers()[other] == before[other], f"{other} lost its worker"
        return number


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    if reason := unavailable():
        pytest.skip(reason)
    with Network(("coordinator", *AGENTS)) as made:
        yield made


@pytest.fixture(scope="module")
def wired(tmp_path_factory: pytest.TempPathFactory, network: Network) -> Iterator[Wired]:
    dataset = prepare(tmp_path_factory.mktemp("data") / "dataset")
    root = tmp_path_factory.mktemp("n")
    assert len(os.fsencode(root)) < 80, "Unix socket paths are bounded"
    config = job_of(dataset, 3, len(AGENTS))
    config["elastic"]["min_nodes"] = 2
    config["train"]["step_delay_ms"] = 150
    fleet = Fleet(
        root=root,
        lease="2s",
        timing={"quarantine_base": "1s", "quarantine_max": "1s", "forgive": "5s"},
        host=network.address("coordinator"),
        inside=network.inside("coordinator"),
    )
    with fleet:
        job = fleet.submit(config)
        for name in AGENTS:
            fleet.start_agent(name, inside=network.inside(name))
        yield Wired(network=network, fleet=fleet, job=job, config=config, dataset=dataset)


LISTEN = """
import socket
server = socket.create_server(("", 7000))
print("listening", flush=True)
connection, _ = server.accept()
while connection.recv(65536):
    pass
"""
SEND = """
import socket, sys
from trainer.links import connections, silent_peers
older = connections()
connection = socket.create_connection((sys.argv[1], 7000))
print("connected", flush=True)
for line in sys.stdin:
    connection.send(bytes(1000))
    while not (silent := silent_peers(1.0, older)):
        pass
    print(*silent, silent_peers(1.0, connections()), flush=True)
"""


def test_a_connection_over_a_link_that_was_cut_is_found_to_be_silent(network: Network) -> None:
    with contextlib.ExitStack() as stack:

        def python(name: str, *arguments: str) -> tuple[IO[str], IO[str]]:
            process = subprocess.Popen(
                [*network.inside(name), sys.executable, "-c", *arguments],
                cwd=REPOSITORY,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            assert process.stdin is not None
            assert process.stdout is not None
            return process.stdin, process.stdout

        stack.callback(network.heal)
        _, listening = python("a", LISTEN)
        assert listening.readline() == "listening\n"
        go, sending = python("b", SEND, network.address("a"))
        assert sending.readline() == "connected\n"
        network.cut("a", "b")  # what is sent arrives; that it did is never heard
        go.write("go\n")
        go.flush()
        assert sending.readline() == f"{network.address('a')} []\n"


@pytest.mark.long
def test_an_agent_that_nothing_reaches_is_left_behind_and_comes_back(wired: Wired) -> None:
    first = wired.together()
    lost = wired.members()[-1]
    wired.network.part(lost, *({"coordinator", *AGENTS} - {lost}))
    second = wired.without(lost, after=first)
    wired.network.heal()
    wired.together(after=second)


@pytest.mark.parametrize(
    "deaf", [pytest.param(True, id="deaf"), pytest.param(False, id="mute", marks=pytest.mark.long)]
)
def test_a_link_that_is_cut_in_one_direction_is_as_good_as_none(wired: Wired, deaf: bool) -> None:
    first = wired.together()
    lost = wired.members()[-1]
    for other in sorted({"coordinator", *AGENTS} - {lost}):
        wired.network.cut(*((other, lost) if deaf else (lost, other)))
    second = wired.without(lost, after=first)
    wired.network.heal()
    wired.together(after=second)


def test_training_goes_on_when_an_agent_cannot_reach_the_coordinator(wired: Wired) -> None:
    first = wired.together()
    lost = wired.members()[-1]
    wired.network.part(lost, "coordinator")
    second = wired.without(lost, after=first)
    wired.network.heal()
    wired.together(after=second)


@pytest.mark.parametrize("rank", [0, 2], ids=["leader", "junior"])
def test_an_agent_that_only_its_peers_cannot_reach_is_left_out(wired: Wired, rank: int) -> None:
    """Its session with the coordinator is as good as ever, and a collective would wait ten minutes."""
    first = wired.together()
    lost = wired.members()[rank]
    wired.network.part(lost, *({*AGENTS} - {lost}))
    second = wired.without(lost, after=first)
    wired.network.heal()
    wired.together(after=second)


@pytest.mark.long
def test_two_that_cannot_reach_each_other_do_not_stop_the_third(wired: Wired) -> None:
    first = wired.together()
    _, one, other = wired.members()
    wired.network.part(one, other)
    second = wired.fleet.wait_generation(wired.job, members=2, after=first)
    wired.train(10)
    wired.network.heal()
    wired.together(after=second)


def test_a_slow_link_trains_and_stores_checkpoints(wired: Wired) -> None:
    number = wired.together()
    for name in AGENTS:
        wired.network.shape(name, 20)
    newest = wired.fleet.job(wired.job)["newest_checkpoint_step"] or 0
    wired.fleet.wait_event(
        lambda kind, record: kind == "ManifestCommitted" and record["checkpoint"]["step"] > newest,
        "a checkpoint over slow links",
        job=wired.job,
    )
    wired.train(10)
    assert wired.fleet.job(wired.job)["generation"]["number"] == number, "nobody was given up for being slow"
    wired.network.heal()


def test_after_all_that_every_number_is_what_an_undisturbed_run_computes(wired: Wired) -> None:
    wired.together()
    fleet = wired.fleet
    fleet.muster("job", "stop", wired.job)
    view = fleet.wait_end(wired.job)
    assert view["phase"] == "COMPLETED", view
    assert view["failures"] == 0, view
    steps = fleet.steps(wired.job)
    check_exactly_once(steps, view["committed_step"])
    check_slices(steps, wired.config, wired.dataset)
    alone = undisturbed_losses(wired.config, fleet.park, fleet.root, len(steps))
    assert largest_error({step.step: step.loss for step in steps}, alone) <= LOSS_TOLERANCE
