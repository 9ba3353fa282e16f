"""Chooses a share of the requests by their ids."""

import hashlib


def in_share(request_id: str, share: float, purpose: str) -> bool:
    """Whether the request belongs to the share, 0 to 1. The same id always gets the same answer, and a larger share has every
    request of a smaller one. Each `purpose` chooses for itself."""
    digest = hashlib.sha256(f"{purpose}\0{request_id}".encode()).digest()
    return int.from_bytes(digest[:8]) < share * 2**64
