"""One worker: a place in the layout that loads its slices and then executes plans in order."""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from shardline_scheduler.plan import Chunk, NewRequest, SamplingParams, StepPlan, StepResult
from shardline_shards.attention import KVShape, PagesAhead, allocate_kv, select_backend
from shardline_shards.batch import BatchBuilder, RequestTable
from shardline_shards.checkpoint import LoadReport, load_dummy, load_weights
from shardline_shards.communicators import Communicators
from shardline_shards.decode_graphs import CudaRecorder, DecodeGraphs, sizes_up_to
from shardline_shards.drawing import draw
from shardline_shards.drawn_tokens import DrawnTokens
from shardline_shards.engine_channel import EngineChannel
from shardline_shards.errors import LostPeer, ShardError, UnsupportedModel
from shardline_shards.host_memory import available_memory
from shardline_shards.ledger import Ledger, Operation
from shardline_shards.mesh_communicators import MeshCommunicators
from shardline_shards.messages import (
    Allocate,
    Dropped,
    Failed,
    Joined,
    Loaded,
    Lost,
    Ready,
    Reform,
    Rendezvous,
    StageReport,
    Stop,
    ToWorker,
    WorkerConfig,
)
from shardline_shards.nccl import GroupCommunicators
from shardline_shards.process import pin_to
from shardline_shards.stage import Stage
from shardline_shards.stage_model import build_stage_model, load_config
from shardline_shards.step_timer import Part, StepTimer, TimingLog

logger = logging.getLogger("shardline.worker")

_IDLE_MS = 10  # without a message for so long, a worker uses its time for itself


class Worker:
    """One (stage, tp rank) of the split model."""

    def __init__(self, config: WorkerConfig, ledger: Ledger) -> None:
        self.config = config
        self.ledger = ledger
        self.rank = config.layout.rank(config.place)
        self.device = _device(config)
        self.generation = config.generation
        self.channel = EngineChannel(config)
        self.communicators = _communicators(config, self.device, ledger)
        self.requests = RequestTable()
        self.timer = StepTimer(config.place.stage_index)
        self.timings = TimingLog()
        self.batches: BatchBuilder | None = None
        self.graphs: DecodeGraphs | None = None
        self._pages: PagesAhead | None = None
        self._is_cut_off = True
        self._num_dropped = 0

    def run(self) -> None:
        """Load, then do what the engine says until it says stop."""
        self._load()
        while not isinstance(message := self._next_message(), Stop):
            with self._noticing_losses():
                self._follow(message)
        self.communicators.close()

    def _follow(self, message: ToWorker) -> None:
        match message:
            case StepPlan():
                if not self._is_cut_off:
                    self._execute(message)
            case Allocate(num_kv_blocks):
                self._allocate(num_kv_blocks)
                self._join()
            case Rendezvous():
                self._meet(message)
            case Reform(generation):
                self._reform(generation)
            case _:
                raise AssertionError(f"{message} comes at the wrong time")

    @contextmanager
    def _noticing_losses(self) -> Iterator[None]:
        """A rank that is lost breaks what others do with it; they leave it and wait."""
        try:
            yield
            return
        except LostPeer as error:
            reason = str(error)
        # Not in the handler: there the traceback would still hold the groups, and keep them open.
        self._leave_groups()
        self.channel.send(Lost(self.rank, self.generation, reason))

    def _reform(self, generation: int) -> None:
        """Drop everything but weights and KV memory, and be there for the others again."""
        self.generation = generation
        self._leave_groups()
        self.requests = RequestTable()
        if self.batches is not None:
            self._join()

    def _leave_groups(self) -> None:
        self._is_cut_off = True
        self.ledger.rest()
        self.graphs = None
        self.communicators.abandon()

    def _join(self) -> None:
        """Say that we are there, and where."""
        address = self.communicators.open(self.generation)
        self.channel.send(Joined(self.rank, self.generation, address))

    def _meet(self, rendezvous: Rendezvous) -> None:
        """Find all ranks and try the way through them; from then on plans are executed."""
        self.communicators.form(rendezvous.addresses)
        self.drawn = DrawnTokens(self.communicators, self.requests, self.device)
        self._is_cut_off = False
        self._record_graphs()
        self._try_out()
        self.timings.take()
        self.timer.start()
        self.channel.send(Ready(self.rank, self.generation))

    def _load(self) -> None:
        config, started = self.config, time.monotonic()
        model_path = Path(config.model_path)
        dtype = getattr(torch, config.dtype)
        stage_model = build_stage_model(
            load_config(model_path),
            config.layout,
            config.place,
            self.communicators.collectives,
            dtype,
            self.device,
        )
        if config.load_format == "dummy":
            report = load_dummy(stage_model, self.device, config.seed, self._note_load)
        else:
            report = load_weights(stage_model, model_path, self.device, self._note_load)
        logger.info(
            "read %.1f of %.1f MB in %.1f s",
            report.read_bytes / 1e6,
            report.total_bytes / 1e6,
            time.monotonic() - started,
        )
        with _refusing():
            self.stage = Stage(stage_model, self.device)
        row_bytes = self.stage.hidden_size * dtype.itemsize
        self.communicators.link_bytes = config.max_num_batched_tokens * row_bytes
        self.communicators.max_in_flight = config.max_in_flight
        self.ledger.rest()
        self._offer_memory(report)

    def _note_load(self, shape: Sequence[int]) -> None:
        self.ledger.note(Operation.LOAD, shape, is_shared=False)

    def _offer_memory(self, report: LoadReport) -> None:
        config = self.config
        block_bytes = self._kv_shape().block_bytes * len(self._layers())
        room = config.kv_memory_bytes or int(_free_memory(self.device) * config.free_memory_share)
        self.channel.send(
            Loaded(
                self.rank,
                self.generation,
                min(room // block_bytes, config.max_kv_blocks),
                report.read_bytes,
                report.total_bytes,
                block_bytes,
                select_backend(self.device, self.stage.dtype).name,
            )
        )

    def _allocate(self, num_kv_blocks: int) -> None:
        shape = self._kv_shape()
        # One more than the engine knows of, for what pads a recorded step.
        num_allocated = num_kv_blocks + (1 if self._records else 0)
        kv_layers = allocate_kv(self._layers(), num_allocated, shape, self.device)
        backend = select_backend(self.device, self.stage.dtype)
        self.batches = BatchBuilder(kv_layers, shape.block_size, backend, self.device)
        if self.device.type == "cpu":
            self._pages = PagesAhead(kv_layers)

    @property
    def _records(self) -> bool:
        return self.device.type == "cuda" and self.config.max_graph_size > 0

    def _record_graphs(self) -> None:
        """Record decodes, with the groups that there are now: a graph holds their communicators."""
        if not self._records:
            return
        assert self.batches is not None
        num_kv_blocks = len(next(iter(self.batches.kv_layers.values())).key) - 1
        try:
            self.graphs = DecodeGraphs(
                self.stage,
                self.batches,
                CudaRecorder(),
                max_model_len=self.config.max_model_len,
                scratch_block=num_kv_blocks,
                sizes=sizes_up_to(self.config.max_graph_size),
            )
        except LostPeer:
            raise
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UnsupportedModel(
                f"decodes cannot be recorded as CUDA graphs ({reason}); "
                "serve this model with --no-cuda-graphs"
            ) from error

    def _layers(self) -> range:
        return self.config.layout.layers(self.config.place.stage_index)

    def _try_out(self) -> None:
        """Compute one token, over all ranks: what cannot be served shows now, not at a request."""
        sampling = SamplingParams(max_tokens=1, seed=0, temperature=0.0)
        new, chunk = NewRequest(-1, [0], 1, sampling), Chunk(-1, 0, 1, [0], True)
        with _refusing():
            self._compute(StepPlan(-1, new_requests=[new], chunks=[chunk]))
        self.requests.apply(StepPlan(-1, released=[-1]))

    def _kv_shape(self) -> KVShape:
        config = self.config
        return self.stage.kv_shape(config.block_size, config.layout.tp, config.place.tp_rank)

    def _next_message(self) -> ToWorker:
        """Wait for it, and meanwhile do what can wait for idle time."""
        self._report_dropped()
        is_idle = False
        while not self._has_message(self._patience_ms(is_idle)):
            self._use_idle_time()
            is_idle = True
        return self.channel.receive()

    def _has_message(self, within_ms: int | None) -> bool:
        return self.channel.has_message(within_ms, self.communicators.connections)

    def _patience_ms(self, is_idle: bool) -> int | None:
        if self.timings.has_any:
            return TimingLog.MAX_AGE_MS
        if self._pages_to_touch() is not None:
            return 0 if is_idle else _IDLE_MS
        return None

    def _use_idle_time(self) -> None:
        self._report_dropped()
        if self.timings.has_any:
            self._report_timings()
        elif pages := self._pages_to_touch():
            pages.touch()

    def _pages_to_touch(self) -> PagesAhead | None:
        pages = self._pages
        is_wanted = pages is not None and pages.are_wanted(self.requests.num_blocks_used)
        return pages if is_wanted else None

    def _report_dropped(self) -> None:
        """Strangers that have come to where tensors are received."""
        if new := self.communicators.num_dropped - self._num_dropped:
            self._num_dropped += new
            self.channel.send(Dropped("tensor", new))

    def _execute(self, plan: StepPlan) -> None:
        self.timer.lap(Part.PLAN_WAIT)
        result = self._compute(plan)
        timing = self.timer.finish(plan.step_id)
        if result is not None:
            self.channel.send(msgspec.structs.replace(result, timing=timing))
        elif self.config.place.tp_rank == 0:
            self.timings.add(timing)
            if self.timings.is_due:
                self._report_timings()

    def _report_timings(self) -> None:
        self.channel.send(StageReport(self.timings.take(), time.monotonic()))

    def _compute(self, plan: StepPlan) -> StepResult | None:
        """Carry out a plan; the result, on the rank that draws tokens."""
        num_tokens = plan.num_tokens
        self.ledger.begin(plan.step_id, self.channel.checksum, num_tokens)
        receive_hidden = self._expect_hidden(num_tokens)
        self.requests.apply(plan)
        assert self.batches is not None
        batch = self.batches.build(plan, self.requests)
        self.timer.lap(Part.PREPARE)
        hidden = receive_hidden()
        self.drawn.fill_in(plan, batch)
        self.timer.lap(Part.TENSOR_WAIT)
        output = (self.graphs or self.stage).run(batch, hidden)
        link = self.communicators.next
        is_drawer = link is None and self.config.place.tp_rank == 0
        result = None
        if is_drawer:
            self.ledger.note(Operation.DRAW, output.shape, is_shared=False)
            result = draw(plan.step_id, batch, output, self.requests)
            self.drawn.send(result.token_ids)
        self._wait_for_device()
        self.timer.lap(Part.COMPUTE)
        if link is not None:
            link.send(output)
        self.timer.lap(Part.SEND)
        self.ledger.finish()
        return result

    def _wait_for_device(self) -> None:
        """A GPU computes after the call has returned; what it takes is to be measured here."""
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    def _expect_hidden(self, num_tokens: int) -> Callable[[], Tensor | None]:
        link, stage = self.communicators.previous, self.stage
        if link is None:
            return lambda: None
        return link.begin_receive(num_tokens, stage.hidden_size, stage.dtype)


@contextmanager
def _refusing() -> Iterator[None]:
    """What attention cannot do for a model shows when a layer is called for the first time."""
    try:
        yield
    except NotImplementedError as error:
        raise UnsupportedModel(str(error)) from error


def _communicators(config: WorkerConfig, device: torch.device, ledger: Ledger) -> Communicators:
    layout, place, host = config.layout, config.place, config.host
    shares_drawn = config.plans_ahead
    if device.type == "cuda":
        return GroupCommunicators(layout, place, ledger, host, device, shares_drawn=shares_drawn)
    keys = config.engine.keys
    return MeshCommunicators(layout, place, ledger, host, keys, shares_drawn=shares_drawn)


def _device(config: WorkerConfig) -> torch.device:
    if config.device == "cpu":
        return torch.device("cpu")
    local = config.layout.rank(config.place) % torch.cuda.device_count()
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory()


def run_worker(config: WorkerConfig, ledger: Ledger) -> int:
    """Be the worker that `config` describes, to the end; returns the exit status."""
    pin_to(config.cpu_ids)
    torch.set_num_threads(config.num_threads)
    logging.basicConfig(
        level=config.log_level.upper(),
        format=f"%(asctime)s %(levelname)s [{config.place}] %(message)s",
        stream=sys.stderr,
    )
    return _run(Worker(config, ledger))


def _run(worker: Worker) -> int:
    """Run to the end; returns the exit status: 2 for what the operator can mend."""
    try:
        worker.run()
        return 0
    except ShardError as error:
        worker.channel.send(Failed(worker.rank, worker.generation, str(error), True))
        return 2
    except Exception as error:
        logger.exception("this worker ends")
        reason = f"{type(error).__name__}: {error}"
        worker.channel.send(Failed(worker.rank, worker.generation, reason, False))
        return 1
    finally:
        worker.channel.close()
