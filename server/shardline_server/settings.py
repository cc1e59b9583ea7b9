"""Every setting of `shardline serve`, once: flags, variables, YAML file and help all read this.

The command line wins over SHARDLINE_* variables, those over the file named by `config`, that over
the defaults. What nobody knows is refused, wherever it was set.
"""

import os
from difflib import get_close_matches
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    ByteSize,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from shardline_server.door_settings import DoorSettings
from shardline_server.errors import ConfigError
from shardline_server.flags import CommaSeparated, Count, Flag
from shardline_shards.cache import default_cache_dir

ENV_PREFIX = "SHARDLINE_"
GROUPS = (
    "Model",
    "Splitting",
    "Several nodes",
    "Memory and scheduling",
    "HTTP and gRPC",
    "Who may come in",
    "Latency budgets",
    "Limits",
    "Running",
)


class ServeSettings(DoorSettings, BaseSettings):
    """What the operator asked for; validated, and never changed afterwards."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True)

    model: Annotated[str, Flag("Model")] = Field(
        min_length=1,
        description="a folder of safetensors, a hub id, a .gguf file, or `demo`",
    )
    served_model_name: Annotated[str | None, Flag("Model", "NAME")] = Field(
        None, description="the name clients ask for [default: the last part of MODEL]"
    )
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        Flag("Model"),
    ] = Field(
        "bfloat16", description="what weights and activations are; auto takes the checkpoint's"
    )
    max_model_len: Annotated[Count | None, Flag("Model", "TOKENS")] = Field(
        None, description="longest prompt and output together [default: the model's own limit]"
    )
    load_format: Annotated[Literal["auto", "dummy"], Flag("Model")] = Field(
        "auto", description="dummy gives random weights, for benchmarks"
    )
    seed: Annotated[int, Flag("Model", "N")] = Field(0, description="of the random weights")
    cache: Annotated[Path, Flag("Model", "DIR")] = Field(
        default_factory=default_cache_dir, description="where converted models are kept"
    )

    tp: Annotated[Count, Flag("Splitting", "N", ("--tensor-parallel-size",))] = Field(
        1, description="tensor-parallel shards of each stage"
    )
    pp: Annotated[Count, Flag("Splitting", "N", ("--pipeline-parallel-size",))] = Field(
        1, description="pipeline stages"
    )
    stage_layers: Annotated[
        tuple[Count, ...] | None, *CommaSeparated, Flag("Splitting", "N,N,…")
    ] = Field(None, description="layers of each stage, as 20,10 [default: by what they take]")
    device: Annotated[Literal["auto", "cpu", "cuda"], Flag("Splitting")] = Field(
        "auto", description="auto takes CUDA where there is a GPU for every worker"
    )
    threads_per_worker: Annotated[Count | None, Flag("Splitting", "N")] = Field(
        None, description="CPU threads of a worker [default: the host's cores, shared out]"
    )
    internal_host: Annotated[str | None, Flag("Splitting", "ADDRESS")] = Field(
        None,
        description="the address at which engine and workers reach each other "
        "[default: 127.0.0.1; with several nodes the one that the others come to]",
    )
    iface: Annotated[str | None, Flag("Splitting", "NAME")] = Field(
        None, description="the network interface whose address that is, such as eth0"
    )

    nodes: Annotated[Count | None, Flag("Several nodes", "N")] = Field(
        None,
        description="nodes that hold the stages, this one included "
        "[default: 1, or as many as torchrun or srun has started]",
    )
    rendezvous: Annotated[str | None, Flag("Several nodes", "HOST:PORT")] = Field(
        None,
        description="an address of this node, where the others find it; with --iface :PORT will do",
    )
    secret: Annotated[SecretStr | None, Flag("Several nodes", "TEXT")] = Field(
        None, description="what nodes must know to join; better SHARDLINE_SECRET [default: drawn]"
    )
    node_gpus: Annotated[
        tuple[Count, ...] | None, *CommaSeparated, Flag("Several nodes", "N,N,…")
    ] = Field(
        None,
        description="workers that each node may run, the head's first, as 8,4 "
        "[default: as many as it has GPUs, on CPUs any number]",
    )
    allow_tp_across_nodes: Annotated[bool, Flag("Several nodes")] = Field(
        False, description="let the shards of a stage lie on several nodes, which is slow"
    )
    join_timeout: Annotated[Count, Flag("Several nodes", "SECONDS")] = Field(
        300, description="how long to wait for the other nodes"
    )

    block_size: Annotated[Count | None, Flag("Memory and scheduling", "TOKENS")] = Field(
        None, description="tokens in a block of KV memory [default: 16, on CUDA 256]"
    )
    kv_memory: Annotated[ByteSize | None, Flag("Memory and scheduling", "SIZE")] = Field(
        None, gt=0, description="KV memory of each worker, as 2GiB [default: from free memory]"
    )
    num_kv_blocks: Annotated[Count | None, Flag("Memory and scheduling", "N")] = Field(
        None, description="KV memory in blocks, in place of a size"
    )
    max_num_seqs: Annotated[Count, Flag("Memory and scheduling", "N")] = Field(
        256, description="requests that run at once"
    )
    max_num_batched_tokens: Annotated[Count, Flag("Memory and scheduling", "TOKENS")] = Field(
        2048, description="tokens computed in one step"
    )
    max_in_flight: Annotated[Count | None, Flag("Memory and scheduling", "N")] = Field(
        None, description="steps inside the pipe at once [default: one for each stage]"
    )
    async_scheduling: Annotated[bool | None, Flag("Memory and scheduling")] = Field(
        None,
        description="plan one step more than there are stages, which waits until the first is "
        "free; newcomers come after it [default: with one stage on CUDA, with several on CPUs]",
    )
    max_num_waiting: Annotated[Count, Flag("Memory and scheduling", "N")] = Field(
        1024, description="requests that may wait; more are refused with 503"
    )
    policy: Annotated[Literal["edf", "fcfs"], Flag("Memory and scheduling")] = Field(
        "edf",
        description="edf keeps latency budgets and refuses those it cannot keep; fcfs serves in "
        "the order of arrival, whatever the budgets",
    )
    measure_seconds: Annotated[float, Flag("Memory and scheduling", "SECONDS")] = Field(
        1.0,
        ge=0,
        description="how long to measure step times at start; 0 learns them from requests, and "
        "refuses nobody before",
    )
    enable_prefix_caching: Annotated[bool, Flag("Memory and scheduling")] = Field(
        True, description="reuse the KV memory of equal prompt beginnings"
    )

    cuda_graphs: Annotated[bool, Flag("Memory and scheduling")] = Field(
        True, description="on GPUs, record decode steps as CUDA graphs; off, they are launched anew"
    )

    grace_s: Annotated[float, Flag("Running", "SECONDS")] = Field(
        20.0,
        ge=0,
        description="how long requests may go on after SIGTERM; who would take longer ends at once",
    )
    spare_worker: Annotated[bool, Flag("Running")] = Field(
        True,
        description="keep a process ready to take a dead worker's place: seconds sooner, "
        "for some 300 MB of memory",
    )
    config: Annotated[Path | None, Flag("Running", "FILE")] = Field(
        None, description="a YAML file with any of these settings, as `max_model_len: 4096`"
    )
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Flag("Running")] = Field(
        "info", description="how much is logged to stderr"
    )

    @property
    def model_name(self) -> str:
        """The name that clients ask for; a hub id stays whole, a path gives its last part."""
        if self.served_model_name is not None:
            return self.served_model_name
        path = Path(self.model)
        is_path = self.model.startswith((".", "/", "~"))
        return path.stem if path.suffix == ".gguf" else path.name if is_path else self.model

    @model_validator(mode="after")
    def _agree(self) -> Self:
        """Check what no single field can tell."""
        if self.stage_layers is not None and len(self.stage_layers) != self.pp:
            raise ValueError(
                f"stage_layers names {len(self.stage_layers)} stages and pp is {self.pp}"
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens {self.max_num_batched_tokens} is below "
                f"max_num_seqs {self.max_num_seqs}; raise the first or lower the second"
            )
        if self.async_scheduling and self.max_in_flight is not None:
            raise ValueError(
                f"async_scheduling has {self.pp + 1} steps in flight and max_in_flight is "
                f"{self.max_in_flight}; give one"
            )
        if self.kv_memory is not None and self.num_kv_blocks is not None:
            raise ValueError(
                f"kv_memory {int(self.kv_memory)} bytes and num_kv_blocks {self.num_kv_blocks} "
                "say the same thing; give one"
            )
        taken: dict[int, str] = {}
        for name in ("port", "grpc_port", "admin_port"):
            port = getattr(self, name)
            if port and port in taken:
                raise ValueError(f"{taken[port]} and {name} are both {port}; each needs its own")
            taken[port] = name
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together; give both or neither")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("tls_client_ca needs tls_cert and tls_key: only TLS asks clients")
        if self.iface is not None and self.internal_host is not None:
            raise ValueError(
                f"iface {self.iface} and internal_host {self.internal_host} "
                "say the same thing; give one"
            )
        if self.internal_host is not None and _is_unspecified(self.internal_host):
            raise ValueError(
                f"internal_host {self.internal_host} is not an address that workers can connect to"
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The sources, strongest first; the first two may name the file that is the third."""
        config = init_settings().get("config") or env_settings().get("config")
        if config is None:
            return init_settings, env_settings
        return init_settings, env_settings, YamlConfigSettingsSource(settings_cls, Path(config))


def load_settings(given: dict[str, Any]) -> ServeSettings:
    """The settings, with `given` from the command line before all else.

    Raises ConfigError, in one line, that names every wrong or unknown key.
    """
    _refuse_unknown_variables()
    config = given.get("config") or os.environ.get(f"{ENV_PREFIX}CONFIG")
    if config:
        _check_is_mapping(Path(config))
    try:
        return ServeSettings(**given)
    except ValidationError as error:
        problems = [_describe(problem, given, config) for problem in error.errors()]
        raise ConfigError("; ".join(problems)) from error


def _check_is_mapping(config: Path) -> None:
    try:
        content = yaml.safe_load(config.read_text())
    except OSError as error:
        raise ConfigError(
            f"cannot read the configuration file {config}: {error.strerror}"
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{config} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict | None):
        raise ConfigError(f"{config} holds no mapping; write lines such as `max_model_len: 4096`")


def _refuse_unknown_variables() -> None:
    known = {f"{ENV_PREFIX}{name}".upper() for name in ServeSettings.model_fields}
    unknown = [name for name in sorted(os.environ) if name.upper().startswith(ENV_PREFIX)]
    for name in unknown:
        if name.upper() not in known:
            raise ConfigError(f"unknown variable {name}{_nearest(name.upper(), known)}")


def _describe(problem: Any, given: dict[str, Any], config: str | None) -> str:
    """One problem that pydantic found, under the name by which the operator set it."""
    if not problem["loc"]:
        return str(problem["ctx"]["error"])
    key = str(problem["loc"][0])
    inner = "".join(f"{part}: " for part in problem["loc"][1:])
    if problem["type"] == "extra_forbidden" and not inner:
        return f"unknown key {key} in {config}{_nearest(key, set(ServeSettings.model_fields))}"
    if problem["type"] == "missing":
        return f"no {key} is named; try `shardline serve demo`"
    message = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{_origin(key, given, config)}: {inner}{message}, not {problem['input']!r}"


def _origin(key: str, given: dict[str, Any], config: str | None) -> str:
    if key in given:
        return key.upper() if key == "model" else f"--{key.replace('_', '-')}"
    variable = f"{ENV_PREFIX}{key}".upper()
    return variable if variable in os.environ else f"{key} in {config}"


def _nearest(name: str, known: set[str]) -> str:
    near = get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _is_unspecified(host: str) -> bool:
    try:
        return ip_address(host).is_unspecified
    except ValueError:
        return False
