"""Tell whose the other end of a TCP connection on this machine is.

So no other user can use a server of remoe, or pose as one. Linux's kernel knows the owner of every socket, and tells it in microseconds. So
nobody has to keep a secret, and any HTTP client works. (/proc/net/tcp has the same, but reading it takes 20 ms where the kernel's table of
sockets is large.) A socket without an inode belongs to no process any more; the kernel then names user 0, which proves nothing.

Source: sock_diag(7); Linux, include/uapi/linux/inet_diag.h.
"""

from __future__ import annotations

import functools
import ipaddress
import os
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass

from remoe_cli.errors import DeployError

_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST = 4, 20, 1
_HEADER = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_WANTED = struct.Struct("=BBBBI")  # inet_diag_req_v2: family, protocol, extensions, padding, states
_ENDS = struct.Struct("!HH16s16s")  # inet_diag_sockid: source port, destination port, source, destination; then
_REST = struct.Struct("=III")  # the interface and the cookie, of which any will do
_FOUND = struct.Struct("=BBBB")  # inet_diag_msg: family, state, timer, retransmissions; then the ends, and
_OWNER = struct.Struct("=IIIII")  # expiry, both queues, user, inode
_ALL, _LISTEN = 0xFFFFFFFF, 10

Address = tuple[str, int]


@dataclass(frozen=True)
class _Socket:
    listens: bool
    far_port: int
    uid: int
    inode: int


@functools.cache
def known() -> bool:
    """Return whether this system says whose a connection is."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return _find(probe.getsockname(), ("127.0.0.1", 1)) is not None


def is_own_user(peer: Address, name: Address) -> bool:
    """Return whether a connection's `peer` is a process of this user or of root.

    `name` is the end of this process.
    """
    found = _connected(peer, name)
    return found is not None and found.uid in (os.geteuid(), 0)


def is_process(peer: Address, name: Address, pid: int) -> bool:
    """Return whether a connection's `peer` is the process `pid`."""
    found = _connected(peer, name)
    return found is not None and f"socket:[{found.inode}]" in _open_files(pid)


def require_own_listener(host: str, port: int) -> None:
    """Refuse a port of this machine on which another user's process listens, or none.

    Raises: DeployError for such a port.
    """
    if not known():
        return
    found = _find((host, port), (host, 0))  # who would get a connection
    if found is None or not found.listens:
        raise DeployError(f"Nothing listens on port {port} of {host}.", "See 'remoe status' and 'remoe logs NAME'.")
    if found.uid != os.geteuid():
        raise DeployError(
            f"Port {port} of {host} belongs to a process of another user (uid {found.uid}).",
            "Nothing was sent to it. See 'remoe status', then destroy the deployment and deploy again.",
        )


def _connected(near: Address, far: Address) -> _Socket | None:
    """Return the socket of a process at `near` that is connected to `far`."""
    found = _find(near, far)
    return found if found and found.inode and not found.listens and found.far_port == far[1] else None


def _find(near: Address, far: Address) -> _Socket | None:
    """Return the socket at `near` that gets what `far` sends: the one that is connected to it, else one that listens."""
    ends = [(ipaddress.ip_address(address.partition("%")[0]), port) for address, port, *_ in (near, far)]
    plain = [((ip.ipv4_mapped or ip) if isinstance(ip, ipaddress.IPv6Address) else ip, port) for ip, port in ends]
    family = socket.AF_INET6 if plain[0][0].version == 6 else socket.AF_INET
    (source, source_port), (destination, destination_port) = plain
    wanted = _WANTED.pack(family, socket.IPPROTO_TCP, 0, 0, _ALL)
    wanted += _ENDS.pack(source_port, destination_port, source.packed, destination.packed) + _REST.pack(0, _ALL, _ALL)
    header = _HEADER.pack(_HEADER.size + len(wanted), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0)
    try:
        with socket.socket(getattr(socket, "AF_NETLINK", -1), socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as kernel:
            kernel.settimeout(1)
            kernel.send(header + wanted)
            answer = kernel.recv(8192)
    except OSError:
        return None
    if _HEADER.unpack_from(answer)[1] != _SOCK_DIAG_BY_FAMILY:  # an error: there is none
        return None
    state, at = _FOUND.unpack_from(answer, _HEADER.size)[1], _HEADER.size + _FOUND.size
    far_port = _ENDS.unpack_from(answer, at)[1]
    uid, inode = _OWNER.unpack_from(answer, at + _ENDS.size + _REST.size)[3:]
    return _Socket(state == _LISTEN, far_port, uid, inode)


def _open_files(pid: int) -> set[str]:
    found = set()
    folder = f"/proc/{pid}/fd"
    with suppress(OSError):  # the process has ended
        for name in os.listdir(folder):
            with suppress(OSError):  # it has closed this file meanwhile
                found.add(os.readlink(f"{folder}/{name}"))
    return found
