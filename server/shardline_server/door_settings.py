"""The settings of both doors: where they listen, whom they let in, and how much they take."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ByteSize, Field

from shardline_server.budgets import BudgetClasses
from shardline_server.door_config import DoorConfig, DoorLimits, TlsFiles
from shardline_server.flags import CommaSeparated, Count, Flag, Port, Seconds, WrittenAsYaml
from shardline_server.request_fields import MAX_BIASES, MAX_CHOICES, MAX_N, MAX_STOP_STRINGS

_Text = Annotated[str, Field(min_length=1)]


class DoorSettings(BaseModel):
    """A part of `ServeSettings`."""

    host: Annotated[str, Flag("HTTP and gRPC", "ADDRESS")] = Field(
        "127.0.0.1", description="the address both doors listen at; 0.0.0.0 for every one"
    )
    port: Annotated[Port, Flag("HTTP and gRPC", "PORT")] = Field(
        8000, description="of HTTP; 0 takes a free one"
    )
    grpc_port: Annotated[Port, Flag("HTTP and gRPC", "PORT")] = Field(
        50051, description="of gRPC; 0 takes a free one"
    )
    admin_port: Annotated[Port | None, Flag("HTTP and gRPC", "PORT")] = Field(
        None, description="of /metrics and /docs [default: that of HTTP]"
    )
    default_max_tokens: Annotated[Count, Flag("HTTP and gRPC", "TOKENS")] = Field(
        512, description="output limit of a request that names none"
    )

    api_key: Annotated[tuple[_Text, ...], *CommaSeparated, Flag("Who may come in", "KEY")] = Field(
        (),
        repr=False,
        description="a key that clients must show, or TENANT=KEY; may be repeated",
    )
    api_key_file: Annotated[Path | None, Flag("Who may come in", "FILE")] = Field(
        None, description="more of them, one a line; read again on SIGHUP"
    )
    tls_cert: Annotated[Path | None, Flag("Who may come in", "FILE")] = Field(
        None, description="PEM certificate chain; with it both doors speak TLS only"
    )
    tls_key: Annotated[Path | None, Flag("Who may come in", "FILE")] = Field(
        None, description="its private key"
    )
    tls_client_ca: Annotated[Path | None, Flag("Who may come in", "FILE")] = Field(
        None, description="PEM authorities; clients must show a certificate of theirs"
    )
    cors_origin: Annotated[tuple[_Text, ...], *CommaSeparated, Flag("Who may come in", "URL")] = (
        Field((), description="a web page's origin that may call us, or *; may be repeated")
    )

    max_body_size: Annotated[ByteSize, Flag("Limits", "SIZE")] = Field(
        ByteSize(16 * 1024**2), gt=0, description="of a request, over HTTP and gRPC"
    )
    max_header_size: Annotated[ByteSize, Flag("Limits", "SIZE")] = Field(
        ByteSize(32 * 1024), gt=0, description="of all its headers"
    )
    read_timeout: Annotated[Seconds, Flag("Limits", "SECONDS")] = Field(
        30.0, description="for a request to arrive whole, once it has begun"
    )
    write_timeout: Annotated[Seconds, Flag("Limits", "SECONDS")] = Field(
        60.0, description="a client that reads nothing for so long is cut off"
    )
    max_unread_pieces: Annotated[Count, Flag("Limits", "N")] = Field(
        4096, description="of a choice; a client that is further behind is cut off"
    )
    max_prompts: Annotated[Count, Flag("Limits", "N")] = Field(
        128, le=MAX_CHOICES, description="in one request"
    )
    max_n: Annotated[Count, Flag("Limits", "N")] = Field(
        MAX_N, le=MAX_N, description="choices of one prompt"
    )
    max_stop_strings: Annotated[Count, Flag("Limits", "N")] = Field(
        MAX_STOP_STRINGS, le=MAX_STOP_STRINGS, description="in one request"
    )
    max_logit_bias: Annotated[Count, Flag("Limits", "N")] = Field(
        MAX_BIASES, le=MAX_BIASES, description="entries in one request"
    )
    max_tenant_requests: Annotated[Count | None, Flag("Limits", "N")] = Field(
        None, description="of one tenant at a time; more are refused with 429 [default: no limit]"
    )

    budget_classes: Annotated[BudgetClasses, *WrittenAsYaml, Flag("Latency budgets", "YAML")] = (
        Field(
            BudgetClasses(),
            description="limits of the priorities, as '{interactive: {ttft_ms: 500, tpot_ms: 50}}'",
        )
    )
    default_priority: Annotated[
        Literal["interactive", "standard", "batch"], Flag("Latency budgets")
    ] = Field("standard", description="of a request that names none")

    def door_config(self) -> DoorConfig:
        """As both doors take it."""
        tls = None
        if self.tls_cert is not None and self.tls_key is not None:
            tls = TlsFiles(cert=self.tls_cert, key=self.tls_key, client_ca=self.tls_client_ca)
        return DoorConfig(
            api_keys=self.api_key,
            api_key_file=self.api_key_file,
            tls=tls,
            cors_origins=self.cors_origin,
            admin_port=self.admin_port,
            limits=DoorLimits(
                max_body_bytes=int(self.max_body_size),
                max_header_bytes=int(self.max_header_size),
                read_timeout_s=self.read_timeout,
                write_timeout_s=self.write_timeout,
                max_unread_pieces=self.max_unread_pieces,
                max_prompts=self.max_prompts,
                max_n=self.max_n,
                max_stop_strings=self.max_stop_strings,
                max_logit_bias=self.max_logit_bias,
                max_tenant_requests=self.max_tenant_requests,
            ),
        )
