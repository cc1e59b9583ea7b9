"""API keys and the tenants behind them: one check for both doors."""

import hashlib
import hmac
import re
from collections.abc import Mapping
from pathlib import Path

from shardline_server.door_config import DoorConfig
from shardline_server.errors import AuthenticationFailed, ConfigError, InvalidRequest

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


def read_keys(door: DoorConfig) -> dict[str, str]:
    """All keys and their tenants; a key without a name is tenant `key1`, `key2`, …

    What stands before `=` counts as a name only if it can be one and something else than the
    padding of base64 follows. Raises ConfigError, which shows no key.
    """
    lines = [*door.api_keys]
    if door.api_key_file is not None:
        lines += _lines_of(door.api_key_file)
    named: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        tenant, _, key = line.partition("=")
        if not (_TENANT.fullmatch(tenant) and key.strip("=")):
            tenant, key = f"key{number}", line
        if named.setdefault(key, tenant) != tenant:
            raise ConfigError(f"tenants {named[key]} and {tenant} have the same API key")
    return named


def _lines_of(file: Path) -> list[str]:
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the API keys in {file}: {error}") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"{file} holds no API key, and without one everybody could come in")
    return keys


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
