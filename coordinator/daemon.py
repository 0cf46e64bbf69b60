"""`musterd`: make a coordinator's home, serve it, look into its journal."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import datetime as dt
import gc
import json
import re
import resource
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import click
import structlog

from coordinator import backup
from coordinator import config as configuration
from coordinator.core import codec
from coordinator.core.model import Timing
from coordinator.identity import Authority, IdentityError, RevokedOperators, Role
from coordinator.journal import Journal, JournalError, copy
from coordinator.loop import restore
from coordinator.server import Addresses, Coordinator, StartError
from coordinator.turns import WholeTurns
from protos.wire import BadAddress, split_address

EXIT_FAILED = 1
EXIT_USAGE = 2
_M_ARENA_MAX = -8
_OPERATOR_NAME = re.compile(r"^[A-Za-z0-9._-]{1,64}$")


def _fail(message: str, status: int) -> None:
    click.echo(f"musterd: {message}", err=True)
    sys.exit(status)


def _address(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
    try:
        split_address(value)
    except BadAddress as error:
        raise click.BadParameter(str(error)) from None
    return value


def _name(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
    if _OPERATOR_NAME.fullmatch(value) is None:
        raise click.BadParameter(f"{value!r}: expected 1 to 64 of A-Z a-z 0-9 . _ -")
    return value


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="muster-train", prog_name="musterd")
def main() -> None:
    """The Muster coordinator."""


@main.command()
@click.argument("home", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--address",
    default="localhost:7470",
    show_default=True,
    callback=_address,
    help="HOST:PORT at which operators will reach the coordinator's main port.",
)
def init(home: Path, address: str) -> None:
    """Make a coordinator's HOME: its authority, server certificate and admin identity."""
    if home.exists() and any(home.iterdir()):
        if (home / "authority.pem").exists():
            message = "it is a coordinator's home already; its authority and journal are kept as they are"
        else:
            message = "it is not empty; name a new or empty directory"
        _fail(f"home {home}: {message}", EXIT_USAGE)
    made_here = not home.exists()
    try:
        home.mkdir(parents=True, exist_ok=True)
        home.chmod(0o700)
        authority = Authority.create()
        authority.write_server_certificate(home)
        authority.issue_operator(Role.ADMIN, "admin", address).save(home / "admin.json")
        authority.save(home)  # last: what has an authority is a home
    except OSError as error:
        for left in [home] if made_here else list(home.glob("*")):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
        _fail(f"home {home}: {error.strerror or error}", EXIT_FAILED)
    click.echo(f"made {home}: authority {authority.fingerprint[:16]}…, admin identity {home / 'admin.json'}")
    click.echo(f"next: musterd serve --home {home}")


@main.command()
@click.option(
    "--config", "config_file", type=click.Path(dir_okay=False, path_type=Path), help="coordinator.yaml"
)
@click.option(
    "--home", type=click.Path(file_okay=False, path_type=Path), help="Directory made by `musterd init`."
)
@click.option(
    "--log-format",
    type=click.Choice(["auto", "json", "console"]),
    default="auto",
    show_default=True,
    help="How to log to standard error; auto is console on a terminal.",
)
def serve(config_file: Path | None, home: Path | None, log_format: str) -> None:
    """Serve until SIGTERM or SIGINT."""
    console = sys.stderr.isatty() if log_format == "auto" else log_format == "console"
    _configure_logs(console=console)
    try:
        settings = (
            configuration.CoordinatorConfig() if config_file is None else configuration.load(config_file)
        )
    except configuration.SettingError as error:
        _fail(str(error), EXIT_USAGE)
    if home is None and settings.home is not None:
        home = (config_file.parent if config_file else Path()) / settings.home
    if home is None:
        _fail(
            "home: missing; say --home DIR (made by `musterd init DIR`) or `home:` in the config", EXIT_USAGE
        )
        return
    _make_room()
    try:
        coordinator = Coordinator(home, settings)
        _share_one_heap()
        with asyncio.Runner(loop_factory=WholeTurns) as runner:
            runner.run(_serve(coordinator, home))
    except IdentityError as error:
        _fail(str(error), EXIT_USAGE)
    except (StartError, JournalError) as error:
        _fail(str(error), EXIT_FAILED)


def _share_one_heap() -> None:
    """glibc gives each thread a heap of its own, and each keeps its largest fill: chunks of uploads pass through
    a dozen threads.  One heap halved the growth while agents upload (60 to 40 MiB) and took fewer page faults.
    Other C libraries have no such call, and no such heaps."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def _make_room() -> None:
    """Thousands of sessions need as many descriptors, and fewer searches for cyclic garbage: with 2,000
    sessions, going through all that is there took a sixth of what the coordinator did."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    gc.set_threshold(50_000, 50, 100)


async def _serve(coordinator: Coordinator, home: Path) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    addresses = await coordinator.start()
    gc.collect()
    gc.freeze()  # what is there now stays
    _announce(addresses, home)
    await stop.wait()
    structlog.get_logger("coordinator.daemon").info("stopping")
    await coordinator.stop()


def _announce(addresses: Addresses, home: Path) -> None:
    """The one line on standard output: whoever started us may wait for it."""
    click.echo(
        f"musterd: serving {home} on {addresses.main} (enrolment {addresses.enroll}, metrics {addresses.metrics}); "
        f"create a join token with: muster --identity {home / 'admin.json'} token create"
    )
    sys.stdout.flush()


@main.command()
@click.option(
    "--home",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Directory made by `musterd init`.",
)
@click.option("--until", type=click.IntRange(min=0), help="Stop after this record; default: the last one.")
def replay(home: Path, until: int | None) -> None:
    """Fold the journal of HOME and print the state as JSON, also while it is being served."""
    path = home / "journal.db"
    if not path.exists():
        _fail(f"journal {path}: there is none; this coordinator has never served", EXIT_USAGE)
    try:
        # A copy, so that looking changes nothing: not the file, and not what a crash has left beside it.
        with tempfile.TemporaryDirectory(prefix="musterd-replay-") as directory:
            copied = Path(directory) / "journal.db"
            copy(path, copied)
            with Journal(copied) as journal:
                if until is not None and until > journal.last_sequence:
                    _fail(f"--until {until}: the last record is {journal.last_sequence}", EXIT_USAGE)
                state = restore(journal, Timing.from_lease(configuration.CoordinatorConfig().lease), until)
    except JournalError as error:
        _fail(str(error).replace(str(copied), str(path)), EXIT_FAILED)
    click.echo(json.dumps(json.loads(codec.encode_state(state)), indent=2, ensure_ascii=False))


@main.command("backup")
@click.option(
    "--home",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Directory made by `musterd init`.",
)
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
def make_backup(home: Path, out: Path) -> None:
    """Write the journal and the keys of HOME to the new file OUT, also while it is being served.

    Whoever has OUT is the coordinator: keep it like the keys.  Blobs are not in it; copy HOME/blobs too."""
    try:
        made = backup.make(home, out)
    except (backup.BackupError, IdentityError) as error:
        _fail(str(error), EXIT_USAGE)
    except JournalError as error:
        _fail(str(error), EXIT_FAILED)
    except OSError as error:
        _fail(f"{out}: {error.strerror or error}", EXIT_FAILED)
    click.echo(f"wrote {out}: {made.last_record} records, {', '.join(made.digests)}; no blobs")


@main.command("restore")
@click.option(
    "--home", required=True, type=click.Path(path_type=Path), help="New directory to make of the backup."
)
@click.argument("archive", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def restore_backup(home: Path, archive: Path) -> None:
    """Make a coordinator's home of what `musterd backup` wrote.

    What was decided after the backup is not known to it: stop jobs that ran on before you serve it."""
    try:
        made = backup.restore(archive, home)
    except backup.BackupError as error:
        _fail(str(error), EXIT_USAGE)
    except OSError as error:
        _fail(f"home {home}: {error.strerror or error}", EXIT_FAILED)
    when = dt.datetime.fromtimestamp(made.made_unix_ms / 1000, dt.UTC).isoformat(timespec="seconds")
    click.echo(f"made {home}: {made.last_record} records, as of {when}")
    click.echo(f"next: copy the old home's blobs to {home / 'blobs'}, then musterd serve --home {home}")


@main.group()
def operator() -> None:
    """Identities of people: admins, who may command, and observers, who may look."""


@operator.command("issue")
@click.option("--home", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--role", type=click.Choice(["admin", "observer"]), default="observer", show_default=True)
@click.option("--address", default="localhost:7470", show_default=True, callback=_address)
@click.option(
    "--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="File to write, mode 0600."
)
@click.argument("name", callback=_name)
def issue(home: Path, role: str, address: str, out: Path, name: str) -> None:
    """Make an identity file for the operator NAME."""
    if out.exists():
        _fail(f"{out}: exists already; name another file", EXIT_USAGE)
    try:
        Authority.load(home).issue_operator(Role(role), name, address).save(out)
    except IdentityError as error:
        _fail(str(error), EXIT_USAGE)
    except OSError as error:
        _fail(f"{out}: {error.strerror or error}", EXIT_FAILED)
    click.echo(f"wrote {out}: {role} {name}")


@operator.command("revoke")
@click.option("--home", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--role", type=click.Choice(["admin", "observer"]), default="observer", show_default=True)
@click.argument("name", callback=_name)
def revoke(home: Path, role: str, name: str) -> None:
    """Refuse the identity of the operator NAME from now on, also while serving."""
    RevokedOperators(home).add(Role(role), name)
    click.echo(f"revoked {role} {name}")


def _configure_logs(*, console: bool) -> None:
    # Plain tracebacks: the pretty ones show local variables, and with them secrets.
    renderer: structlog.types.Processor = (
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
        if console
        else structlog.processors.JSONRenderer()
    )
    chain: list[structlog.types.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if not console:
        chain.append(structlog.processors.format_exc_info)
    structlog.configure(
        processors=[*chain, renderer],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


if __name__ == "__main__":
    main()
