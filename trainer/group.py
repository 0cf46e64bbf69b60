"""One generation's process group: made without global state, and left at once when it is superseded.

torch's default group is not used: forming may block on a dead or frozen peer, so it happens on a thread
that can be abandoned, and several generations' groups exist side by side.

Gloo cannot be aborted (a blocked all-reduce stays blocked), so nobody here ever waits for gloo itself:
waiting means waiting on the worker's bell for "done or superseded".  What a superseded collective may
still write into must therefore never be live memory: callers hand over buffers that they do not use
again.  NCCL is aborted, which ends the kernels that the main thread waits for.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import cache

import torch
from torch import Tensor
from torch import distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore
from torch.futures import Future

from trainer import links, star

_POLL_S = 1e-4
"""How often the device is asked whether a collective has ended."""
_BROKEN_S = 0.05
"""An ended collective that the device has not passed after this long has not ended but failed.  Where
several ranks share one card, a rank may be off it for some milliseconds."""

Bell = threading.Condition
"""Rung whenever something happened that a waiting main thread may want to know."""


class Interrupted(Exception):
    """The generation was superseded while this thread was in it."""


class CollectiveFailed(Exception):
    """A collective, or the forming of a group, failed: some peer is gone or unreachable.

    `unreachable`: ranks that did not come to the generation's store while the group formed."""

    def __init__(self, detail: str, unreachable: tuple[int, ...] = ()) -> None:
        super().__init__(detail)
        self.unreachable = unreachable


@cache
def _gloo_device() -> dist.ProcessGroupGloo.Device:
    """One event loop (a thread and its descriptors) for all generations of this process."""
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if interface:
        return dist.ProcessGroupGloo.create_device(interface=interface)
    return dist.ProcessGroupGloo.create_default_device()


def _make(
    store: Store, rank: int, world_size: int, device: torch.device, connect_s: float, collective_s: float
) -> dist.ProcessGroup:
    group = dist.ProcessGroup(store, rank, world_size)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=collective_s)
        nccl = dist.ProcessGroupNCCL(store, rank, world_size, options)
        nccl._set_sequence_number_for_group()
        group._set_default_backend(dist.ProcessGroup.BackendType.NCCL)
        group._register_backend(torch.device("cuda"), dist.ProcessGroup.BackendType.NCCL, nccl)
        group.bound_device_id = device
        nccl.eager_connect_single_device(device)
        return group
    gloo_options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    gloo_options._devices = [_gloo_device()]
    gloo_options._threads = 2
    gloo_options._timeout = timedelta(seconds=connect_s)
    gloo = dist.ProcessGroupGloo(store, rank, world_size, gloo_options)
    gloo._set_sequence_number_for_group()
    gloo._set_default_timeout(timedelta(seconds=collective_s))
    group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
    group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)
    return group


def solo_process_group(device: torch.device) -> dist.ProcessGroup:
    """A real group of one, for DDP to be constructed on."""
    return _make(HashStore(), 0, 1, device, 30.0, 600.0)


class _Waits:
    """What gloo's threads touch when a collective ends.

    Apart from the group, because a callback must not hold the last reference to it: a group that is freed
    on one of its own threads joins itself, which ends the process.
    """

    def __init__(self, bell: Bell) -> None:
        self.bell = bell
        self.unfinished = 0
        self.promises: set[Future[Tensor | Exception]] = set()
        self.failure: str | None = None

    def finished_one(self, _: Future[list[Tensor]]) -> None:
        with self.bell:
            self.unfinished -= 1
            self.bell.notify_all()

    def keep(self, promise: Future[Tensor | Exception], value: Tensor | Exception) -> None:
        """Settle a promise once; who comes second is ignored."""
        with self.bell:
            if promise not in self.promises:
                return
            self.promises.remove(promise)
            if isinstance(value, CollectiveFailed):
                self.failure = self.failure or str(value)
        promise.set_result(value)


class Group:
    """The group of one generation.  A world of one has no process group and its collectives return at once.

    Tensors handed to a collective belong to it from then on if it does not return normally.
    """

    def __init__(
        self,
        *,
        generation: int,
        rank: int,
        world_size: int,
        device: torch.device,
        bell: Bell,
        process_group: dist.ProcessGroup | None,
        small: star.Star | None = None,
        older: frozenset[str] = frozenset(),
    ) -> None:
        """`small`: on the CPU, for sums of a few numbers.  `older`: connections that were there before, of groups that may still wait for a peer that is gone."""
        self.generation = generation
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self.aborted = False
        self.broken: CollectiveFailed | None = None
        self._older = older
        self._bell = bell
        self._waits = _Waits(bell)
        self._process_group = process_group
        self._small = small
        self._newest: dist.Work | None = None  # on CUDA: what `settle` waits for
        self._aborting: threading.Thread | None = None

    @property
    def failure(self) -> str | None:
        """Why a gradient's all-reduce failed, when one did."""
        return self._waits.failure or (str(self.broken) if self.broken is not None else None)

    # -------------------------------------------------------------------------- collectives

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum `tensor`, a few numbers, over the ranks, in place; on return the result is there.

        Raise Interrupted if the generation was superseded first, CollectiveFailed if it broke.
        """
        if self._small is not None:
            self._go_on()
            try:
                self._small.sum(tensor)
            except star.Left:
                self._go_on()
                raise AssertionError("left without a reason") from None
            except ConnectionError as error:
                raise CollectiveFailed(_first_line(error)) from error
            return
        self._run(lambda group: group.allreduce([tensor]))
        self.settle()

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Copy `tensor` from rank `source` to all, in place.  On CUDA call `settle` before trusting it."""
        options = dist.BroadcastOptions()
        options.rootRank = source
        options.rootTensor = 0
        self._run(lambda group: group.broadcast([tensor], options))

    def settle(self) -> None:
        """Wait until the device has done what was asked.

        Raise Interrupted after an abort, whose results are worthless, CollectiveFailed if NCCL says that
        the communicator broke: its kernels then never end by themselves, and whoever synchronized with
        them would not hear of it.
        """
        work, self._newest = self._newest, None
        if work is None:
            return
        passed = torch.cuda.Event()  # type: ignore[no-untyped-call]
        passed.record(torch.cuda.current_stream(self.device))
        ended_at = math.inf
        while not passed.query() and self._over() is None:  # type: ignore[no-untyped-call]
            # Besides asking for the end of the kernel this asks NCCL for errors, and counts them as an end.
            if ended_at == math.inf and work.is_completed():
                ended_at = time.monotonic()
            if time.monotonic() - ended_at > _BROKEN_S:
                raise CollectiveFailed("NCCL: the connection to a peer broke")
            time.sleep(_POLL_S)
        if self._over() is not None:
            torch.cuda.current_stream(self.device).synchronize()  # the abort ends its kernels
            self._go_on()

    def exchange(self, row: list[int]) -> list[list[int]]:
        """Every rank's row of int64 numbers, in rank order.  All rows have one length."""
        table = torch.zeros(self.world_size, len(row), dtype=torch.int64)
        table[self.rank] = torch.tensor(row, dtype=torch.int64)
        table = table.to(self.device)
        self.all_reduce(table)
        rows: list[list[int]] = table.tolist()
        return rows

    def all_reduce_later(self, tensor: Tensor) -> Future[Tensor]:
        """Sum `tensor` over the ranks; the result comes as a Future, which fails when the generation ends."""
        if self._process_group is None:
            return ready(tensor)
        waits = self._waits
        promise: Future[Tensor | Exception] = Future()
        result: Future[Tensor] = promise.then(_kept)
        with self._bell:
            waits.promises.add(promise)
            over = self._over()
        if over is not None:
            waits.keep(promise, over)
            return result
        try:
            future = self._start(lambda group: group.allreduce([tensor]))
        except CollectiveFailed as error:
            waits.keep(promise, error)
            return result
        if self.device.type == "cuda":  # the abort ends the kernel itself; the stream carries the order
            waits.promises.discard(promise)
            return future.then(lambda done: done.value()[0])

        def deliver(done: Future[list[Tensor]]) -> None:
            try:
                done.value()
            except RuntimeError as error:
                waits.keep(promise, CollectiveFailed(_first_line(error)))
            else:
                waits.keep(promise, tensor)

        future.add_done_callback(deliver)
        return result

    def _over(self) -> Interrupted | CollectiveFailed | None:
        """Why nothing is waited for in this group any more, if so."""
        if self.aborted:
            return Interrupted(f"generation {self.generation} was superseded")
        return self.broken

    def _go_on(self) -> None:
        if (over := self._over()) is not None:
            raise over

    def _run(self, start: Callable[[dist.ProcessGroup], dist.Work]) -> None:
        if self._process_group is None:
            return
        self._go_on()
        future = self._start(start)
        if self.device.type == "cuda":
            future.wait()  # orders the streams; the host does not wait
            return
        with self._bell:
            self._bell.wait_for(lambda: future.done() or self._over() is not None)
        if not future.done():
            self._go_on()
        try:
            future.value()
        except RuntimeError as error:
            raise CollectiveFailed(_first_line(error)) from error

    def _start(self, start: Callable[[dist.ProcessGroup], dist.Work]) -> Future[list[Tensor]]:
        assert self._process_group is not None
        try:
            work = start(self._process_group)
            future: Future[list[Tensor]] = work.get_future()
        except RuntimeError as error:
            raise CollectiveFailed(_first_line(error)) from error
        if self.device.type == "cpu":
            with self._bell:
                self._waits.unfinished += 1
            future.add_done_callback(self._waits.finished_one)
        else:
            self._newest = work
        return future

    # --------------------------------------------------------------------------------- the end

    def abort(self) -> None:
        """End every wait in this group, from any thread.  The step in flight is lost."""
        with self._bell:
            if self.aborted:
                return
            self.aborted = True
            waits = self._waits
            promises = list(waits.promises)
            self._bell.notify_all()
        for promise in promises:
            waits.keep(promise, Interrupted(f"generation {self.generation} was superseded"))
        self._end_waits()

    def silent_peers(self, seconds: float) -> list[str]:
        """Addresses of peers whose machines have acknowledged nothing for so long."""
        return links.silent_peers(seconds, self._older)

    def give_up(self, detail: str) -> None:
        """End every wait in this group as if its collectives had failed, from any thread."""
        error = CollectiveFailed(detail)
        with self._bell:
            if self.aborted or self.broken is not None:
                return
            self.broken = error
            waits = self._waits
            promises = list(waits.promises)
            self._bell.notify_all()
        for promise in promises:
            waits.keep(promise, error)
        self._end_waits()

    def _end_waits(self) -> None:
        if self._small is not None:
            self._small.leave()
        if self.device.type == "cuda" and self._process_group is not None and self._aborting is None:
            # On a thread: the kernels end at once, but the call takes half a second, and the caller may be
            # the listener, whom the next plan is waiting for.
            self._aborting = threading.Thread(target=_abort, args=(self._process_group,), daemon=True)
            self._aborting.start()

    def hang_up(self) -> None:
        """Let peers that wait for this rank's numbers know that none will come."""
        if self._small is not None:
            self._small.close()

    @property
    def idle(self) -> bool:
        """Whether no collective is unfinished, so that freeing the group joins no busy thread."""
        return self._waits.unfinished == 0

    def free(self) -> None:
        """Close the connections.  Peers that still wait for this rank see their collectives fail."""
        if self._aborting is not None:
            self._aborting.join()
        self.hang_up()
        self._process_group = None


def _abort(process_group: dist.ProcessGroup) -> None:
    with contextlib.suppress(RuntimeError):  # a communicator that is already broken
        process_group.abort()


def ready(tensor: Tensor) -> Future[Tensor]:
    """A Future that is there already."""
    future: Future[Tensor] = Future()
    future.set_result(tensor)
    return future


def _kept(promise: Future[Tensor | Exception]) -> Tensor:
    value = promise.value()
    if isinstance(value, Exception):
        raise value
    return value


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:500]


class Graveyard:
    """Superseded groups.  On gloo one is freed once all its collectives have ended, which may be never:
    freeing joins the group's threads, and those may wait for a frozen peer.
    """

    def __init__(self) -> None:
        self._groups: list[Group] = []

    def bury(self, group: Group) -> None:
        """Take a group that is out of use.  Nothing happens to it before `sweep`: after a planned cut a peer
        may still be receiving what this rank sent last."""
        self._groups.append(group)

    def sweep(self) -> None:
        """Abort what was buried and free what can be freed without waiting."""
        kept = []
        for group in self._groups:
            if group.device.type == "cuda":  # aborting takes half a second, and frees the kernels first
                threading.Thread(target=_dispose, args=(group,), daemon=True).start()
                continue
            group.abort()
            group.hang_up()
            if group.idle:
                group.free()
            else:
                kept.append(group)
        self._groups = kept

    def __len__(self) -> int:
        return len(self._groups)


def _dispose(group: Group) -> None:
    group.abort()
    group.free()


def form(
    *,
    generation: int,
    rank: int,
    world_size: int,
    store_host: str,
    store_port: int,
    device: torch.device,
    bell: Bell,
    superseded: Callable[[], bool],
    timeout_s: float,
    collective_timeout_s: float,
) -> Group:
    """Connect to the generation's peers.

    Raise Interrupted as soon as `superseded` says so (asked whenever the bell rings), CollectiveFailed if
    a peer cannot be reached within `timeout_s`: each rank signs the store's roll, and who has not is
    unreachable, or the leader if its store is.  An abandoned attempt goes on alone until its own timeout;
    what it makes is closed at once, so that peers who did connect notice.
    """

    def group(process_group: dist.ProcessGroup | None, small: star.Star | None = None) -> Group:
        return Group(
            generation=generation,
            rank=rank,
            world_size=world_size,
            device=device,
            bell=bell,
            process_group=process_group,
            small=small,
            older=older,
        )

    older = links.connections()
    if world_size == 1:
        return group(None)
    outcome: list[tuple[dist.ProcessGroup, star.Star | None] | Exception] = []
    abandoned = False
    roll_call_s = min(1.0, timeout_s / 8)
    connect_s = timeout_s - roll_call_s

    def connect() -> None:
        result: tuple[dist.ProcessGroup, star.Star | None] | Exception
        try:
            deadline = time.monotonic() + connect_s
            prefix = _store(store_host, store_port, generation, connect_s)
            prefix.append("roll", f"{rank} ")  # type: ignore[attr-defined]  # it has one

            def left_s() -> float:
                return max(0.1, deadline - time.monotonic())

            host = star.Host(prefix, store_host) if rank == 0 and device.type == "cpu" else None
            try:
                made = _make(prefix, rank, world_size, device, left_s(), collective_timeout_s)
                if host is not None:
                    result = made, host.admit(world_size, left_s())
                elif device.type == "cpu":
                    result = made, star.join(prefix, store_host, rank, left_s())
                else:
                    result = made, None
            finally:
                if host is not None:
                    host.close()
        except (RuntimeError, ValueError, OSError) as error:  # torch's DistError is a RuntimeError
            result = CollectiveFailed(_first_line(error))
        with bell:
            if not abandoned:
                outcome.append(result)
                bell.notify_all()
                return
        if not isinstance(result, Exception) and result[1] is not None:
            result[1].close()

    threading.Thread(target=connect, name=f"form-{generation}", daemon=True).start()
    with bell:
        # A little more than the attempt allows itself: its own message says more.
        bell.wait_for(lambda: bool(outcome) or superseded(), timeout=timeout_s)
        if not outcome:
            abandoned = True
    if not outcome and superseded():
        raise Interrupted(f"generation {generation} was superseded while it formed")
    result = outcome[0] if outcome else Exception(f"no answer from a peer within {timeout_s:g} s")
    if isinstance(result, Exception):
        absent = _absent(store_host, store_port, generation, rank, world_size, roll_call_s)
        missing = f"; unreachable: rank {', '.join(map(str, absent))}" if absent else ""
        raise CollectiveFailed(f"generation {generation}: {result}{missing}", absent)
    return group(*result)


def _store(host: str, port: int, generation: int, timeout_s: float) -> Store:
    store = TCPStore(
        host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s)
    )
    return PrefixStore(f"generation{generation}", store)


def _absent(
    host: str, port: int, generation: int, rank: int, world_size: int, timeout_s: float
) -> tuple[int, ...]:
    """Who has not signed the roll; rank 0, if its store does not answer."""
    try:
        # Over a connection of its own: the attempt may still be waiting on the other.
        store = _store(host, port, generation, timeout_s)
        here = {int(other) for other in store.get("roll").split()}
        return tuple(other for other in range(world_size) if other not in here)
    except RuntimeError:
        return (0,) if rank else ()
