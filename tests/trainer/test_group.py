"""Groups of two ranks in one process, over real gloo; the collective timeout is ten minutes throughout."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
from torch._C._distributed_c10d import TCPStore

from trainer.group import Bell, CollectiveFailed, Graveyard, Group, Interrupted, form
from trainer.links import silent_peers

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


def new_store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))


def join(
    store: TCPStore,
    rank: int,
    world_size: int = 2,
    *,
    bell: Bell | None = None,
    superseded: Callable[[], bool] = lambda: False,
    timeout_s: float = 30.0,
) -> Group:
    return form(
        generation=1,
        rank=rank,
        world_size=world_size,
        store_host="127.0.0.1",
        store_port=store.port,
        device=CPU,
        bell=bell or Bell(),
        superseded=superseded,
        timeout_s=timeout_s,
        collective_timeout_s=600.0,
    )


@pytest.fixture
def pair() -> Iterator[tuple[Group, Group]]:
    store = new_store()
    with ThreadPoolExecutor(2) as pool:
        mine, peer = pool.map(lambda rank: join(store, rank), range(2))
    yield mine, peer
    mine.abort()
    peer.free()  # which ends what `mine` still waits for
    with mine._bell:
        assert mine._bell.wait_for(lambda: mine.idle, timeout=30)
    mine.free()


def test_sums_broadcasts_and_rows_reach_both_ranks(pair: tuple[Group, Group]) -> None:
    def work(group: Group) -> tuple[list[float], list[float], list[list[int]], list[float]]:
        total = torch.full((3,), float(group.rank + 1))
        group.all_reduce(total)
        sent = torch.full((2,), float(group.rank))
        group.broadcast(sent, 1)
        rows = group.exchange([group.rank, -(2**63), 2**63 - 1])
        later = group.all_reduce_later(torch.ones(2)).wait()
        return total.tolist(), sent.tolist(), rows, later.tolist()

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(work, pair))
    rows = [[0, -(2**63), 2**63 - 1], [1, -(2**63), 2**63 - 1]]
    assert results == [([3.0] * 3, [1.0] * 2, rows, [2.0] * 2)] * 2


def test_an_abort_ends_a_wait_that_gloo_would_not_end(pair: tuple[Group, Group]) -> None:
    mine, _silent = pair
    started = threading.Event()

    def wait() -> None:
        started.set()
        mine.all_reduce(torch.ones(1))

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(wait)
        started.wait()
        mine.abort()
        with pytest.raises(Interrupted):
            waiting.result(30)


def test_an_abort_fails_the_gradients_that_are_on_their_way(pair: tuple[Group, Group]) -> None:
    mine, _silent = pair
    future = mine.all_reduce_later(torch.ones(1))
    mine.abort()
    with pytest.raises(RuntimeError, match="superseded"):
        future.wait()
    with pytest.raises(RuntimeError, match="superseded"):
        mine.all_reduce_later(torch.ones(1)).wait()
    with pytest.raises(Interrupted):
        mine.all_reduce(torch.ones(1))
    assert mine.failure is None


def test_a_buried_group_is_freed_when_its_collectives_have_ended_and_its_peer_notices(
    pair: tuple[Group, Group],
) -> None:
    mine, peer = pair
    graveyard = Graveyard()
    late = mine.all_reduce_later(torch.ones(1))
    graveyard.bury(mine)
    graveyard.sweep()
    assert len(graveyard) == 1, "a collective still waits for the peer"
    with pytest.raises(RuntimeError, match="superseded"):
        late.wait()
    peer.all_reduce_later(torch.ones(1)).wait()  # the straggler comes after all
    with mine._bell:
        assert mine._bell.wait_for(lambda: mine.idle, timeout=30)
    graveyard.sweep()
    assert len(graveyard) == 0
    with pytest.raises(CollectiveFailed):
        peer.all_reduce(torch.ones(1))


def test_forming_without_the_peer_ends_when_a_newer_plan_comes() -> None:
    bell = Bell()
    newer = False
    with ThreadPoolExecutor(1) as pool:
        forming = pool.submit(join, new_store(), 0, bell=bell, superseded=lambda: newer)
        with bell:
            newer = True
            bell.notify_all()
        with pytest.raises(Interrupted):
            forming.result(30)


def test_forming_without_the_peer_fails_in_time_and_names_it() -> None:
    with pytest.raises(CollectiveFailed, match="generation 1") as failed:
        join(new_store(), 0, timeout_s=0.5)
    assert failed.value.unreachable == (1,)


def test_without_the_store_it_is_the_leader_that_cannot_be_reached() -> None:
    store = new_store()
    port = store.port
    del store
    with pytest.raises(CollectiveFailed, match="unreachable: rank 0") as failed:
        form(
            generation=1,
            rank=1,
            world_size=3,
            store_host="127.0.0.1",
            store_port=port,
            device=CPU,
            bell=Bell(),
            superseded=lambda: False,
            timeout_s=0.5,
            collective_timeout_s=600.0,
        )
    assert failed.value.unreachable == (0,)


def test_giving_up_ends_every_wait_as_a_failed_collective(pair: tuple[Group, Group]) -> None:
    mine, _silent = pair
    future = mine.all_reduce_later(torch.ones(1))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(mine.all_reduce, torch.ones(1))
        mine.give_up("nothing reaches 10.0.0.3")
        with pytest.raises(CollectiveFailed, match=r"10\.0\.0\.3"):
            waiting.result(30)
    for late in (future, mine.all_reduce_later(torch.ones(1))):
        with pytest.raises(RuntimeError, match=r"10\.0\.0\.3"):
            late.wait()
    assert mine.failure == "nothing reaches 10.0.0.3"


def test_a_peer_that_reads_nothing_is_not_silent() -> None:
    """Its machine answers: it may be computing, or frozen, which is for others to find out."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as sender,
        server.accept()[0],
    ):
        sender.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while sender.send(bytes(1 << 20)):
                pass
        assert silent_peers(0.0) == []


def test_a_world_of_one_needs_nobody() -> None:
    group = join(new_store(), 0, 1)
    tensor = torch.ones(2)
    group.all_reduce(tensor)
    group.broadcast(tensor, 0)
    assert tensor.tolist() == [1.0, 1.0]
    assert group.all_reduce_later(tensor).wait() is tensor
    assert group.exchange([4, 5]) == [[4, 5]]
