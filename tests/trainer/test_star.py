"""Sums round rank 0, over real sockets: what completes where, and who is let in."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
from torch._C._distributed_c10d import TCPStore

from trainer import star
from trainer.star import Host, Left, Star

WORLD = 3


@pytest.fixture
def store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(WORLD) as pool:
        yield pool


@pytest.fixture
def stars(store: TCPStore, pool: ThreadPoolExecutor) -> Iterator[list[Star]]:
    host = Host(store, "127.0.0.1")
    others = [pool.submit(star.join, store, "127.0.0.1", rank, 30.0) for rank in (2, 1)]
    made = [host.admit(WORLD, 30.0), *(other.result(30) for other in reversed(others))]
    yield made
    for one in made:
        one.leave()
        one.close()


def summed(pool: ThreadPoolExecutor, one: Star, *numbers: float) -> Future[list[float]]:
    def work() -> list[float]:
        tensor = torch.tensor(numbers, dtype=torch.float64)
        one.sum(tensor)
        result: list[float] = tensor.tolist()
        return result

    return pool.submit(work)


def test_everybody_gets_the_sum_of_everybodys_numbers(stars: list[Star], pool: ThreadPoolExecutor) -> None:
    for number in range(3):
        futures = [summed(pool, one, rank, 10.0**rank + number) for rank, one in enumerate(stars)]
        assert [future.result(30) for future in futures] == [[3.0, 111.0 + 3 * number]] * WORLD


def test_sums_are_added_in_the_order_of_the_ranks(stars: list[Star], pool: ThreadPoolExecutor) -> None:
    numbers = (1e16, 1.0, -1e16)
    futures = [summed(pool, one, numbers[rank]) for rank, one in enumerate(stars)]
    assert [future.result(30) for future in futures] == [[(1e16 + 1.0) - 1e16]] * WORLD


def test_more_than_a_socket_holds_at_once(stars: list[Star]) -> None:
    rows = [torch.full((2_000_000,), rank, dtype=torch.int64) for rank in range(WORLD)]
    with ThreadPoolExecutor(WORLD) as pool:
        list(pool.map(lambda pair: pair[0].sum(pair[1]), zip(stars, rows, strict=True)))
    assert all(bool((row == 3).all()) for row in rows)


@pytest.mark.parametrize("rank", range(WORLD))
def test_leaving_ends_the_sum_that_waits_and_every_later_one(
    stars: list[Star], pool: ThreadPoolExecutor, rank: int
) -> None:
    waiting = summed(pool, stars[rank], 1.0)
    stars[rank].leave()
    with pytest.raises(Left):
        waiting.result(30)
    with pytest.raises(Left):
        stars[rank].sum(torch.ones(1))


@pytest.mark.parametrize("gone", range(WORLD))
def test_without_a_member_no_sum_completes(stars: list[Star], pool: ThreadPoolExecutor, gone: int) -> None:
    stars[gone].close()
    first = 1 if gone == 0 else 0
    with pytest.raises(ConnectionError):
        summed(pool, stars[first], 1.0).result(30)
    stars[first].close()  # as a member does that leaves a broken generation
    other = ({0, 1, 2} - {gone, first}).pop()
    with pytest.raises(ConnectionError):
        summed(pool, stars[other], 1.0).result(30)


def test_rank_0_is_done_when_all_were_heard_though_one_hears_no_answer(
    stars: list[Star], pool: ThreadPoolExecutor
) -> None:
    stars[1]._peers[0].sendall(star._HEADER.pack(1, 8) + torch.ones(1, dtype=torch.float64).numpy().tobytes())
    stars[1].close()
    two, zero = summed(pool, stars[2], 5.0), summed(pool, stars[0], 7.0)
    assert zero.result(30) == two.result(30) == [13.0]


def test_ranks_that_sum_different_things_are_told(stars: list[Star], pool: ThreadPoolExecutor) -> None:
    for rank in (1, 2):
        summed(pool, stars[rank], *[1.0] * rank)
    with pytest.raises(ConnectionError, match="rank 2 sums 16 bytes as sum 1; this rank 8 bytes"):
        stars[0].sum(torch.ones(1, dtype=torch.float64))


def test_strangers_are_not_let_in_and_keep_nobody_out(store: TCPStore, pool: ThreadPoolExecutor) -> None:
    host = Host(store, "127.0.0.1")
    _, port, nonce = store.get("star").decode().split(" ")
    here = ("127.0.0.1", int(port))
    silent = [socket.create_connection(here) for _ in range(40)]
    liar = socket.create_connection(here)
    liar.sendall(star._HELLO.pack(bytes(16), 1))
    for rank in (0, WORLD):  # no such rank to be had
        with socket.create_connection(here) as odd:
            odd.sendall(star._HELLO.pack(bytes.fromhex(nonce), rank))
    admitted = pool.submit(host.admit, WORLD, 30.0)
    others = [star.join(store, "127.0.0.1", rank, 30.0) for rank in (1, 2)]
    stars = [admitted.result(30), *others]
    futures = [summed(pool, one, 1.0) for one in stars]
    assert [future.result(30) for future in futures] == [[3.0]] * WORLD
    assert liar.recv(1) == b""
    for stranger in (*silent, liar):
        stranger.close()
    for one in stars:
        one.close()


def test_who_does_not_come_is_named(store: TCPStore) -> None:
    host = Host(store, "127.0.0.1")
    there = star.join(store, "127.0.0.1", 2, 30.0)
    with pytest.raises(TimeoutError, match=r"rank 1, 3 did not connect"):
        host.admit(4, 0.2)
    with pytest.raises(ConnectionError):
        there.sum(torch.ones(1))
    there.close()


def test_leaving_what_is_closed_is_nothing(stars: list[Star]) -> None:
    stars[0].close()
    threads = [threading.Thread(target=stars[0].leave) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stars[0].close()


def test_rank_0_is_found_where_the_store_is_and_elsewhere_under_its_own_address() -> None:
    assert star._address("127.0.0.1") == ""
    assert star._address("localhost") == ""
