"""Binds the server's address, before anything slow begins."""

import errno
import socket
from typing import Any

BACKLOG = 2048
# Errors of an address that this machine does not have. If a host name has several addresses, the others are enough.
MISSING = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


def listen(host: str, port: int) -> list[socket.socket]:
    """Open a listening socket for each address of `host`, all on the same port. Port 0 takes a free one.

    The sockets listen at once, because a socket that is only bound does not stop another server from taking the port. Clients
    can connect, and wait until the server accepts them. Raises ValueError with the reason if an address cannot be bound.
    """
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, ValueError) as error:  # ValueError: the text cannot be a host name
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
        new.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a restart need not wait for old connections to end
        if family == socket.AF_INET6:
            new.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # IPv4 has its own socket
        new.bind(address)
        new.listen(BACKLOG)
    except OSError:
        new.close()
        raise
    return new
