"""What both doors are told about security and limits, apart from how an operator says it."""

import ssl
from dataclasses import dataclass
from pathlib import Path

from shardline_server.errors import ConfigError
from shardline_server.request_fields import MAX_BIASES, MAX_N, MAX_STOP_STRINGS


@dataclass(frozen=True, kw_only=True, slots=True)
class TlsFiles:
    """PEM files; with `client_ca` every client has to show a certificate of these authorities."""

    cert: Path
    key: Path
    client_ca: Path | None = None

    def check(self) -> None:
        """Raises ConfigError, naming the files, where they cannot be used."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            context.load_cert_chain(self.cert, self.key)
            if self.client_ca is not None:
                context.load_verify_locations(self.client_ca)
        except (OSError, ssl.SSLError) as error:
            names = [str(file) for file in (self.cert, self.key, self.client_ca) if file]
            raise ConfigError(f"TLS cannot use {', '.join(names)}: {error}") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class DoorLimits:
    """How much of the server one client may take; sizes in bytes, times in seconds.

    `max_unread_pieces` is for each choice of a request, `max_tenant_requests` None for no limit.
    """

    max_body_bytes: int = 16 * 1024**2
    max_header_bytes: int = 32 * 1024
    read_timeout_s: float = 30.0
    write_timeout_s: float = 60.0
    max_unread_pieces: int = 4096
    max_prompts: int = 128
    max_n: int = MAX_N
    max_stop_strings: int = MAX_STOP_STRINGS
    max_logit_bias: int = MAX_BIASES
    max_tenant_requests: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DoorConfig:
    """Who may come in, where, and with how much.

    `api_keys` and the lines of `api_key_file` are `KEY` or `TENANT=KEY`. With `admin_port`,
    /metrics and /docs are there and nowhere else.
    """

    api_keys: tuple[str, ...] = ()
    api_key_file: Path | None = None
    tls: TlsFiles | None = None
    cors_origins: tuple[str, ...] = ()
    admin_port: int | None = None
    limits: DoorLimits = DoorLimits()
