"""`musterd` as a process: making a home, serving, being killed, stopping, refusing."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import socket
import sqlite3
import stat
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.serialization import Encoding
from OpenSSL import SSL

from coordinator.daemon import main
from protos import admin_pb2, admin_pb2_grpc, agent_pb2, agent_pb2_grpc
from protos.wire import Identity, channel, enroll_channel
from tests.coordinator.harness import signing_request
from tests.processes import MUSTERD, Musterd, init_home, start_musterd


@pytest.fixture
def home(tmp_path: Path) -> Path:
    init_home(tmp_path / "home")
    return tmp_path / "home"


@pytest.fixture
def musterd(home: Path) -> Iterator[Musterd]:
    running = start_musterd(home)
    yield running
    running.stop()


def admin_channel(running: Musterd) -> grpc.Channel:
    return channel(Identity.load(running.home / "admin.json"), running.addresses["main"])


def events(running: Musterd) -> list[tuple[int, str]]:
    with admin_channel(running) as made:
        call = admin_pb2_grpc.AdminServiceStub(made).Watch(admin_pb2.WatchRequest(), timeout=20)
        return [(event.sequence, event.json) for event in call]


def create_token(running: Musterd) -> str:
    with admin_channel(running) as made:
        request = admin_pb2.CreateTokenRequest(ttl_s=60, uses=5)
        return str(admin_pb2_grpc.AdminServiceStub(made).CreateToken(request, timeout=20).token_id)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(main, arguments)


# ------------------------------------------------------------------------------------- init


def test_init_makes_a_home_whose_keys_only_the_owner_reads(tmp_path: Path) -> None:
    home = tmp_path / "new" / "home"
    result = run("init", str(home), "--address", "train.example.org:7470")
    assert result.exit_code == 0, result.output
    assert Identity.load(home / "admin.json").address == "train.example.org:7470"
    assert {path.name for path in home.iterdir()} == {
        "authority.pem",
        "authority.key",
        "server.pem",
        "server.key",
        "admin.json",
    }
    for path in home.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_init_never_touches_what_is_there(home: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in home.iterdir()}
    again = run("init", str(home))
    assert again.exit_code == 2
    assert "a coordinator's home already" in again.output
    assert {path.name: path.read_bytes() for path in home.iterdir()} == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("x")
    other = run("init", str(tmp_path / "other"))
    assert other.exit_code == 2
    assert "it is not empty" in other.output
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.txt"]


def test_init_refuses_a_bad_address(tmp_path: Path) -> None:
    result = run("init", str(tmp_path / "home"), "--address", "nowhere")
    assert result.exit_code == 2
    assert "expected HOST:PORT" in result.output
    assert not (tmp_path / "home").exists()


def test_operators_identities_are_issued_and_revoked(home: Path, tmp_path: Path, musterd: Musterd) -> None:
    out = tmp_path / "eve.json"
    arguments = ("operator", "issue", "--home", str(home), "--out", str(out), "eve")
    assert run(*arguments).exit_code == 0
    assert run(*arguments).exit_code == 2
    with channel(Identity.load(out), musterd.addresses["main"]) as made:
        stub = admin_pb2_grpc.AdminServiceStub(made)
        stub.ListJobs(admin_pb2.ListRequest(), timeout=20)
        assert run("operator", "revoke", "--home", str(home), "eve").exit_code == 0
        with pytest.raises(grpc.RpcError) as error:
            stub.ListJobs(admin_pb2.ListRequest(), timeout=20)
    assert error.value.code() is grpc.StatusCode.PERMISSION_DENIED  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------- serve


def test_serving_says_where_and_how_to_create_a_token(musterd: Musterd) -> None:
    assert musterd.addresses["main"] in musterd.ready_line
    assert "token create" in musterd.ready_line
    assert set(musterd.addresses) == {"main", "enroll", "metrics"}


def test_sigterm_stops_cleanly_and_takes_the_addresses_away(home: Path) -> None:
    running = start_musterd(home)
    assert running.stop() == 0
    assert not (home / "run" / "addresses.json").exists()
    assert "Traceback" not in running.log


def test_what_was_acknowledged_before_a_kill_is_there_after_it(home: Path) -> None:
    running = start_musterd(home)
    with admin_channel(running) as made:
        stub = admin_pb2_grpc.AdminServiceStub(made)
        # Tokens are asked for without a pause; the process is killed in the midst of them.
        asked = [stub.CreateToken.future(admin_pb2.CreateTokenRequest(ttl_s=60, uses=1)) for _ in range(200)]
        acknowledged = [call.result(20).token_id for call in asked[:50]]
        running.kill()
        acknowledged += [call.result().token_id for call in asked[50:] if call.exception(20) is None]
    again = start_musterd(home)
    try:
        kept = [json.loads(text)["token"]["token_id"] for _, text in events(again)]
        assert set(acknowledged) <= set(kept)
        assert len(kept) == len(set(kept))
        assert create_token(again) not in kept
    finally:
        again.stop()


def test_time_and_history_go_on_after_a_restart(home: Path) -> None:
    first = start_musterd(home)
    create_token(first)
    before = events(first)
    first.kill()
    second = start_musterd(home, addresses=first.addresses)
    try:
        assert second.addresses == first.addresses
        create_token(second)
        after = events(second)
        assert after[: len(before)] == before
        times = [json.loads(text)["at_ms"] for _, text in after]
        assert times == sorted(times)
    finally:
        second.stop()


async def test_the_enrolment_port_sends_the_pinned_authority_in_its_chain(musterd: Musterd) -> None:
    """The agent pins the authority before it says anything: it must find it in the handshake."""
    host, port = musterd.addresses["enroll"].rsplit(":", 1)

    def chain() -> list[bytes]:
        context = SSL.Context(SSL.TLS_CLIENT_METHOD)
        context.set_alpn_protos([b"h2"])
        with socket.create_connection((host, int(port)), timeout=20) as raw:
            raw.setblocking(True)
            connection = SSL.Connection(context, raw)
            connection.set_connect_state()
            connection.do_handshake()
            certificates = connection.get_peer_cert_chain(as_cryptography=True) or []
            return [certificate.public_bytes(Encoding.PEM) for certificate in certificates]

    found = await asyncio.to_thread(chain)
    authority = (musterd.home / "authority.pem").read_bytes()
    assert found[1] == authority
    _, csr = signing_request()
    with (
        enroll_channel(authority, musterd.addresses["enroll"]) as made,
        pytest.raises(grpc.RpcError) as error,
    ):
        agent_pb2_grpc.AgentServiceStub(made).Enroll(
            agent_pb2.EnrollRequest(protocol=agent_pb2.PROTOCOL_VERSION_1, csr_pem=csr, name="x"), timeout=20
        )
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]


def test_a_strangers_garbage_leaves_no_trace_in_the_log(musterd: Musterd) -> None:
    host, port = musterd.addresses["main"].rsplit(":", 1)
    before = musterd.log
    with socket.create_connection((host, int(port)), timeout=20) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        while stranger.recv(4096):
            pass
    create_token(musterd)
    assert "andshake" not in musterd.log[len(before) :]


def serve(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*MUSTERD, "serve", "--home", str(home), *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_a_second_musterd_on_one_home_is_refused(musterd: Musterd) -> None:
    second = serve(musterd.home)
    assert second.returncode == 1
    assert f"another musterd (process {musterd.process.pid}) serves it" in second.stderr
    assert json.loads((musterd.home / "run" / "addresses.json").read_text()) == musterd.addresses


def test_a_taken_port_is_named(home: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for field in ("main", "metrics"):
            listen = {**dict.fromkeys(("main", "enroll", "metrics"), "127.0.0.1:0"), field: address}
            config = tmp_path / "c.yaml"
            config.write_text(json.dumps({"listen": listen}))
            result = serve(home, "--config", str(config))
            assert result.returncode == 1, result.stderr
            assert f"listen.{field}: {address} cannot be had" in result.stderr


@pytest.mark.parametrize(
    ("config", "says"),
    [("leese: 1s", "did you mean 'lease'?"), ("lease: 1s\ntiming: {grace: 2s}", "timing.grace is 2000 ms")],
)
def test_a_bad_config_ends_with_status_2_and_one_clear_message(
    home: Path, tmp_path: Path, config: str, says: str
) -> None:
    (tmp_path / "c.yaml").write_text(config)
    result = serve(home, "--config", str(tmp_path / "c.yaml"))
    assert result.returncode == 2
    assert says in result.stderr
    assert "Traceback" not in result.stderr


def test_a_home_that_is_none_says_how_to_make_one(tmp_path: Path) -> None:
    result = serve(tmp_path / "nowhere")
    assert result.returncode == 2
    assert "musterd init" in result.stderr
    assert not (tmp_path / "nowhere").exists()


def test_a_damaged_journal_is_refused_with_what_to_do(home: Path) -> None:
    (home / "journal.db").write_bytes(b"garbage" * 1000)
    result = serve(home)
    assert result.returncode == 1
    assert "journal.db: damaged" in result.stderr
    assert "Traceback" not in result.stderr


# ------------------------------------------------------------------------------------- replay


def test_replay_prints_the_state_up_to_a_record(home: Path) -> None:
    running = start_musterd(home)
    tokens = [create_token(running) for _ in range(3)]
    running.stop()
    whole = run("replay", "--home", str(home))
    assert whole.exit_code == 0, whole.output
    assert [token["token_id"] for token in json.loads(whole.output)["tokens"]] == tokens
    partly = run("replay", "--home", str(home), "--until", "2")
    assert [token["token_id"] for token in json.loads(partly.output)["tokens"]] == tokens[:2]


def test_replay_of_a_journal_with_a_changed_record_says_which(home: Path) -> None:
    running = start_musterd(home)
    for _ in range(3):
        create_token(running)
    running.kill()
    raw = sqlite3.connect(home / "journal.db")
    raw.execute("UPDATE records SET body = replace(body, 'TokenCreated', 'TokenCreatex') WHERE sequence = 2")
    raw.commit()
    raw.close()
    result = run("replay", "--home", str(home))
    assert result.exit_code == 1
    assert "record 2 does not match its checksum" in result.output


def test_replay_without_a_journal_is_bad_input(home: Path) -> None:
    result = run("replay", "--home", str(home))
    assert result.exit_code == 2
    assert "never served" in result.output


# ------------------------------------------------------------------------------------------- memory


def resident_mib(process: int, line: str) -> float:
    found = next(
        text for text in Path(f"/proc/{process}/status").read_text().splitlines() if text.startswith(line)
    )
    return int(found.split()[1]) / 1024


def test_uploads_do_not_pile_up_in_memory(musterd: Musterd) -> None:
    """A slow disk or a busy core must push back on the senders."""
    blobs = [bytes([number]) * (48 * 2**20) for number in range(6)]

    def upload(blob: bytes) -> bool:
        header = agent_pb2.PutBlobHeader(digest=hashlib.sha256(blob).hexdigest(), bytes=len(blob))
        chunks = (
            agent_pb2.PutBlobRequest(data=blob[start : start + 2**20]) for start in range(0, len(blob), 2**20)
        )
        with admin_channel(musterd) as made:
            requests = itertools.chain([agent_pb2.PutBlobRequest(header=header)], chunks)
            stub = admin_pb2_grpc.AdminServiceStub(made)
            return bool(stub.PutBlob(requests, timeout=120).existed)

    before = resident_mib(musterd.process.pid, "VmRSS")
    with ThreadPoolExecutor(len(blobs)) as senders:
        assert list(senders.map(upload, blobs)) == [False] * len(blobs)
    assert resident_mib(musterd.process.pid, "VmHWM") - before < 64
