"""One worker: a place in the layout that loads its slices and then executes plans in order."""

import logging
import sys
import time
from pathlib import Path

import msgspec
import torch
import zmq
from torch import Tensor

from shardline_scheduler.plan import (
    NewRequest,
    PromptLogprobs,
    SampledToken,
    SamplingParams,
    ScheduledRequest,
    StepPlan,
    StepResult,
)
from shardline_shards.attention import KVShape, allocate_kv, select_backend
from shardline_shards.batch import BatchBuilder, RequestTable, StepBatch
from shardline_shards.checkpoint import LoadReport, load_dummy, load_weights
from shardline_shards.distributed import Communicators, host_store, join_store
from shardline_shards.errors import ShardError, UnsupportedModel
from shardline_shards.host_memory import available_memory
from shardline_shards.layout import deal_heads
from shardline_shards.messages import (
    Allocate,
    Failed,
    FromWorker,
    Joined,
    Loaded,
    Ready,
    Rendezvous,
    StageReport,
    Stop,
    ToWorker,
    WorkerConfig,
    decode_to_worker,
    encode,
)
from shardline_shards.process import pin_to
from shardline_shards.sampling import SampleRow, prompt_logprobs, sample
from shardline_shards.stage import Stage
from shardline_shards.stage_model import StageModel, build_stage_model, load_config
from shardline_shards.step_timer import Part, StepTimer, TimingLog

logger = logging.getLogger("shardline.worker")


class EngineChannel:
    """The worker's end of the control channel."""

    def __init__(self, address: str, rank: int) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, str(rank).encode())
        self._socket.setsockopt(zmq.LINGER, 1000)
        self._socket.connect(address)

    def send(self, message: FromWorker) -> None:
        """Queue a message for the engine."""
        self._socket.send(encode(message))

    def has_message(self, within_ms: int) -> bool:
        """Whether the engine has said something, or does so within that time."""
        return bool(self._socket.poll(within_ms))

    def receive(self) -> ToWorker:
        """Wait for the engine's next message."""
        message: ToWorker = decode_to_worker(self._socket.recv())
        return message

    def close(self) -> None:
        """Send what is queued, then leave."""
        self._socket.close()
        zmq.Context.instance().term()


class Worker:
    """One (stage, tp rank) of the split model."""

    def __init__(self, config: WorkerConfig) -> None:
        self.config = config
        self.rank = config.layout.rank(config.place)
        self.device = _device(config)
        self.channel = EngineChannel(config.engine_address, self.rank)
        self.requests = RequestTable()
        self.timer = StepTimer(config.place.stage_index)
        self.timings = TimingLog()

    def run(self) -> None:
        """Load, report, and execute plans until told to stop."""
        self.communicators = self._join()
        stage_model, report = self._load()
        self.stage = Stage(stage_model, self.device)
        self._allocate(report)
        self._try_out()
        self.channel.send(Ready(self.rank))
        self.timer.start()
        while not isinstance(message := self._next_message(), Stop):
            assert isinstance(message, StepPlan)
            self._execute(message)
        self.communicators.close()

    def _join(self) -> Communicators:
        config, world_size = self.config, self.config.layout.world_size
        store = None
        if self.rank == 0 and world_size > 1:
            store = host_store(config.host, world_size)
        self.channel.send(Joined(self.rank, store.port if store else None))
        rendezvous = self.channel.receive()
        assert isinstance(rendezvous, Rendezvous)
        if store is None and world_size > 1:
            store = join_store(rendezvous.host, rendezvous.port, world_size)
        return Communicators(config.layout, config.place, store, config.host, self.device)

    def _load(self) -> tuple[StageModel, LoadReport]:
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
            report = load_dummy(stage_model, self.device, config.seed)
        else:
            report = load_weights(stage_model, model_path, self.device)
        logger.info(
            "read %.1f of %.1f MB in %.1f s",
            report.read_bytes / 1e6,
            report.total_bytes / 1e6,
            time.monotonic() - started,
        )
        return stage_model, report

    def _allocate(self, report: LoadReport) -> None:
        config, layers = self.config, self.config.layout.layers(self.config.place.stage_index)
        shape = self._kv_shape()
        block_bytes = shape.block_bytes * len(layers)
        room = config.kv_memory_bytes or int(_free_memory(self.device) * config.free_memory_share)
        backend = select_backend(self.device, self.stage.dtype)
        self.channel.send(
            Loaded(
                self.rank,
                min(room // block_bytes, config.max_kv_blocks),
                report.read_bytes,
                report.total_bytes,
                block_bytes,
                backend.name,
            )
        )
        allocate = self.channel.receive()
        assert isinstance(allocate, Allocate)
        kv_layers = allocate_kv(layers, allocate.num_kv_blocks, shape, self.device)
        self.batches = BatchBuilder(kv_layers, shape.block_size, backend, self.device)

    def _try_out(self) -> None:
        """Compute one token, over all ranks: what cannot be served shows now, not at a request."""
        sampling = SamplingParams(max_tokens=1, seed=0, temperature=0.0)
        new, part = NewRequest(-1, [0], 1, sampling), ScheduledRequest(-1, 0, 1, [], [0], True)
        try:
            self._compute(StepPlan(-1, [], [new], [part]))
        except NotImplementedError as error:
            raise UnsupportedModel(str(error)) from error
        self.requests.apply(StepPlan(-1, [-1], [], []))

    def _kv_shape(self) -> KVShape:
        model_config, config = self.stage.config, self.config
        num_query = model_config.num_attention_heads
        num_kv = getattr(model_config, "num_key_value_heads", None) or num_query
        shares = deal_heads(num_query, num_kv, config.layout.tp)
        head_dim = getattr(model_config, "head_dim", None) or model_config.hidden_size // num_query
        return KVShape(
            block_size=config.block_size,
            num_kv_heads=len(shares[config.place.tp_rank].kv_heads),
            head_dim=head_dim,
            dtype=self.stage.dtype,
        )

    def _next_message(self) -> ToWorker:
        """Wait for it; the timings of the last steps are not kept back meanwhile."""
        if self.timings.has_any and not self.channel.has_message(TimingLog.MAX_AGE_MS):
            self._report_timings()
        return self.channel.receive()

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
        self.requests.apply(plan)
        batch = self.batches.build(plan, self.requests)
        self.timer.lap(Part.PREPARE)
        hidden = self._receive_hidden(batch)
        self.timer.lap(Part.TENSOR_WAIT)
        output = self.stage.run(batch, hidden)
        link = self.communicators.next
        is_drawer = link is None and self.config.place.tp_rank == 0
        result = self._draw(plan.step_id, batch, output) if is_drawer else None
        self._wait_for_device()
        self.timer.lap(Part.COMPUTE)
        if link is not None:
            link.send(output)
        self.timer.lap(Part.SEND)
        return result

    def _wait_for_device(self) -> None:
        """A GPU computes after the call has returned; what it takes is to be measured here."""
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    def _receive_hidden(self, batch: StepBatch) -> Tensor | None:
        link = self.communicators.previous
        if link is None:
            return None
        return link.receive(batch.num_tokens, self.stage.hidden_size, self.stage.dtype, self.device)

    def _draw(self, step_id: int, batch: StepBatch, logits: Tensor) -> StepResult:
        return StepResult(
            step_id, self._sampled(batch, logits), self._prompt_logprobs(batch, logits)
        )

    def _sampled(self, batch: StepBatch, logits: Tensor) -> list[SampledToken]:
        drawn = [(index, row) for index, row in enumerate(batch.rows) if row.samples]
        if not drawn:
            return []
        if len(drawn) < len(batch.rows):
            logits = logits[[index for index, _ in drawn]]
        indexes = [row.request_index for _, row in drawn]
        requests = [self.requests[index] for index in indexes]
        tokens = sample(
            logits, [SampleRow(r.sampling, r.token_ids, r.num_prompt_tokens) for r in requests]
        )
        return [
            SampledToken(index, token_id, logprobs)
            for index, (token_id, logprobs) in zip(indexes, tokens, strict=True)
        ]

    def _prompt_logprobs(self, batch: StepBatch, logits: Tensor) -> list[PromptLogprobs]:
        by_request: dict[int, list[int]] = {}
        for index, row in enumerate(batch.rows):
            if not row.samples:
                by_request.setdefault(row.request_index, []).append(index)
        return [
            self._prompt_part(batch, logits, request_index, indexes)
            for request_index, indexes in by_request.items()
        ]

    def _prompt_part(
        self, batch: StepBatch, logits: Tensor, request_index: int, indexes: list[int]
    ) -> PromptLogprobs:
        request = self.requests[request_index]
        start = batch.rows[indexes[0]].position + 1
        targets = torch.tensor(request.token_ids[start : start + len(indexes)])
        top = request.sampling.num_prompt_logprobs or 0
        return PromptLogprobs(request_index, start, prompt_logprobs(logits[indexes], targets, top))


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


def run_worker(config: WorkerConfig) -> int:
    """Be the worker that `config` describes, to the end; returns the exit status."""
    pin_to(config.cpu_ids)
    torch.set_num_threads(config.num_threads)
    logging.basicConfig(
        level=config.log_level.upper(),
        format=f"%(asctime)s %(levelname)s [{config.place}] %(message)s",
        stream=sys.stderr,
    )
    return _run(Worker(config))


def _run(worker: Worker) -> int:
    """Run to the end; returns the exit status: 2 for what the operator can mend."""
    try:
        worker.run()
        return 0
    except ShardError as error:
        worker.channel.send(Failed(worker.rank, str(error), True))
        return 2
    except Exception as error:
        logger.exception("this worker ends")
        worker.channel.send(Failed(worker.rank, f"{type(error).__name__}: {error}", False))
        return 1
    finally:
        worker.channel.close()
