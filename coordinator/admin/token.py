"""`muster token`: invite volunteers."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import click

from coordinator.admin.options import duration, with_coordinator
from coordinator.admin.output import Column, Output, moment

if TYPE_CHECKING:
    from coordinator.admin.connection import Coordinator

MIN_TTL_S, MAX_TTL_S, MAX_USES = 60, 31_536_000, 100_000


def token_ref(text: str) -> str:
    """A token's public id, a prefix of it, or the whole token, as public id or prefix.  Raise BadParameter."""
    from protos import wire

    if text.startswith("muster1."):
        try:
            return wire.JoinToken.parse(text).token_id
        except wire.MalformedToken as error:
            raise click.BadParameter(f"{error}.") from error
    if not re.fullmatch(r"[a-z0-9]{1,8}", text):
        raise click.BadParameter(
            f"{text!r} is not a token id; expected up to 8 of a-z and 0-9, as shown by `muster token list`."
        )
    return text


@click.group()
def token() -> None:
    """Invite volunteers with join tokens."""


@token.command()
@click.option(
    "--ttl", type=duration, default="24h", show_default=True, help="How long it is valid: 1m to 365d."
)
@click.option(
    "--uses",
    type=click.IntRange(1, MAX_USES),
    default=1,
    show_default=True,
    help="How many agents may enrol with it.",
)
@click.option("--note", default="", help="For people, at most 256 characters.")
@with_coordinator
def create(*, coordinator: Coordinator, output: Output, ttl: float, uses: int, note: str) -> None:
    """Make a token and print the command that a volunteer runs."""
    from protos import admin_pb2, wire

    if not MIN_TTL_S <= ttl <= MAX_TTL_S:
        raise click.BadParameter(f"{ttl:g} s; expected 1m to 365d", param_hint="--ttl")
    request = admin_pb2.CreateTokenRequest(ttl_s=round(ttl), uses=uses, note=note)
    reply = coordinator.call(coordinator.stub.CreateToken, request)
    host = wire.split_address(coordinator.address)[0]
    address = f"[{host}]:{reply.enroll_port}" if ":" in host else f"{host}:{reply.enroll_port}"
    command = f"muster-agent join --token {reply.token} {address}"
    view = {
        "token": reply.token,
        "token_id": reply.token_id,
        "enroll_address": address,
        "ttl_s": round(ttl),
        "uses": uses,
        "note": note,
        "command": command,
    }
    output.done(view, command)


@token.command("list")
@click.option("--all", "-a", "dead_too", is_flag=True, help="Expired, exhausted and revoked ones too.")
@with_coordinator
def list_tokens(*, coordinator: Coordinator, output: Output, dead_too: bool) -> None:
    """Tokens, without their secrets."""
    from protos import admin_pb2

    views = coordinator.views(coordinator.stub.ListTokens, admin_pb2.ListRequest(all=dead_too))
    columns = (
        Column(title="TOKEN", value=lambda view: view.get("id")),
        Column(title="USES LEFT", value=lambda view: view.get("uses_left"), right=True),
        Column(title="EXPIRES", value=lambda view: moment(view.get("expires_unix_ms"))),
        Column(title="STANDING", value=lambda view: view.get("standing")),
        Column(title="NOTE", value=lambda view: view.get("note")),
    )
    output.views(views, columns, "no tokens; make one with `muster token create`")


@token.command()
@click.argument("token_id", metavar="TOKEN", type=token_ref)
@with_coordinator
def revoke(*, coordinator: Coordinator, output: Output, token_id: str) -> None:
    """Let nobody else enrol with it; agents already admitted stay (see `muster agent ban`)."""
    from protos import admin_pb2

    view = coordinator.view(coordinator.stub.RevokeToken, admin_pb2.RevokeTokenRequest(token_id=token_id))
    output.done(view, f"{view.get('id', token_id)}  revoked")
