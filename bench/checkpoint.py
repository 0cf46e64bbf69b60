"""What checkpoints cost: training's stall, the disk, the way back, the way to the coordinator.

    python -m bench.checkpoint [--json] [--state-mb N] [--repeats 3] [--only stall,durable,restore,upload,beside]

Without --state-mb the state is GPT-2 124M's with Adam, 1.5 GB.  What a figure is compared with is measured
in the same run, in turns with it.  --directory says which disk is meant (the current one).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from bench.fleets.fleet import REPOSITORY, free_port
from bench.processes import Park
from bench.recovery import chosen
from bench.report import Row, emit, progress
from bench.saving import Training
from trainer.checkpoint import CheckpointDirectory, Manifest, ShardFile, make_manifest

SECTIONS = ("stall", "durable", "restore", "upload", "beside")
AGENTS = 3
MIB = 2**20
GOAL_UPLOAD_MIB_PER_S = 300.0
GOAL_GROWTH_MIB = 64.0
GOAL_SHARE = 0.8
_BIN = Path(sys.executable).parent


class BenchError(Exception):
    """A measurement could not be made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is measured, and where."""

    state_mb: float | None
    repeats: int
    tokens: int
    directory: Path
    world: int = 2

    @contextlib.contextmanager
    def scratch(self, below: Path | None = None) -> Iterator[Path]:
        """An empty directory on the disk that is meant (or `below`), removed at the end."""
        with tempfile.TemporaryDirectory(prefix="mbench-", dir=below or self.directory) as path:
            yield Path(path)

    def training(self, directory: Path, saved: Callable[[ShardFile], None] = lambda _: None) -> Training:
        return Training(
            CheckpointDirectory(directory),
            state_mb=self.state_mb,
            tokens=self.tokens,
            device=torch.device("cpu"),
            saved=saved,
        )


# ------------------------------------------------------------------------------------------ stall


def stall(settings: Settings) -> list[Row]:
    """Ranks that train in step: how long a checkpoint holds them up, beside one memory copy of the state."""
    with settings.scratch() as home:
        (home / "logs").mkdir()
        with Park(home / "logs") as park:
            ranks = [_rank(settings, park, home, rank) for rank in range(settings.world)]
            for rank, process in enumerate(ranks):
                if process.wait(timeout=3600) != 0:
                    raise BenchError(f"rank {rank} failed:\n{park.log_tail(f'rank{rank}')}")
        found = [json.loads((home / f"rank{rank}.json").read_text()) for rank in range(settings.world)]
    copies = found[0]["copy_s"]
    case = f"snapshot, CPU, world {settings.world}, {_size(found[0]['state_bytes'])}"
    # A step waits for its slowest rank.
    held = [
        max(take + wait for take, wait in zip(takes, waits, strict=True))
        for takes, waits in zip(
            zip(*(of["take_s"] for of in found), strict=True),
            zip(*(of["wait_s"] for of in found), strict=True),
            strict=True,
        )
    ]
    quiet = statistics.median(found[0]["quiet_s"])
    rows = [
        Row.of(copies, case=case, system="memory copy", metric="copy_s", unit="s"),
        Row.of(
            held, case=case, system="muster", metric="stall_s", unit="s", goal=statistics.median(copies),
            note="take, and the wait before the next update; goal: one memory copy of the state",
        ),
        Row.of(found[0]["quiet_s"], case=case, system="muster", metric="step_s", unit="s"),
        Row.of(
            [100 * (lasted / quiet - 1) for lasted in found[0]["first_s"]],
            case=case, system="muster", metric="first_step_slower", unit="%",
            note="the step in which it is read and digested, by threads that share the training's cores",
        ),
    ]  # fmt: skip
    later = [100 * (lasted / quiet - 1) for lasted in found[0]["beside_s"]]
    if later:
        note = "steps while it is hashed and written"
        rows.append(
            Row.of(later, case=case, system="muster", metric="later_steps_slower", unit="%", note=note)
        )
    return rows


def _rank(settings: Settings, park: Park, home: Path, rank: int) -> subprocess.Popen[bytes]:
    arguments: dict[str, Any] = {
        "rank": rank,
        "world": settings.world,
        "directory": home,
        "tokens": settings.tokens,
        "checkpoints": settings.repeats,
        "quiet": 3,
    }
    if settings.state_mb is not None:
        arguments["state-mb"] = settings.state_mb
    return park.start(
        f"rank{rank}",
        [
            *(sys.executable, "-m", "bench.baselines.saving_rank"),
            *(f"--{name}={value}" for name, value in arguments.items()),
        ],
        {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "GLOO_SOCKET_IFNAME": "lo"},
    )


# ---------------------------------------------------------------------------------------- durable


def durable(settings: Settings) -> list[Row]:
    """Hashing and writing a checkpoint, in turns with dd of the same bytes."""
    ours: list[float] = []
    theirs: list[float] = []
    with settings.scratch() as home, settings.scratch(_memory()) as memory:
        training = settings.training(home / "cache")
        total = save(training, home / "cache")
        source = memory / "bytes"
        with source.open("wb") as file:
            for blob in sorted((home / "cache" / "blobs").iterdir()):
                file.write(blob.read_bytes())

        def dd() -> None:
            command = ["dd", f"if={source}", f"of={home / 'dd'}", "bs=16M", "conv=fsync"]
            subprocess.run(command, check=True, capture_output=True)

        for number in range(settings.repeats):
            # In turns, for a disk may be fast for a while and then slow.
            for system in ("dd", "muster") if number % 2 == 0 else ("muster", "dd"):
                (home / "dd").unlink(missing_ok=True)
                shutil.rmtree(home / "cache", ignore_errors=True)
                os.sync()
                begun = time.perf_counter()
                if system == "dd":
                    dd()
                    theirs.append(time.perf_counter() - begun)
                else:
                    save(training, home / "cache")
                    ours.append(time.perf_counter() - begun)
            progress(f"  {number + 1}/{settings.repeats}: {ours[-1]:.2f} s, dd {theirs[-1]:.2f} s")
    case = f"to durable storage, {_size(total)}"
    return [
        Row.of(_speeds(total, theirs), case=case, system="dd conv=fsync", metric="mib_per_s", unit="MiB/s"),
        Row.of(
            _speeds(total, ours), case=case, system="muster", metric="mib_per_s", unit="MiB/s",
            note="snapshot, digest and SHA-256 included",
        ),
        Row.of(
            [dd / own for dd, own in zip(theirs, ours, strict=True)],
            case=case, system="muster", metric="of_dd", unit="", goal=GOAL_SHARE,
        ),
    ]  # fmt: skip


def save(training: Training, directory: Path) -> int:
    """Take a checkpoint and wait until it is on the disk; its bytes."""
    training.take()
    training.saver.wait()
    return sum(blob.stat().st_size for blob in (directory / "blobs").iterdir())


# ---------------------------------------------------------------------------------------- restore


def restore(settings: Settings) -> list[Row]:
    """Loading a checkpoint whose bytes are not in memory, in turns with only reading them."""
    ours: list[float] = []
    theirs: list[float] = []
    with settings.scratch() as home:
        manifest, training = _checkpoint(settings, home)
        directory = CheckpointDirectory(home)
        blobs = [home / "blobs" / shard.digest for shard in manifest.shards]
        total = sum(shard.bytes for shard in manifest.shards)
        for number in range(settings.repeats):
            _forget(blobs)
            begun = time.perf_counter()
            for blob in blobs:
                with blob.open("rb", buffering=0) as file:
                    while file.read(MIB):
                        pass
            theirs.append(time.perf_counter() - begun)
            _forget(blobs)
            begun = time.perf_counter()
            directory.load(manifest, training.state.tensors)
            ours.append(time.perf_counter() - begun)
            progress(f"  {number + 1}/{settings.repeats}: {ours[-1]:.2f} s, read {theirs[-1]:.2f} s")
    case = f"restore from the local cache, {_size(total)}"
    return [
        Row.of(_speeds(total, theirs), case=case, system="cold read", metric="mib_per_s", unit="MiB/s"),
        Row.of(
            _speeds(total, ours), case=case, system="muster", metric="mib_per_s", unit="MiB/s",
            note="every digest verified before the first tensor changes",
        ),
        Row.of(
            [cold / own for cold, own in zip(theirs, ours, strict=True)],
            case=case, system="muster", metric="of_cold_read", unit="", goal=GOAL_SHARE,
        ),
    ]  # fmt: skip


def _checkpoint(settings: Settings, home: Path) -> tuple[Manifest, Training]:
    shards: list[ShardFile] = []
    training = settings.training(home, shards.append)
    save(training, home)
    specs = [{"name": s.name, "dtype": s.dtype, "shape": list(s.shape)} for s in training.saver.specs]
    assert training.saver.newest is not None
    manifest = make_manifest(
        job="bench",
        step=1,
        generation=1,
        state_digest=training.saver.newest.state_digest,
        header={"tensors": specs, "shard_bytes": 64 * MIB},
        shards=shards,
    )
    return manifest, training


def _forget(paths: Sequence[Path]) -> None:
    """Drop what the kernel keeps of these files: they were synced, so it may."""
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# ----------------------------------------------------------------------------------------- upload


def upload(settings: Settings) -> list[Row]:
    """Three agents that upload a checkpoint between them, to a coordinator on the disk and in memory."""
    rows: list[Row] = []
    with settings.scratch() as home:
        manifest, _ = _checkpoint(settings, home)
        parts = [manifest.shards[agent::AGENTS] for agent in range(AGENTS)]
        total = sum(shard.bytes for shard in manifest.shards)
        for index, part in enumerate(parts):
            (home / f"agent-{index}").mkdir()
            for shard in part:
                os.link(home / "blobs" / shard.digest, home / f"agent-{index}" / shard.digest)
        for place, below in (("disk", settings.directory), ("memory", _memory())):
            speeds: list[float] = []
            growths: list[float] = []
            for number in range(settings.repeats):
                with settings.scratch(below) as store:
                    seconds, growth = _upload_once(home, store)
                speeds.append(total / MIB / seconds)
                growths.append(growth / MIB)
                progress(
                    f"  {place} {number + 1}/{settings.repeats}: {speeds[-1]:.0f} MiB/s, +{growths[-1]:.0f} MiB"
                )
            case = f"{AGENTS} agents upload {_size(total)} over TLS, store on {place}"
            rows += [
                Row.of(
                    speeds, case=case, system="muster", metric="mib_per_s", unit="MiB/s",
                    goal=GOAL_UPLOAD_MIB_PER_S, note="hashed, written and synced by the coordinator",
                ),
                Row.of(
                    growths, case=case, system="muster", metric="rss_growth_mib", unit="MiB", goal=GOAL_GROWTH_MIB,
                    note="coordinator's resident memory at its most, less before",
                ),
            ]  # fmt: skip
    return rows


def _upload_once(home: Path, store: Path) -> tuple[float, int]:
    """Seconds from the start of all uploads to the end of the last, and the coordinator's growth in bytes."""
    from agent.enroll import enroll
    from protos import wire

    (store / "logs").mkdir()
    with Park(store / "logs") as park:
        coordinator, addresses = _coordinator(park, store)
        admin = ("--identity", str(store / "home" / "admin.json"), "--address", addresses["main"])
        created = _output(
            str(_BIN / "muster"), *admin, "token", "create", "--uses", str(AGENTS), "-o", "json"
        )
        token = wire.JoinToken.parse(json.loads(created)["token"])
        agents = []
        for index in range(AGENTS):
            identity = store / f"agent-{index}.json"
            enroll(token, addresses["enroll"], f"agent-{index}").save(identity)
            agents.append(
                subprocess.Popen(
                    [
                        *(sys.executable, "-m", "bench.baselines.uploader"),
                        *("--identity", str(identity), "--blobs", str(home / f"agent-{index}")),
                    ],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
                )
            )
        try:
            for agent in agents:
                _expect(agent, "ready")
            with _resident(coordinator.pid) as growth:
                begun = time.perf_counter()
                for agent in agents:
                    assert agent.stdin is not None
                    agent.stdin.write("\n")
                    agent.stdin.flush()
                for agent in agents:
                    _expect(agent, "done")
                seconds = time.perf_counter() - begun
            return seconds, growth()
        finally:
            for agent in agents:
                agent.kill()
                agent.wait()
                assert agent.stdin is not None
                assert agent.stdout is not None
                agent.stdin.close()
                agent.stdout.close()


def _coordinator(park: Park, store: Path) -> tuple[subprocess.Popen[bytes], dict[str, str]]:
    home = store / "home"
    _output(str(_BIN / "musterd"), "init", str(home))
    listen = {part: f"127.0.0.1:{free_port()}" for part in ("main", "enroll", "metrics")}
    (store / "coordinator.yaml").write_text(yaml.safe_dump({"listen": listen}), encoding="utf-8")
    serve = [str(_BIN / "musterd"), "serve", "--config", str(store / "coordinator.yaml"), "--home", str(home)]
    process = park.start("musterd", serve)
    deadline = time.monotonic() + 60
    while not (home / "run" / "addresses.json").exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise BenchError(f"musterd does not serve; its output:\n{park.log_tail('musterd')}")
        time.sleep(0.02)
    addresses: dict[str, str] = json.loads((home / "run" / "addresses.json").read_text())
    return process, addresses


@contextlib.contextmanager
def _resident(pid: int) -> Iterator[Callable[[], int]]:
    """Watch a process's resident memory; the function gives its growth to its most, in bytes."""
    process = psutil.Process(pid)
    before = most = process.memory_info().rss
    over = threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.wait(0.02):
            most = max(most, process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield lambda: most - before
    finally:
        over.set()
        watcher.join()


def _expect(agent: subprocess.Popen[str], word: str) -> None:
    assert agent.stdout is not None
    line = agent.stdout.readline().strip()
    if line != word:
        raise BenchError(f"an uploading agent said {line!r} instead of {word!r}; see its error above")


def _output(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode != 0:
        raise BenchError(f"{' '.join(argv)}: exit {done.returncode}\n{done.stderr}{done.stdout}")
    return done.stdout


# ----------------------------------------------------------------------------------------- beside


def beside(settings: Settings) -> list[Row]:
    """The same state saved by Muster, DCP's async_save and torch.save, in turns, by one process.

    The stall is until the caller may change the state; the total is until the bytes are durable.
    """
    from torch.distributed.checkpoint import state_dict_saver

    # From DCP's own threads too: that there is no process group is meant.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    stalls: dict[str, list[float]] = {"muster": [], "dcp async_save": [], "torch.save": []}
    totals: dict[str, list[float]] = {name: [] for name in stalls}
    with settings.scratch() as home:
        training = settings.training(home / "muster")
        total = training.state_bytes
        tensors: dict[str, Any] = dict(training.state.tensors)
        for number in range(settings.repeats + 1):
            begun = time.perf_counter()
            training.take()
            training.saver.before_update()
            stalls["muster"].append(time.perf_counter() - begun)
            training.saver.wait()
            totals["muster"].append(time.perf_counter() - begun)
            shutil.rmtree(home / "muster")
            os.sync()

            begun = time.perf_counter()
            future = state_dict_saver.async_save(tensors, checkpoint_id=home / "dcp", no_dist=True)
            assert isinstance(future, Future)
            stalls["dcp async_save"].append(time.perf_counter() - begun)
            future.result()
            totals["dcp async_save"].append(time.perf_counter() - begun)
            shutil.rmtree(home / "dcp")
            os.sync()

            begun = time.perf_counter()
            with (home / "state.pt").open("wb") as file:
                torch.save(tensors, file)
                file.flush()
                os.fsync(file.fileno())
            stalls["torch.save"].append(time.perf_counter() - begun)
            totals["torch.save"].append(stalls["torch.save"][-1])
            (home / "state.pt").unlink()
            os.sync()
            progress(
                f"  {number}/{settings.repeats}: "
                + ", ".join(f"{name} {stalls[name][-1]:.2f}/{totals[name][-1]:.2f} s" for name in stalls)
            )
    case = f"save {_size(total)}, CPU, one process"
    notes = {
        "muster": "an update that comes at once, with nothing computed in between; digests included",
        "dcp async_save": "no digests",
        "torch.save": "no digests; then fsync",
    }
    rows = []
    for name in stalls:
        for metric, values in (("stall_s", stalls), ("total_s", totals)):
            note = f"the first: {values[name][0]:.2f}; {notes[name]}"
            rows.append(Row.of(values[name][1:], case=case, system=name, metric=metric, unit="s", note=note))
    return rows


# ------------------------------------------------------------------------------------------- main


def _memory() -> Path:
    """Where files are memory."""
    return Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())


def _speeds(total: int, seconds: Sequence[float]) -> list[float]:
    return [total / MIB / s for s in seconds]


def _size(total: float) -> str:
    return f"{total / 1e6:,.0f} MB"


_MEASURES = {"stall": stall, "durable": durable, "restore": restore, "upload": upload, "beside": beside}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.checkpoint", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON list on standard output")
    parser.add_argument("--state-mb", type=float, help="size of the state (GPT-2 124M with Adam, 1500)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=256, help="that a step computes on each rank")
    parser.add_argument("--only", type=chosen(set(SECTIONS)), default=list(SECTIONS))
    parser.add_argument("--directory", type=Path, default=Path.cwd(), help="on the disk that is meant")
    args = parser.parse_args()
    settings = Settings(
        state_mb=args.state_mb, repeats=args.repeats, tokens=args.tokens, directory=args.directory.resolve()
    )
    rows: list[Row] = []
    for section in args.only:
        progress(section)
        rows += _MEASURES[section](settings)
    emit(rows, as_json=args.json)


if __name__ == "__main__":
    main()
