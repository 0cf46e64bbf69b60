"""`muster-agent`: lend this machine to a coordinator, and look after it."""

from __future__ import annotations

import json
import logging
import platform
import re
import sys
from collections.abc import Callable
from functools import update_wrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from agent.daemon import Settings
    from agent.home import Home

_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(B|kB|KB|MB|GB|TB|KiB|MiB|GiB|TiB)?\s*$")
_UNITS = {
    "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip


class Size(click.ParamType):  # type: ignore[type-arg]
    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = _SIZE.match(value)
        if match is None:
            self.fail(f'{value!r}: expected a size such as "20GiB", "500MB" or a number of bytes', param, ctx)
        return int(float(match[1]) * _UNITS[match[2] or "B"])


class Cards(click.ParamType):  # type: ignore[type-arg]
    name = "LIST"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        if value == "none":
            return ()
        if not re.fullmatch(r"\d+(,\d+)*", value):
            self.fail(f'{value!r}: expected card numbers such as "0,2", or "none"', param, ctx)
        return tuple(dict.fromkeys(int(index) for index in value.split(",")))


def _label(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    labels = {}
    for value in values:
        key, separator, text = value.partition("=")
        if not separator or not re.fullmatch(r"[A-Za-z0-9._/-]{1,64}", key) or len(text) > 64:
            raise click.BadParameter(
                f"{value!r}: expected KEY=VALUE, the key of 1 to 64 letters, digits, '.', '_', '/', '-', "
                "the value of at most 64 characters",
                ctx,
                param,
            )
        labels[key] = text
    if len(labels) > 32:
        raise click.BadParameter(f"{len(labels)} labels; at most 32 are allowed", ctx, param)
    return labels


def home_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--home",
        type=click.Path(path_type=Path, file_okay=False),
        envvar="MUSTER_AGENT_HOME",
        help="Directory of the agent's state.  [default: $XDG_STATE_HOME/muster-agent]",
    )(command)


def network_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(
        (
            click.option(
                "--advertise", default="", metavar="ADDR", help="Address at which peers reach this machine."
            ),
            click.option("--interface", default="", metavar="IF", help="Network interface that peers reach."),
            click.option(
                "--gpus", type=Cards(), help='Cards to lend, e.g. "0,2", or "none".  [default: all]'
            ),
        )
    ):
        command = option(command)
    return command


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of the commands that run the agent, gathered into one `settings` argument."""

    def wrapped(
        advertise: str,
        interface: str,
        gpus: tuple[int, ...] | None,
        labels: dict[str, str],
        cache_bytes: int,
        lend: bool,
        peer_port: int,
        lend_rate: int,
        drain_grace: float,
        confine: str,
        **rest: Any,
    ) -> Any:
        from agent.daemon import Settings
        from agent.peers import Lending

        settings = Settings(
            advertise=advertise,
            interface=interface,
            gpus=gpus,
            labels=labels,
            cache_bytes=cache_bytes,
            lending=Lending(allowed=lend, port=peer_port, bytes_per_s=lend_rate),
            drain_grace_s=drain_grace,
            confine=confine,
        )
        return command(settings=settings, **rest)

    result: Callable[..., Any] = update_wrapper(wrapped, command)
    for option in reversed(
        (
            click.option(
                "--labels",
                multiple=True,
                callback=_label,
                metavar="KEY=VALUE",
                help="Label; may be repeated.",
            ),
            click.option(
                "--cache-bytes",
                type=Size(),
                default="20GiB",
                show_default=True,
                help="Bound of the blob cache.",
            ),
            click.option(
                "--lend/--no-lend",
                default=True,
                show_default=True,
                help="Let other agents of the fleet fetch checkpoints and data from the cache.",
            ),
            click.option(
                "--peer-port",
                type=click.IntRange(0, 65_535),
                default=0,
                show_default=True,
                help="Port at which they are served; 0 lets the system choose.",
            ),
            click.option(
                "--lend-rate",
                type=Size(),
                default="0",
                show_default="no bound",
                metavar="SIZE",
                help="Bytes a second that all of them together may fetch.",
            ),
            click.option(
                "--drain-grace",
                type=click.FloatRange(0),
                default=15.0,
                show_default=True,
                metavar="SECONDS",
                help="How long SIGTERM waits for a coordinator that is away.",
            ),
            click.option(
                "--confine",
                type=click.Choice(["auto", "off", "require"]),
                default="auto",
                show_default=True,
                help="Let workers see only their job's files (Landlock); auto: where the kernel can.",
            ),
        )
    ):
        result = option(result)
    return network_options(result)


class Commands(click.Group):
    """Turns the agent's own errors into one message and the exit code that they stand for."""

    def invoke(self, ctx: click.Context) -> Any:
        from agent.errors import AgentError
        from protos.wire import WireError

        try:
            return super().invoke(ctx)
        except AgentError as error:
            click.echo(f"muster-agent: {error}", err=True)
            ctx.exit(error.exit_code)
        except WireError as error:
            click.echo(f"muster-agent: {error}", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            ctx.exit(130)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="muster-train", prog_name="muster-agent")
@click.option(
    "--log-format", type=click.Choice(["auto", "console", "json"]), default="auto", show_default=True
)
@click.option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info", show_default=True
)
@click.pass_context
def cli(ctx: click.Context, log_format: str, log_level: str) -> None:
    """Lend this machine's GPUs (or CPU) to a Muster coordinator."""
    ctx.obj = (log_format, log_level)


def configure_logs(log_format: str, log_level: str) -> None:
    import structlog

    console = log_format == "console" or (log_format == "auto" and sys.stderr.isatty())
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *(
                [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
                if console
                else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
            ),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.getLevelNamesMapping()[log_level.upper()]
        ),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
    )


def _home(path: Path | None) -> Home:
    from agent.home import Home, default_home

    return Home(root=(path or default_home()).expanduser().absolute())


def _run(ctx: click.Context, home: Home, settings: Settings) -> None:
    from agent.daemon import run
    from protos.wire import Identity

    configure_logs(*ctx.obj)
    run(home, Identity.load(home.identity), settings)


@cli.command()
@click.argument("address", metavar="HOST:PORT")
@click.option(
    "--token", required=True, envvar="MUSTER_TOKEN", help="Join token; also read from MUSTER_TOKEN."
)
@click.option("--name", default=None, help="Name for people.  [default: the host's name]")
@click.option("--run/--no-run", "and_run", default=True, help="Run the agent after enrolling.")
@home_option
@run_options
@click.pass_context
def join(
    ctx: click.Context,
    address: str,
    token: str,
    name: str | None,
    and_run: bool,
    home: Path | None,
    settings: Settings,
) -> None:
    """Enrol at a coordinator (its enrolment port), then run the agent.

    A home that has joined already keeps its identity: the token is not used again."""
    from agent.enroll import enroll
    from agent.errors import BadInput
    from protos.wire import Identity, JoinToken

    place = _home(home)
    parsed = JoinToken.parse(token)
    shown = name if name is not None else re.sub(r"[^A-Za-z0-9._-]", "-", platform.node())[:64] or "agent"
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", shown):
        raise BadInput(f"--name {shown!r}: expected 1 to 64 letters, digits, '.', '_' or '-'")
    place.prepare()
    if place.identity.exists():
        identity = Identity.load(place.identity)
        if _fingerprint(identity) != parsed.fingerprint:
            raise BadInput(
                f"home {place.root} has joined another coordinator ({identity.address}); use another directory with "
                "--home, or forget that one with `muster-agent leave --forget`"
            )
        click.echo(f"already joined as {identity.id}; the token is not used", err=True)
    else:
        identity = enroll(parsed, address, shown)
        identity.save(place.identity)
        click.echo(f"joined as {identity.id}; coordinator {identity.address}", err=True)
    if and_run:
        _run(ctx, place, settings)


def _fingerprint(identity: Any) -> str:
    import hashlib

    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    authority = x509.load_pem_x509_certificate(identity.authority_pem.encode())
    return hashlib.sha256(authority.public_bytes(Encoding.DER)).hexdigest()


@cli.command()
@home_option
@run_options
@click.pass_context
def run(ctx: click.Context, home: Path | None, settings: Settings) -> None:
    """Run the agent of a machine that has joined.  SIGTERM drains it; a second one stops it at once."""
    place = _home(home)
    place.prepare()
    _run(ctx, place, settings)


@cli.command()
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True)
@home_option
def status(output: str, home: Path | None) -> None:
    """What the running agent does."""
    from agent.home import ask

    answer = ask(_home(home), "status")
    if output == "json":
        click.echo(json.dumps(answer))
        return
    for key, value in answer.items():
        if isinstance(value, dict):
            click.echo(f"{key}:")
            for inner, text in value.items():
                click.echo(f"  {inner}: {_shown(text)}")
        elif value not in ("", None, []):
            click.echo(f"{key}: {_shown(value)}")


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@cli.command()
@home_option
def drain(home: Path | None) -> None:
    """Finish the step, leave the job and end the running agent (the same as SIGTERM)."""
    from agent.home import ask

    ask(_home(home), "drain")
    click.echo("draining: the agent ends after the step in hand", err=True)


@cli.command()
@click.argument("allowed", type=click.Choice(["on", "off"]))
@home_option
def lend(allowed: str, home: Path | None) -> None:
    """Let other agents fetch from the running agent's cache, or stop that at once, until it ends."""
    from agent.home import ask

    ask(_home(home), "lend" if allowed == "on" else "keep")
    click.echo("the cache is lent" if allowed == "on" else "the cache is not lent", err=True)


@cli.command()
@click.option("--forget", is_flag=True, help="Also remove the identity: joining again takes a new token.")
@home_option
def leave(forget: bool, home: Path | None) -> None:
    """Say goodbye and end the running agent now, without waiting for the step."""
    from agent.errors import AgentError
    from agent.home import ask

    place = _home(home)
    try:
        ask(place, "leave")
        click.echo("left", err=True)
    except AgentError:
        if not forget:
            raise
    if forget:
        place.identity.unlink(missing_ok=True)
        click.echo(f"forgot the identity in {place.root}", err=True)


@cli.command()
@click.argument("address", metavar="[HOST:PORT]", default="")
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True)
@home_option
@network_options
@click.pass_context
def doctor(
    ctx: click.Context,
    address: str,
    output: str,
    home: Path | None,
    advertise: str,
    interface: str,
    gpus: tuple[int, ...] | None,
) -> None:
    """Check whether this machine can serve, and say what to do where it cannot.  Exits 1 on any failure."""
    from dataclasses import asdict

    from agent.doctor import Question, examine

    question = Question(
        home=_home(home), address=address, advertise=advertise, interface=interface, gpus=gpus
    )
    failed = False
    findings = []
    for finding in examine(question):
        failed = failed or finding.level == "fail"
        if output == "json":
            findings.append(asdict(finding))
            continue
        click.echo(f"{finding.level:4}  {finding.subject}: {finding.detail}")
        if finding.advice:
            click.echo(f"      → {finding.advice}")
    if output == "json":
        click.echo(json.dumps(findings))
    ctx.exit(1 if failed else 0)


def main() -> None:
    cli(prog_name="muster-agent")


if __name__ == "__main__":
    main()
