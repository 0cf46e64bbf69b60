"""Tickets: the coordinator's signed word that one agent may fetch one blob from the others' caches.

The coordinator signs with the key of its authority, which every agent knows, so whoever serves a blob
need not ask anybody.  A ticket names its holder: shown by another agent it is worth nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from protos import agent_pb2

TICKET_TTL_S = 600
"""Long enough to begin one blob's download on a bad day; a holder that is banned loses it at once where
the coordinator's word arrives, and by this everywhere."""


def _signed(agent_id: str, digest: str, not_after_unix_s: int) -> bytes:
    return f"muster-blob-ticket-1\n{agent_id}\n{digest}\n{not_after_unix_s}\n".encode()


def issue(
    sign: Callable[[bytes], bytes], *, agent_id: str, digest: str, now_unix_s: float
) -> agent_pb2.BlobTicket:
    """A ticket for `agent_id`; `sign` is the authority's."""
    not_after = int(now_unix_s) + TICKET_TTL_S
    return agent_pb2.BlobTicket(
        agent_id=agent_id,
        digest=digest,
        not_after_unix_s=not_after,
        signature=sign(_signed(agent_id, digest, not_after)),
    )


def problem(ticket: agent_pb2.BlobTicket, authority_pem: str, holder: str, now_unix_s: float) -> str:
    """Why this ticket gives `holder` no right now; "" if it does."""
    if ticket.agent_id != holder:
        return f"the ticket is for agent {ticket.agent_id[:80]!r}, and this is {holder}"
    if ticket.not_after_unix_s <= now_unix_s:
        return "the ticket's time is over; ask the coordinator for a new one"
    try:
        _key(authority_pem).verify(
            ticket.signature,
            _signed(ticket.agent_id, ticket.digest, ticket.not_after_unix_s),
            ec.ECDSA(hashes.SHA256()),
        )
    except InvalidSignature:
        return "the ticket is not signed by this fleet's coordinator"
    return ""


@functools.lru_cache(maxsize=4)
def _key(authority_pem: str) -> ec.EllipticCurvePublicKey:
    key = x509.load_pem_x509_certificate(authority_pem.encode()).public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    return key
