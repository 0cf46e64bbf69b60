"""Real processes of ours, for tests: started, waited for by what they say, ended by their own id."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

MUSTERD = (sys.executable, "-m", "coordinator.daemon")
STOP_S = 30.0


def init_home(home: Path) -> None:
    """`musterd init`."""
    subprocess.run([*MUSTERD, "init", str(home)], check=True, capture_output=True, timeout=STOP_S)


@dataclass(kw_only=True)
class Musterd:
    """A `musterd serve` that is ready."""

    process: subprocess.Popen[str]
    home: Path
    addresses: dict[str, str]
    ready_line: str

    def kill(self) -> None:
        """SIGKILL, as a power cut would."""
        self.process.kill()
        self.process.wait(STOP_S)
        self._close()

    def stop(self) -> int:
        """SIGTERM; returns the exit status.  Does nothing to a process that has ended."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(STOP_S)
        self._close()
        return status

    def _close(self) -> None:
        if self.process.stdout is not None:
            self.process.stdout.close()

    @property
    def log(self) -> str:
        return (self.home.parent / "musterd.log").read_text()


def start_musterd(
    home: Path, *, lease: str = "10s", addresses: dict[str, str] | None = None, **sections: dict[str, Any]
) -> Musterd:
    """Start `musterd serve` on a home and wait for its ready line; it logs to musterd.log beside the home.

    `addresses` of an earlier process makes this one listen where that one did; `sections` are more of the
    configuration."""
    listen = addresses or dict.fromkeys(("main", "enroll", "metrics"), "127.0.0.1:0")
    config = home.parent / "coordinator.yaml"
    settings = {"lease": lease, "listen": listen, "blobs": {"reserve": 0}, **sections}
    config.write_text(yaml.safe_dump(settings))
    with (home.parent / "musterd.log").open("a") as log:
        process = subprocess.Popen(
            [*MUSTERD, "serve", "--config", str(config), "--home", str(home)],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    assert process.stdout is not None
    ready_line = process.stdout.readline()
    if not ready_line:
        process.wait(STOP_S)
        process.stdout.close()
        raise RuntimeError(f"musterd did not start: {(home.parent / 'musterd.log').read_text()[-2000:]}")
    found = json.loads((home / "run" / "addresses.json").read_text())
    return Musterd(process=process, home=home, addresses=found, ready_line=ready_line)
