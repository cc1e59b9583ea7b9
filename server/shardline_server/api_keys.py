"""API keys and the tenants behind them: one check for both doors."""

import hashlib
import hmac
import re
from collections.abc import Mapping, Sequence

from shardline_server.errors import AuthenticationFailed, InvalidRequest

TENANT_HEADER = "X-Tenant"
_TENANT = re.compile(r"[\w.@:/-]{1,64}")


class ApiKeys:
    """The keys that open the server, each with its tenant; without any it is open to all."""

    def __init__(self, tenants: Mapping[str, str]) -> None:
        """`tenants` maps keys to names."""
        self._tenants: dict[bytes, str] = {}
        self.replace(tenants)

    def replace(self, tenants: Mapping[str, str]) -> None:
        """From now on these keys count; requests that run go on."""
        self._tenants = {_digest(key): tenant for key, tenant in tenants.items()}

    def tenant_of(self, key: str | None, named: str | None) -> str:
        """Whose request it is: the key's tenant; where there are no keys, what the client says.

        Raises AuthenticationFailed, equally late for every wrong key, and InvalidRequest for a
        name that cannot be one.
        """
        if not self._tenants:
            return _checked(named)
        if key is None:
            raise AuthenticationFailed("An API key is needed: send Authorization: Bearer KEY.")
        digest = _digest(key)
        matches = [
            name for known, name in self._tenants.items() if hmac.compare_digest(digest, known)
        ]
        if not matches:
            raise AuthenticationFailed("This API key is not valid here.")
        return matches[0]


def named_keys(keys: Sequence[str]) -> dict[str, str]:
    """Keys and their tenants from `TENANT=KEY`, or from KEY alone: then `key1`, `key2`, …

    What stands before `=` counts as a name only if it can be one and something else than the
    padding of base64 follows.
    """
    named = {}
    for number, text in enumerate(keys, 1):
        tenant, _, key = text.partition("=")
        if _TENANT.fullmatch(tenant) and key.strip("="):
            named[key] = tenant
        else:
            named[text] = f"key{number}"
    return named


def bearer_token(authorization: str | None) -> str | None:
    """The key in an Authorization header, or None."""
    scheme, _, key = (authorization or "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" and key.strip() else None


def _checked(tenant: str | None) -> str:
    if tenant and not _TENANT.fullmatch(tenant):
        raise InvalidRequest(
            f"{TENANT_HEADER} must be 1 to 64 letters, digits or any of ._@:/-",
            param=TENANT_HEADER,
        )
    return tenant or ""


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()
