"""`muster agent` and `muster token` against a real gRPC server."""

from __future__ import annotations

import pytest

from protos import admin_pb2
from tests.admin.conftest import error_line
from tests.admin.server import Served

AGENT = {
    "id": "ag123456", "name": "lab", "presence": "ready", "standing": "quarantined", "standing_detail": "flapping",
    "draining": True, "step": 7, "disk_free_bytes": 3 * 2**30, "facts": {"gpus": [{"name": "H200"}, {"name": "H200"}], "cpu_count": 8},
}  # fmt: skip


def test_list_shows_presence_and_standing_with_its_reason(muster, muster_json, served: Served) -> None:
    served.service.agents = {"ag123456": AGENT}
    assert muster_json("agent", "list") == [AGENT]
    row = muster("agent", "list").stdout.splitlines()[1]
    for part in ("ag123456", "ready", "quarantined (flapping), draining", "2x H200", "3.0 GiB"):
        assert part in row


def test_list_and_show_say_how_far_a_fetch_has_come_and_what_is_held_against_a_cache(
    muster, served: Served
) -> None:
    fetching = {"activity": "fetching", "fetching": {"bytes": 2**30, "of_bytes": 4 * 2**30}}
    trust = {"cached_blobs": 3, "lends_cache": True, "served_wrong_bytes_to": ["ag2", "ag3"]}
    served.service.agents = {"ag123456": AGENT | fetching | trust}
    assert "fetching 25 % of 4.0 GiB" in muster("agent", "list").stdout
    shown = muster("agent", "show", "ag123456").stdout
    for line in (
        "fetching 25 % of 4.0 GiB",
        "lends its cache        yes",
        "served wrong bytes to  ag2, ag3",
    ):
        assert line in shown


def test_an_empty_list_says_what_to_do(muster) -> None:
    assert "muster token create" in muster("agent", "list").stdout


@pytest.mark.parametrize(
    ("arguments", "kind", "seconds", "reason"),
    [
        (["drain", "ag123456", "--reason", "new disk"], "DRAIN", 0, "new disk"),
        (["quarantine", "ag123456", "--for", "10m"], "QUARANTINE", 600, ""),
        (["quarantine", "ag123456"], "QUARANTINE", 0, ""),
        (["release", "ag123456"], "RELEASE", 0, ""),
        (["ban", "ag123456"], "BAN", 0, ""),
    ],
)
def test_a_command_reaches_the_agent(
    muster_json, served: Served, arguments: list[str], kind: str, seconds: int, reason: str
) -> None:
    served.service.agents = {"ag123456": AGENT}
    assert muster_json("agent", *arguments) == AGENT
    [request] = served.service.requests
    assert admin_pb2.AgentCommandKind.Name(request.kind) == f"AGENT_COMMAND_KIND_{kind}"
    assert (request.agent, request.seconds, request.reason) == ("ag123456", seconds, reason)


def test_create_prints_the_whole_command_for_the_volunteer(muster, muster_json, served: Served) -> None:
    result = muster("token", "create", "--ttl", "7d", "--uses", "10", "--note", "lab")
    token = f"muster1.{'a' * 64}.tok00001{'s' * 43}"
    assert result.stdout == f"muster-agent join --token {token} 127.0.0.1:7471\n"
    [request] = served.service.requests
    assert (request.ttl_s, request.uses, request.note) == (7 * 86_400, 10, "lab")
    view = muster_json("token", "create")
    assert (view["token"], view["token_id"], view["command"]) == (token, "tok00001", result.stdout.strip())


@pytest.mark.parametrize(
    "arguments", [["--ttl", "5s"], ["--ttl", "soon"], ["--uses", "0"], ["--ttl", "400d"]]
)
def test_a_token_out_of_its_bounds_is_not_asked_for(muster, served: Served, arguments: list[str]) -> None:
    result = muster("token", "create", *arguments)
    assert result.exit_code == 2
    assert arguments[0] in error_line(result)
    assert served.service.requests == []


def test_revoke_takes_the_id_or_the_whole_token(muster_json, served: Served) -> None:
    served.service.tokens = {"tok00001": {"id": "tok00001"}}
    assert muster_json("token", "revoke", "tok00001")["revoked"] is True
    assert muster_json("token", "revoke", f"muster1.{'a' * 64}.tok00001{'s' * 43}")["revoked"] is True


def test_revoking_an_unknown_token_is_refused(muster) -> None:
    result = muster("token", "revoke", "nosuch00")
    assert (result.exit_code, error_line(result)) == (4, "muster: refused (UNKNOWN_TOKEN): no token nosuch00")


@pytest.mark.parametrize("text", ["TOKEN", "muster1.abc", "../../x", "toolongtoken"])
def test_a_malformed_token_id_is_not_sent(muster, served: Served, text: str) -> None:
    result = muster("token", "revoke", text)
    assert result.exit_code == 2
    assert "muster token" in error_line(result)
    assert served.service.requests == []
