"""A coordinator's home in one file, made while it serves: the journal, the keys, the operators' identity.

A tar whose first member names the others and their digests.  Blobs are not in it: they are large, named
by their digest and never change, so any copy of the directory (or the bucket itself) serves.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from coordinator.core.model import Timing
from coordinator.identity import Authority, IdentityError
from coordinator.journal import Journal, JournalError, copy
from coordinator.loop import restore as fold

FORMAT = "muster-backup-1"
CONTENTS = "backup.json"
NEEDED = ("journal.db", "authority.pem", "authority.key")
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
_LEFT_OUT = re.compile(r"^(\..*|journal\.db.*|logs\.db.*)$")
"""Files of a home that are no use elsewhere, or are copied in another way."""


class BackupError(Exception):
    """A backup cannot be made or restored; the message names the file, what was found and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What a backup says of itself."""

    format: str
    made_unix_ms: int
    last_record: int
    digests: dict[str, str]  # SHA-256, hex, by name


def make(home: Path, out: Path) -> Contents:
    """Write a backup of `home` to the new file `out`, mode 0600.  Raise BackupError, JournalError or OSError."""
    if out.exists():
        raise BackupError(f"{out}: exists already; name another file")
    if not (home / "journal.db").exists():
        raise BackupError(f"journal {home / 'journal.db'}: there is none; this coordinator has never served")
    Authority.load(home)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as directory:
        journal = Path(directory) / "journal.db"
        copy(home / "journal.db", journal)
        with Journal(journal) as copied:
            last_record = copied.last_sequence
        files = {"journal.db": journal} | {
            path.name: path
            for path in sorted(home.iterdir())
            if path.is_file() and not path.is_symlink() and not _LEFT_OUT.fullmatch(path.name)
        }
        contents = Contents(
            format=FORMAT,
            made_unix_ms=int(time.time() * 1000),
            last_record=last_record,
            digests={name: _digest(path) for name, path in files.items()},
        )
        archive = Path(directory) / "archive"
        with (
            open(os.open(archive, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file,
            tarfile.open(fileobj=file, mode="w") as tar,
        ):
            said = json.dumps(asdict(contents), indent=1).encode()
            tar.addfile(_member(CONTENTS, len(said)), io.BytesIO(said))
            for name, path in files.items():
                with path.open("rb") as source:
                    tar.addfile(_member(name, path.stat().st_size), source)
            tar.close()
            file.flush()
            os.fsync(file.fileno())
        os.link(archive, out)  # refuses to replace a file that has appeared meanwhile
    return contents


def restore(archive: Path, home: Path) -> Contents:
    """Make the new directory `home` of a backup.  It is there whole or not at all, and never in place of another.

    Raise BackupError, JournalError, IdentityError or OSError."""
    if home.exists() and (not home.is_dir() or any(home.iterdir())):
        raise BackupError(f"home {home}: it is not empty and is left as it is; name a new directory")
    home.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=home.parent, prefix=f".{home.name}."))
    try:
        contents = _unpack(archive, made)
        Authority.load(made)
        with Journal(made / "journal.db") as journal:
            fold(journal, Timing.from_lease(10_000))
        made.rename(home)
    except BaseException as error:
        shutil.rmtree(made, ignore_errors=True)
        if isinstance(error, JournalError | IdentityError):
            raise BackupError(f"backup {archive}: {str(error).replace(str(made), 'its')}") from error
        raise
    return contents


def _unpack(archive: Path, into: Path) -> Contents:
    try:
        with tarfile.open(archive, mode="r:") as tar:
            contents = _contents(tar, archive)
            for name, digest in contents.digests.items():
                member = tar.next()
                if member is None or member.name != name or not member.isreg():
                    raise _damaged(archive, f"{name} is missing")
                source = tar.extractfile(member)
                assert source is not None
                with open(os.open(into / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                    shutil.copyfileobj(source, file)
                    file.flush()
                    os.fsync(file.fileno())
                if _digest(into / name) != digest:
                    raise _damaged(archive, f"{name} does not match its digest")
    except (tarfile.TarError, EOFError) as error:
        raise _damaged(archive, str(error)) from error
    return contents


def _contents(tar: tarfile.TarFile, archive: Path) -> Contents:
    first = tar.next()
    found: object = None
    if first is not None and first.name == CONTENTS and first.isreg() and first.size <= 2**20:
        source = tar.extractfile(first)
        assert source is not None
        with contextlib.suppress(ValueError):
            found = json.loads(source.read())
    if not isinstance(found, dict) or not str(found.get("format")).startswith("muster-backup-"):
        raise BackupError(f"backup {archive}: it is not what `musterd backup` makes")
    if found["format"] != FORMAT:
        raise BackupError(
            f"backup {archive}: made by a newer musterd ({found['format']}; this one reads {FORMAT}); upgrade musterd"
        )
    try:
        contents = Contents(**found)
        sound = all(_NAME.fullmatch(n) and isinstance(d, str) for n, d in contents.digests.items())
    except (TypeError, AttributeError):
        sound = False
    if not sound or not set(NEEDED) <= contents.digests.keys():
        raise _damaged(archive, f"{CONTENTS} does not name what a home needs")
    return contents


def _damaged(archive: Path, found: str) -> BackupError:
    return BackupError(f"backup {archive}: damaged ({found}); use another backup")


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.mtime = size, 0o600, int(time.time())
    return member


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
