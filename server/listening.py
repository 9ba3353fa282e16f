"""Binding the server's address before anything slow begins."""

import errno
import socket
from typing import Any

BACKLOG = 2048
# The machine has no such address. Of several addresses that a name stands for, the others are enough.
MISSING = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


def listen(host: str, port: int) -> list[socket.socket]:
    """Listening sockets for each address of `host`, all on one port; port 0 takes a free one.

    They listen at once, because a socket that is only bound does not keep another server from taking the same port. Clients
    that connect wait until the server accepts. Raises ValueError with the reason when the address cannot be had.
    """
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, ValueError) as error:  # ValueError: text that cannot be a host's name
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"cannot listen on host {host!r}: {reason}") from error
    sockets: list[socket.socket] = []
    first: OSError | None = None
    for family, _, _, _, (address, _, *scope) in dict.fromkeys(found):
        try:
            sockets.append(_listen(family, (address, port, *scope)))
        except OSError as error:
            first = first or error
            if error.errno not in MISSING:
                break
        else:
            port = sockets[0].getsockname()[1]
    if first is not None and (not sockets or first.errno not in MISSING):
        for each in sockets:
            each.close()
        raise ValueError(f"cannot listen on {host}, port {port}: {first.strerror}") from first
    return sockets


def _listen(family: int, address: tuple[Any, ...]) -> socket.socket:
    new = socket.socket(family, socket.SOCK_STREAM)
    try:
        new.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a restart need not wait for the last connections' end
        if family == socket.AF_INET6:
            new.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # IPv4 has a socket of its own
        new.bind(address)
        new.listen(BACKLOG)
    except OSError:
        new.close()
        raise
    return new
