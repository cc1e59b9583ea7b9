"""API keys: one check for both doors."""

import hashlib
import hmac
from collections.abc import Sequence

from shardline_server.errors import AuthenticationFailed


class ApiKeys:
    """The keys that open the server; without any it is open to all."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def check(self, key: str | None) -> None:
        """Raises AuthenticationFailed. Takes equally long for every wrong key."""
        if not self._digests:
            return
        if key is None:
            raise AuthenticationFailed("An API key is needed: send Authorization: Bearer KEY.")
        digest = _digest(key)
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if not any(matches):
            raise AuthenticationFailed("This API key is not valid here.")


def bearer_token(authorization: str | None) -> str | None:
    """The key in an Authorization header, or None."""
    scheme, _, key = (authorization or "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" and key.strip() else None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()
