"""Addresses of servers: IPv4, IPv6 and names."""

from __future__ import annotations

import socket

_BACKLOG = 128


def place(host: str, port: int) -> str:
    """Join a host and a port; an IPv6 address stands in brackets.

    >>> place("::1", 80), place("[::1]", 80), place("127.0.0.1", 80)
    ('[::1]:80', '[::1]:80', '127.0.0.1:80')
    """
    bare = _bare(host)
    return f"[{bare}]:{port}" if ":" in bare else f"{bare}:{port}"


def url(host: str, port: int) -> str:
    """Write the URL of a server.

    >>> url("fe80::1%eth0", 80)
    'http://[fe80::1%25eth0]:80'
    """
    return f"http://{place(host, port).replace('%', '%25')}"


def listen(host: str, port: int) -> socket.socket:
    """Open a socket on an address; "::" is all addresses, and a name is its first IPv4 one.

    Raises: OSError for an address that this machine does not have, and for a port that is taken.
    """
    found = socket.getaddrinfo(_bare(host), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, _, _, _, address = min(found, key=lambda each: each[0] != socket.AF_INET)
    dual = family == socket.AF_INET6 and address[0] == "::" and socket.has_dualstack_ipv6()
    return socket.create_server(address, family=family, backlog=_BACKLOG, dualstack_ipv6=dual)


def _bare(host: str) -> str:
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host
