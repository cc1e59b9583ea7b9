"""What the engine process is told when it starts."""

from msgspec import Struct

from shardline_shards.layout import ParallelLayout


class NodesConfig(Struct, frozen=True, kw_only=True):
    """A launch over several nodes. `model` is what the operator typed: each node resolves it."""

    num_nodes: int
    rendezvous_port: int
    secret: str
    model: str
    join_timeout_s: int


class EngineConfig(Struct, frozen=True, kw_only=True):
    """Sent as JSON on the engine's standard input.

    `host` is the address that the engine and this node's workers bind to. None for
    `kv_memory_bytes` (per worker) and `num_kv_blocks` means: as much as is free; for
    `threads_per_worker`: the node's cores, dealt out.
    """

    parent_pid: int
    host: str
    model_path: str
    load_format: str
    layout: ParallelLayout
    dtype: str
    device: str
    seed: int
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_waiting: int
    block_size: int
    kv_memory_bytes: int | None
    num_kv_blocks: int | None
    enable_prefix_caching: bool
    threads_per_worker: int | None
    log_level: str
    nodes: NodesConfig | None = None


class EngineAddress(Struct, frozen=True):
    """The engine's one line on standard output: where front ends reach it."""

    address: str
