"""Nothing secret leaves its file: a real musterd and a real agent are taken through enrolment with debug logs,
and everything that they wrote is searched."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

from protos import admin_pb2, admin_pb2_grpc
from protos.wire import Identity, JoinToken, channel
from tests.processes import STOP_S, init_home, start_musterd

AGENT = (sys.executable, "-m", "agent.cli", "--log-level", "debug", "--log-format", "json")
PRIVATE = {"authority.key", "server.key", "admin.json", "identity.json", "peer.key"}


def keys_of(path: Path) -> list[str]:
    """The lines of a file's private keys."""
    text = path.read_text()
    if path.suffix == ".json":
        text = json.loads(text)["key_pem"]
    return [line for line in text.splitlines() if line and not line.startswith("-----")]


def join(home: Path, token: str, address: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*AGENT, "join", "--home", str(home), "--name", "box", "--gpus", "none", address],
        env={**os.environ, "MUSTER_TOKEN": token},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_secrets_are_in_no_log_no_error_no_event_and_no_file_but_their_own(tmp_path: Path) -> None:
    init_home(tmp_path / "home")
    musterd = start_musterd(tmp_path / "home")
    try:
        admin = Identity.load(tmp_path / "home" / "admin.json")
        with channel(admin, musterd.addresses["main"]) as made:
            stub = admin_pb2_grpc.AdminServiceStub(made)
            token = stub.CreateToken(admin_pb2.CreateTokenRequest(ttl_s=600, uses=2), timeout=20).token
            good = JoinToken.parse(token)
            wrong = JoinToken(fingerprint=good.fingerprint, token_id=good.token_id, secret=good.secret[::-1])
            refused, _ = join(tmp_path / "nobody", str(wrong), musterd.addresses["enroll"]).communicate(
                timeout=STOP_S
            )
            assert "TOKEN_UNKNOWN" in refused
            agent = join(tmp_path / "agent", token, musterd.addresses["enroll"])
            events = []
            for event in stub.Watch(admin_pb2.WatchRequest(follow=True), timeout=60):
                events.append(event.json + event.text)
                if event.kind == "AgentArrived":
                    break
            agent.send_signal(signal.SIGTERM)
            said, _ = agent.communicate(timeout=STOP_S)
        assert '"session.open"' in said or "session.open" in said
    finally:
        musterd.stop()

    secrets = [good.secret, wrong.secret]
    written = {"events": "\n".join(events), "agent's output": said, "refused agent's output": refused}
    for path in tmp_path.rglob("*"):
        if not path.is_file() or path.is_symlink():
            continue
        if path.name in PRIVATE:
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
            secrets += keys_of(path)
        else:
            written[str(path)] = path.read_bytes().decode(errors="replace")
    assert {"home/authority.key", "home/admin.json", "agent/identity.json"} <= {
        str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")
    }
    assert any("journal.db" in name for name in written)
    for where, text in written.items():
        for secret in secrets:
            assert secret not in text, f"{where} holds a secret"
