"""Tell whose the other end of a TCP connection on this machine is.

So no other user can use a server of remoe, or pose as one.

Linux lists every TCP socket with its owner, and only the kernel writes that list. So nobody has to keep a secret, and any HTTP client
works. A socket without an inode belongs to no process any more; the kernel then shows user 0, which proves nothing.

Source: Linux, Documentation/networking/proc_net_tcp.rst.
"""

from __future__ import annotations

import ipaddress
import os
import re
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from remoe_cli.errors import DeployError

_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
_TRIES = 3  # the kernel may leave a line out of a table that changes while it is read
_ANY = ("0.0.0.0", "::")

Address = tuple[str, int]


def known() -> bool:
    """Return whether this system says whose a connection is."""
    return _TABLES[0].exists()


def is_own_user(peer: Address, name: Address) -> bool:
    """Return whether a connection's `peer` is a process of this user or of root.

    `name` is the end of this process.
    """
    return any(uid in (os.geteuid(), 0) for uid, _ in _owners(peer, name))


def is_process(peer: Address, name: Address, pid: int) -> bool:
    """Return whether a connection's `peer` is the process `pid`."""
    return any(f"socket:[{inode}]" in _open_files(pid) for _, inode in _owners(peer, name))


def require_own_listener(host: str, port: int) -> None:
    """Refuse a port of this machine on which another user's process listens, or none.

    Raises: DeployError for such a port.
    """
    if not known():
        return
    for _ in range(_TRIES):
        owners = {uid for address in (host, *_ANY) for uid in _listeners(address, port)}
        if owners == {os.geteuid()}:
            return
        if owners:
            raise DeployError(
                f"Port {port} of {host} belongs to a process of another user (uid {max(owners)}).",
                "Nothing was sent to it. See 'remoe status', then destroy the deployment and deploy again.",
            )
    raise DeployError(f"Nothing listens on port {port} of {host}.", "See 'remoe status' and 'remoe logs NAME'.")


def _owners(near: Address, far: Address) -> list[tuple[int, int]]:
    """List uid and inode of the sockets at `near` that are connected to `far`; there is one, or none."""
    for _ in range(_TRIES if known() else 0):
        found = [(uid, inode) for uid, inode in _lines(_forms(near), _forms(far), r"\w\w") if inode]
        if found:
            return found
    return []


def _listeners(host: str, port: int) -> Iterator[int]:
    everybody = [f"{'0' * length}:0000" for length in (8, 32)]
    yield from (uid for uid, _ in _lines(_forms((host, port)), everybody, "0A"))


def _lines(near: list[str], far: list[str], state: str) -> Iterator[tuple[int, int]]:
    """Yield uid and inode of the lines with these addresses and state."""
    line = re.compile(rf": (?:{'|'.join(near)}) (?:{'|'.join(far)}) {state} \S+ \S+ +\S+ +(\d+) +\d+ (\d+) ")
    for table in _TABLES:
        if table.exists():
            yield from ((int(uid), int(inode)) for uid, inode in line.findall(table.read_text(encoding="ascii")))


def _forms(address: Address) -> list[str]:
    """Write an address as the tables do; an IPv4 one also as a socket for IPv6 has it.

    >>> _forms(("::1", 8080))  # on a little-endian machine
    ['00000000000000000000000001000000:1F90']
    """
    ip = ipaddress.ip_address(address[0].partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped:
        ip = ip.ipv4_mapped
    packed = [ip.packed] if ip.version == 6 else [ip.packed, bytes(10) + b"\xff\xff" + ip.packed]
    return ["".join(f"{word:08X}" for word in struct.unpack(f"={len(each) // 4}I", each)) + f":{address[1]:04X}" for each in packed]


def _open_files(pid: int) -> set[str]:
    found = set()
    folder = f"/proc/{pid}/fd"
    with suppress(OSError):  # the process has ended
        for name in os.listdir(folder):
            with suppress(OSError):  # it has closed this file meanwhile
                found.add(os.readlink(f"{folder}/{name}"))
    return found
