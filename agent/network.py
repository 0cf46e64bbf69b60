"""Under which address peers reach this machine, and which interface carries it."""

from __future__ import annotations

import asyncio
import socket

import psutil

from agent.errors import BadInput
from protos import wire


def reaching_address(coordinator: str) -> str:
    """The local address from which packets to the coordinator leave; sends nothing.

    Raise BadInput if the coordinator's name cannot be resolved or no route leads there."""
    host, port = wire.split_address(coordinator)
    try:
        family, _, _, _, target = socket.getaddrinfo(host, port or 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise BadInput(
            f"coordinator {coordinator}: no way there ({error.strerror or error}); check the name, or give the address "
            "at which peers reach this machine with --advertise"
        ) from error


def address_of(interface: str) -> str:
    """The first IPv4 (else IPv6) address of `interface`.  Raise BadInput."""
    addresses = psutil.net_if_addrs()
    if interface not in addresses:
        raise BadInput(
            f"--interface {interface}: no such interface; there are {', '.join(sorted(addresses))}"
        )
    for family in (socket.AF_INET, socket.AF_INET6):
        for address in addresses[interface]:
            if address.family == family:
                return str(address.address).split("%")[0]
    raise BadInput(f"--interface {interface}: it has no IP address; bring it up or choose another")


def interface_of(address: str) -> str | None:
    """The interface that carries this address, given as an address or a name; None if none does."""
    try:
        numbers = {str(info[4][0]) for info in socket.getaddrinfo(address, None)}
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(str(entry.address).split("%")[0] in numbers for entry in addresses):
            return name
    return None


async def reachable(host: str, port: int, timeout_s: float) -> bool:
    """Whether packets pass to the host and back: it accepts a connection, or refuses one."""
    try:
        async with asyncio.timeout(timeout_s):
            _, writer = await asyncio.open_connection(host, port)
    except ConnectionRefusedError:
        return True
    except OSError:  # TimeoutError too
        return False
    writer.close()
    return True
