"""A worker without torch: speaks the control protocol, appends every line it hears to the file named by
MUSTER_STEP_TRACE, and does as the job's spec tells it under the key `fake` (or `model.fake`, which a real coordinator lets pass):

    die_before_warm: write a message and exit with status 3
    steps:           after forming, report so many steps, then finish
    silent:          never answer a plan
    deaf:            never answer a ping
    activity/since_s: what a pong claims
    shard:           store this text as a shard after forming, before the first step
    fail:            after forming, report this failure kind
    warm_file:       do not become warm before this file exists
    wants:           lists of digests: ask for the first, become warm when it is there and print the window, and
                     ask for the next at each plan
"""

from __future__ import annotations

import hashlib
import json
import os
import select
import socket
import sys
from pathlib import Path
from typing import Any

job = json.loads(Path(sys.argv[sys.argv.index("--job") + 1]).read_text())
fake: dict[str, Any] = job.get("fake", {}) or job.get("model", {}).get("fake", {})
print("fake worker starts", flush=True)
if fake.get("die_before_warm"):
    print("ValueError: model.layers: found 0", flush=True)
    sys.exit(3)

connection = socket.socket(socket.AF_UNIX)
connection.connect(os.environ["MUSTER_CONTROL"])
heard = Path(os.environ.get("MUSTER_STEP_TRACE", os.devnull))
slot = int(os.environ["MUSTER_LOCAL_RANK"])


def say(kind: str, /, **fields: Any) -> None:
    connection.sendall(json.dumps({"type": kind, **fields}).encode() + b"\n")


def step(generation: int, number: int) -> None:
    say(
        "step", generation=generation, step=number, loss=1.0 / number, slices=4, data_digest=str(2**63 + number),
        tokens=128.0, lr=0.1, grad_norm=1.0, skipped=False, duration_s=0.01,
    )  # fmt: skip


def want() -> None:
    digests = wants.pop(0)
    say("wants", digests=digests)
    while not all((Path(os.environ["MUSTER_DATA"]) / "blobs" / digest).exists() for digest in digests):
        select.select([connection], [], [], 0.02)


def form(plan: dict[str, Any]) -> None:
    generation, begin = plan["generation"], plan["committed_step"]
    if wants:
        want()
    say("formed", generation=generation, step=begin, state_digest="ab", healed=False)
    if text := fake.get("shard"):
        digest = hashlib.sha256(text.encode()).hexdigest()
        (Path(os.environ["MUSTER_CACHE"]) / "blobs" / digest).write_text(text)
        say(
            "shard", generation=generation, step=begin, index=0, count=1, digest=digest, bytes=len(text),
            state_digest="ab", header={"step": begin},
        )  # fmt: skip
    if fake.get("vouch"):
        say(
            "shard", generation=generation, step=begin, index=0, count=1, digest="", bytes=0,
            state_digest="ab", header={"step": begin},
        )  # fmt: skip
    if kind := fake.get("fail"):
        say("failed", generation=generation, kind=kind, detail="as told", step=begin)
    if steps := fake.get("steps"):
        for number in range(begin + 1, begin + 1 + steps):
            step(generation, number)
        if fake.get("finish", True):
            say("finished", generation=generation, step=begin + steps)


say("hello", pid=os.getpid(), version=1)
wants: list[list[str]] = fake.get("wants", [])
if wants:
    print(f"window of {os.environ['MUSTER_DATA_WINDOW']} bytes", flush=True)
    want()
if wanted := fake.get("warm_file"):
    while not Path(wanted).exists():
        select.select([connection], [], [], 0.02)
say("warm")
for line in connection.makefile("rb"):
    message = json.loads(line)
    with open(heard, "a", encoding="utf-8") as file:
        file.write(json.dumps({"slot": slot, "pid": os.getpid(), **message}) + "\n")
    match message["type"]:
        case "plan" if not fake.get("silent"):
            if message["release"]:
                say("released", generation=message["generation"])
            else:
                form(message)
        case "ping" if not fake.get("deaf"):
            activity, since_s = fake.get("activity", "idle"), fake.get("since_s", 0.0)
            say("pong", sequence=message["sequence"], activity=activity, since_s=since_s, step=0)
        case "stop":
            sys.exit(0)
