"""What the engine and its workers say to each other, as msgpack over ZMQ, beside plans and results.

A worker starts by `Loaded`, `Allocate`, `Joined`, `Rendezvous`, `Ready`; then come plans, until
`Stop`. When another worker is lost, `Reform` tells the rest to drop all requests, and then come
`Joined`, `Rendezvous` and `Ready` again, under the next generation number; who notices it himself
says `Lost`. Messages of an older generation are dropped. Results carry none: step ids go on
counting, so a result's step tells it.
"""

from collections.abc import Callable

import msgspec
from msgspec import Struct

from shardline_scheduler.plan import StageTiming, StepPlan, StepResult
from shardline_shards.channel import Endpoint
from shardline_shards.layout import ParallelLayout, Place
from shardline_shards.partition import LayerTimes


class WorkerConfig(Struct, frozen=True, kw_only=True):
    """All that one worker is told when it starts; sent as JSON on its standard input.

    `engine` is where the engine listens to it, `wire` the descriptor of a wire to it, inherited by
    a process that it has started itself (None: on another node). `host` is this worker's own
    address, where its tensors are received. `kv_memory_bytes` is the most that KV memory may take
    on this worker (None: its part of what is free), `max_kv_blocks` the most that the engine has
    use for. On a GPU, decodes of up to `max_graph_size` requests are recorded as CUDA graphs (0:
    none). Where it `plans_ahead`, stages tell each other what was drawn. The last four are set by
    whoever starts the process; `cpu_ids` pins its `num_threads` threads (empty: not pinned).
    `generation` is the one that it starts in: 0, and one more for every time that ranks were lost.
    """

    engine: Endpoint
    host: str
    layout: ParallelLayout
    place: Place
    model_path: str
    load_format: str
    dtype: str
    device: str
    seed: int
    block_size: int
    kv_memory_bytes: int | None
    max_kv_blocks: int
    max_model_len: int
    max_num_batched_tokens: int
    max_in_flight: int
    max_graph_size: int
    plans_ahead: bool
    log_level: str
    generation: int = 0
    free_memory_share: float = 0.0
    num_threads: int = 1
    cpu_ids: tuple[int, ...] = ()
    wire: int | None = None


class ProfileConfig(Struct, frozen=True, kw_only=True):
    """What to measure the parts of a model with, on the cores of one worker; sent as JSON."""

    parent_pid: int
    model_path: str
    dtype: str
    device: str
    tp: int
    num_threads: int
    cpu_ids: tuple[int, ...] = ()


class ProfileOutcome(Struct, frozen=True):
    """The one line on standard output of who measured: times, or why there are none."""

    times: LayerTimes | None
    problem: str | None = None


class Joined(Struct, frozen=True, array_like=True, tag=True):
    """A worker is there, and at this address for the others, if they have to know one."""

    rank: int
    generation: int
    address: str | None


class Rendezvous(Struct, frozen=True, array_like=True, tag=True):
    """The addresses of all workers, by rank."""

    addresses: list[str | None]


class Loaded(Struct, frozen=True, array_like=True, tag=True):
    """A worker holds its weights, and has room for this many KV blocks."""

    rank: int
    generation: int
    num_kv_blocks: int
    read_bytes: int
    total_bytes: int
    kv_block_bytes: int
    attention: str


class Allocate(Struct, frozen=True, array_like=True, tag=True):
    """The number of KV blocks that every rank allocates."""

    num_kv_blocks: int


class Ready(Struct, frozen=True, array_like=True, tag=True):
    """A worker executes plans from now on."""

    rank: int
    generation: int


class Lost(Struct, frozen=True, array_like=True, tag=True):
    """A worker cannot reach another one; it has left all groups and waits for `Reform`."""

    rank: int
    generation: int
    reason: str


class Failed(Struct, frozen=True, array_like=True, tag=True):
    """A worker ends and says why; `is_refusal` if it is something that the operator can mend."""

    rank: int
    generation: int
    reason: str
    is_refusal: bool


class Dropped(Struct, frozen=True, array_like=True, tag=True):
    """A worker dropped so many more messages and connections, of the engine (`worker`), or where it
    receives tensors (`tensor`).
    """

    channel: str
    num: int


class StageReport(Struct, frozen=True, array_like=True, tag=True):
    """How a stage before the last spent its time, several steps at once.

    `sent_at` is on the clock of the worker, as the timings are.
    """

    timings: list[StageTiming]
    sent_at: float


class Reform(Struct, frozen=True, array_like=True, tag=True):
    """Ranks were lost: drop what you do and every request, keep the weights, and join again."""

    generation: int


class Stop(Struct, frozen=True, array_like=True, tag=True):
    """Leave in good order."""


ToWorker = Rendezvous | Allocate | StepPlan | Reform | Stop
FromWorker = Joined | Loaded | Ready | StepResult | StageReport | Lost | Failed | Dropped


def worker_name(rank: int, born_in: int) -> bytes:
    """A worker's identity on the control socket; two that held the same place are told apart."""
    return f"{rank}.{born_in}".encode()


encode = msgspec.msgpack.Encoder().encode
decode_to_worker: Callable[[bytes], ToWorker] = msgspec.msgpack.Decoder(ToWorker).decode
decode_from_worker: Callable[[bytes], FromWorker] = msgspec.msgpack.Decoder(FromWorker).decode
