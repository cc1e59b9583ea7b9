"""How a client reaches its server: address, security, patience."""

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict
from urllib.parse import SplitResult, urlsplit

SCHEMES = ("http", "https", "grpc", "grpcs")
DEFAULT_PORTS = {"grpc": 50051, "grpcs": 50051}


@dataclass(frozen=True, kw_only=True, slots=True)
class Tls:
    """PEM files for https:// and grpcs://: whom to trust beside (instead of) the system's
    authorities, and the certificate to show where the server asks for one.
    """

    ca_file: Path | str | None = None
    cert_file: Path | str | None = None
    key_file: Path | str | None = None

    def __post_init__(self) -> None:
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file go together; give both or neither.")

    def ssl_context(self) -> ssl.SSLContext:
        """As HTTP takes it. Raises OSError for a file that is not there or not PEM."""
        context = ssl.create_default_context(cafile=self.ca_file)
        if self.cert_file is not None:
            context.load_cert_chain(self.cert_file, self.key_file)
        return context


@dataclass(frozen=True, kw_only=True, slots=True)
class Retry:
    """Up to `max_attempts` tries, for lost connections and full servers, before the first token.

    Waits grow from `base_s` by doubling, with jitter. What a server asks for with Retry-After is
    waited for instead; more than `max_wait_s` is not, and the error is raised at once.
    """

    max_attempts: int = 3
    base_s: float = 0.25
    max_wait_s: float = 10.0

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts is {self.max_attempts}; it must be at least 1.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How long a request may take, its retries included (None: no end).

    Over gRPC a server takes the call's deadline for a latency budget, and refuses what it cannot
    keep: so it is told of a limit only if that is the user's own, not the default.
    """

    limit_s: float | None
    is_told: bool


class ClientOptions(TypedDict, total=False):
    """What a client takes beside its address.

    api_key            sent as a bearer token
    model              for requests that name none; without it, the server's first model
    timeout_s          from a call to its last token, retries included; None: no end. Default 600.
                       Over gRPC, one that is given is the call's deadline, and so a latency budget
    connect_timeout_s  for one attempt to connect. Default 5
    retry, tls         as they say
    openai_only        send only fields that OpenAI has, for other servers; token ids stay unknown
    """

    api_key: str | None
    model: str | None
    timeout_s: float | None
    connect_timeout_s: float
    retry: Retry
    tls: Tls | None
    openai_only: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """A checked address and the options of a client; raises ValueError where they do not fit."""

    url: str
    api_key: str | None = None
    model: str | None = None
    timeout_s: float | None = 600.0
    connect_timeout_s: float = 5.0
    retry: Retry = Retry()
    tls: Tls | None = None
    openai_only: bool = False

    def __post_init__(self) -> None:
        parts = self.parts
        if parts.scheme not in SCHEMES or not parts.hostname:
            raise ValueError(
                f"{self.url!r} is not an address such as http://127.0.0.1:8000 or "
                "grpc://127.0.0.1:50051 (https:// and grpcs:// with TLS)."
            )
        if self.is_grpc and parts.path.strip("/"):
            raise ValueError(f"{self.url!r}: a gRPC address has no path.")
        if self.is_grpc and self.openai_only:
            raise ValueError("openai_only is about HTTP; a gRPC address is always Shardline.")
        if self.tls is not None and not self.is_secure:
            raise ValueError(f"{self.url!r} does not use TLS; say https:// or grpcs://.")

    @property
    def parts(self) -> SplitResult:
        """The address, taken apart."""
        return urlsplit(self.url)

    @property
    def is_grpc(self) -> bool:
        """Which door."""
        return self.parts.scheme in ("grpc", "grpcs")

    @property
    def is_secure(self) -> bool:
        """With TLS."""
        return self.parts.scheme in ("https", "grpcs")

    @property
    def grpc_target(self) -> str:
        """host:port as gRPC takes it, with brackets around an IPv6 address."""
        host = self.parts.hostname or ""
        host = f"[{host}]" if ":" in host else host
        return f"{host}:{self.parts.port or DEFAULT_PORTS[self.parts.scheme]}"

    @property
    def http_base(self) -> str:
        """Without a trailing /v1, which users of other clients are used to adding."""
        return self.url.rstrip("/").removesuffix("/v1").rstrip("/")
