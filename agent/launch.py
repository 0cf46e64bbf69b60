"""The last thing that runs before a worker, in its process: limits what it may use and see, then becomes it.

    python -I -S launch.py SETTINGS COMMAND...

Run by its path, with nothing of ours imported: what it does must be done before any other code runs.
SETTINGS is JSON: `open_files`, and `read` and `write`, lists of paths, or null for no confinement.

Confinement is Landlock (linux/landlock.h), which needs no privilege and cannot be taken off again: of the
file system there is only what the lists name, and processes outside can be neither signalled nor traced.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import struct
import sys
from collections.abc import Sequence

OWN_THREADS = "/proc/self/task"

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
RULE_PATH_BENEATH = 1
PR_SET_NO_NEW_PRIVS = 38
SCOPE_SIGNAL = 1 << 1

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
REFER, TRUNCATE = 1 << 13, 1 << 14
READ = EXECUTE | READ_FILE | READ_DIR
FIRST_ABI = (1 << 13) - 1  # every right of the first version
OF_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE  # all others make sense for directories only


def landlock_version() -> int:
    """Of the kernel's Landlock; 0 if it has none."""
    return max(0, _syscall(CREATE_RULESET, None, 0, 1))


def confine(read: Sequence[str], write: Sequence[str]) -> None:
    """Take everything away from this process but these paths and what lies beneath them.  Paths that do not
    exist are passed over.  Raise OSError.

    Its own OWN_THREADS may be written: CUDA names its threads there and gives up (error 304) where it cannot.
    The kernel makes that directory anew when it has forgotten it, so a descriptor stays open to keep the one that
    is allowed.  Other processes, those that this one starts among them, have theirs elsewhere."""
    version = landlock_version()
    handled = FIRST_ABI | (REFER if version >= 2 else 0) | (TRUNCATE if version >= 3 else 0)
    scoped = SCOPE_SIGNAL if version >= 6 else 0
    attributes = struct.pack("QQQ", handled, 0, scoped)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = _checked(_syscall(CREATE_RULESET, attributes, size, 0), "make a Landlock ruleset")
    for paths, rights in ((read, READ), (write, handled)):
        for path in paths:
            _allow(ruleset, path, rights)
    _allow(ruleset, OWN_THREADS, handled & OF_FILES | READ_DIR)
    os.set_inheritable(os.open(OWN_THREADS, os.O_PATH), True)
    _checked(_syscall(RESTRICT_SELF, ruleset, 0), "restrict itself by Landlock")
    os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    if not os.path.isdir(path):  # noqa: PTH112 - pathlib takes longer to import than this program to run
        rights &= OF_FILES
    rule = struct.pack("=Qi", rights, descriptor)
    _checked(_syscall(ADD_RULE, ruleset, RULE_PATH_BENEATH, rule, 0), f"let {path} be used")
    os.close(descriptor)


def _syscall(number: int, *arguments: int | bytes | None) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    wide = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    return int(libc.syscall(ctypes.c_long(number), *wide))


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"cannot {what}: {os.strerror(number)}")
    return result


def main() -> None:
    settings, command = json.loads(sys.argv[1]), sys.argv[2:]
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = settings["open_files"] if most == resource.RLIM_INFINITY else min(most, settings["open_files"])
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None).prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if settings["read"] is not None:
        confine(settings["read"], settings["write"])
    os.execve(command[0], command, os.environ)  # noqa: S606 - a list of arguments, and no shell


if __name__ == "__main__":
    main()
