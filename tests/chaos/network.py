"""A network of namespaces: a router in the middle, and one machine on each of its links.

A direction between two machines is cut by a routing rule of the router that drops silently, so that
neither end can notice; a link is made slow by a token bucket.  Needs root and iproute2, nothing else.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

PREFIX = "198.18"
"""RFC 2544: addresses for laboratories, which no network uses."""
ROUTER = 254
OPERATOR = 253
"""This process's own machine, in its own namespace."""


def unavailable() -> str:
    """Why there can be no such network here; empty if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None or shutil.which("tc") is None:
        return "iproute2 (ip, tc) is not installed"
    probe = f"muster-{os.getpid()}-probe"
    done = _ip("netns", "add", probe, check=False)
    if done.returncode:
        return f"no network namespace can be made: {done.stderr.strip()}"
    try:
        for attempt in (
            ("-n", probe, "link", "add", "p0", "type", "veth", "peer", "name", "p1"),
            ("-n", probe, "rule", "add", "pref", "9", "iif", "p0", "to", "198.18.0.1", "blackhole"),
        ):
            done = _ip(*attempt, check=False)
            if done.returncode:
                return f"ip {' '.join(attempt[2:])}: {done.stderr.strip()}"
    finally:
        _ip("netns", "del", probe)
    return ""


def _ip(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *arguments], check=check, capture_output=True, text=True, timeout=30)


class Network:
    """Machines by name.  Use as a context manager; what is left of runs that were killed goes too."""

    def __init__(self, names: Sequence[str]) -> None:
        self._mark = f"muster-{os.getpid()}"
        self._names = list(names)
        self._router = f"{self._mark}-router"
        self._own = f"mst{os.getpid()}"  # an interface of our own namespace; 15 characters at most
        self._net = f"{PREFIX}.{os.getpid() % 250}"
        self._cuts: list[tuple[str, ...]] = []

    def address(self, name: str) -> str:
        return f"{self._net}.{1 + self._names.index(name)}"

    def inside(self, name: str) -> tuple[str, ...]:
        """What to put before a command that is to run on this machine."""
        return ("ip", "netns", "exec", self._namespace(name))

    def cut(self, source: str, target: str) -> None:
        """From now on nothing that `source` sends arrives at `target`."""
        rule = ("iif", self._port(source), "to", self.address(target), "blackhole")
        _ip("-n", self._router, "rule", "add", "pref", str(100 + len(self._cuts)), *rule)
        self._cuts.append(rule)

    def part(self, name: str, *others: str) -> None:
        """Nothing passes between `name` and the others any more, in either direction."""
        for other in others:
            self.cut(name, other)
            self.cut(other, name)

    def heal(self) -> None:
        """Everything arrives again, at full speed."""
        for rule in self._cuts:
            _ip("-n", self._router, "rule", "del", *rule)
        self._cuts.clear()
        for name in self._names:
            for namespace, device in self._ends(name):
                with contextlib.suppress(subprocess.CalledProcessError):
                    self._tc(namespace, "del", "dev", device, "root")

    def shape(self, name: str, mbit: float) -> None:
        """Make the machine's link so slow, in each direction."""
        for namespace, device in self._ends(name):
            bucket = ("tbf", "rate", f"{mbit}mbit", "burst", "32kb", "latency", "200ms")
            self._tc(namespace, "replace", "dev", device, "root", *bucket)

    # ------------------------------------------------------------------------- making and removing

    def __enter__(self) -> Self:
        for namespace in _abandoned():
            _ip("netns", "del", namespace, check=False)
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        _ip("link", "del", self._own, check=False)
        for namespace in (self._router, *map(self._namespace, self._names)):
            _ip("netns", "del", namespace, check=False)

    def _make(self) -> None:
        router = self._router
        _ip("netns", "add", router)
        forward = "/proc/sys/net/ipv4/ip_forward"
        subprocess.run(["ip", "netns", "exec", router, "sh", "-c", f"echo 1 > {forward}"], check=True)
        for name in self._names:
            namespace, port = self._namespace(name), self._port(name)
            _ip("netns", "add", namespace)
            _ip("-n", namespace, "link", "set", "lo", "up")
            _ip("link", "add", port, "netns", router, "type", "veth", "peer", "eth0", "netns", namespace)
            self._join(("-n", namespace), "eth0", self.address(name), port)
            _ip("-n", namespace, "route", "add", "default", "via", f"{self._net}.{ROUTER}")
        _ip("link", "add", "own", "netns", router, "type", "veth", "peer", self._own)
        self._join((), self._own, f"{self._net}.{OPERATOR}", "own")
        _ip("route", "add", f"{self._net}.0/24", "via", f"{self._net}.{ROUTER}")

    def _join(self, where: tuple[str, ...], device: str, address: str, port: str) -> None:
        """Give both ends of a link their addresses and bring them up."""
        router = f"{self._net}.{ROUTER}"
        _ip("-n", self._router, "addr", "add", f"{router}/32", "peer", address, "dev", port)
        _ip("-n", self._router, "link", "set", port, "up")
        _ip(*where, "addr", "add", f"{address}/32", "peer", router, "dev", device)
        _ip(*where, "link", "set", device, "up")

    def _ends(self, name: str) -> Iterator[tuple[str, str]]:
        yield self._namespace(name), "eth0"
        yield self._router, self._port(name)

    def _namespace(self, name: str) -> str:
        return f"{self._mark}-{name}"

    def _port(self, name: str) -> str:
        return f"p{self._names.index(name)}"

    @staticmethod
    def _tc(namespace: str, *arguments: str) -> None:
        command = ["tc", "-n", namespace, "qdisc", *arguments]
        subprocess.run(command, check=True, capture_output=True, timeout=30)


def _abandoned() -> list[str]:
    """Namespaces of runs that were killed before they could remove them."""
    found = []
    for line in _ip("netns", "list").stdout.splitlines():
        name = line.split()[0]
        kind, _, rest = name.partition("-")
        owner = rest.partition("-")[0]
        if kind == "muster" and owner.isdigit() and not Path(f"/proc/{owner}").exists():
            found.append(name)
    return found
