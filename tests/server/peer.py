"""The other side of the engine's socket, played by a script: for what a real engine cannot be made
to do on demand (refuse, fail mid-stream, stall, die), and to see exactly what reaches an engine.
"""

import queue
import threading
from collections.abc import Callable

import msgspec
import zmq

from shardline_scheduler import Accuracy
from shardline_scheduler.budget import BudgetOutcome
from shardline_scheduler.plan import TokenLogprobs
from shardline_server.messages import (
    Abort,
    Delta,
    EngineReady,
    EngineStats,
    FinishReason,
    FromEngine,
    Hello,
    Output,
    Submit,
    ToEngine,
)
from shardline_shards.gate import Gate, LaunchKeys, Listener

WAIT_S = 30
STATS = EngineStats(3, 2, 100, 25, 10, 1, 40, 30, 7, 2, [], Accuracy())


def delta(request_id: str, index: int = 0, token_ids=(), **values) -> Delta:
    defaults = {
        "logprobs": [],
        "prompt_logprobs": [],
        "finish_reason": None,
        "error_code": None,
        "error_message": None,
        "num_cached_tokens": 0,
    }
    return Delta(request_id, index, list(token_ids), **(defaults | values))


def echo(submit: Submit) -> list[Delta]:
    """The prompt's tokens as output, one a Delta, again and again up to `max_tokens`."""
    prompt, sampling = submit.token_ids, submit.sampling
    tokens = [prompt[i % len(prompt)] for i in range(sampling.max_tokens)]
    ended = FinishReason.LENGTH
    for i, token in enumerate(tokens):
        if token in sampling.stop_token_ids:
            tokens, ended = tokens[: i + 1], FinishReason.STOP
            break
    return [
        delta(
            submit.request_id,
            i,
            [token],
            logprobs=[made_up_logprobs(token)] if sampling.num_logprobs is not None else [],
            prompt_logprobs=(
                [made_up_logprobs(one) for one in prompt[1:]]
                if i == 0 and sampling.num_prompt_logprobs is not None
                else []
            ),
            finish_reason=ended if i == len(tokens) - 1 else None,
            num_cached_tokens=1,
        )
        for i, token in enumerate(tokens)
    ]


def judged(submit: Submit, outcome: BudgetOutcome) -> list[Delta]:
    """The same as long as it may be, and how it kept its latency budget."""
    *rest, last = echo(submit)
    values = {"finish_reason": FinishReason.LENGTH, "budget": outcome}
    return [*rest, delta(last.request_id, last.index, last.token_ids, **values)]


def made_up_logprobs(token_id: int) -> TokenLogprobs:
    return TokenLogprobs(token_id, -0.5, [(token_id, -0.5), (token_id + 1, float("-inf"))])


def silence(submit: Submit) -> list[Delta]:
    return []


class EnginePeer:
    """Answers each Submit with what `script` makes of it; keeps what came for the test to read."""

    def __init__(self, script: Callable[[Submit], list[Delta]] = echo, *, is_ready=True) -> None:
        self.reset(script)
        self.ready = EngineReady(max_model_len=64, num_kv_blocks=100, block_size=16, vocab_size=512)
        self._is_ready = is_ready
        self._gate = Gate(LaunchKeys.create())
        self._listener = Listener(self._gate, "127.0.0.1", msgspec.msgpack.Decoder(ToEngine).decode)
        self.endpoint = self._listener.endpoint
        self._outbox = self._gate.context.socket(zmq.PULL)
        self._outbox.bind("inproc://outbox")
        self._inbox = self._gate.context.socket(zmq.PUSH)
        self._inbox.connect("inproc://outbox")
        self._greeted = threading.Event()
        self._frontends: set[bytes] = set()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def reset(self, script: Callable[[Submit], list[Delta]] = echo) -> None:
        """Forget what came."""
        self.script = script
        self.submits: queue.Queue[Submit] = queue.Queue()
        self.aborts: queue.Queue[str] = queue.Queue()

    def send(self, message: FromEngine) -> None:
        """To every front end that has said Hello; waits for the first."""
        assert self._greeted.wait(WAIT_S)
        self._inbox.send(msgspec.msgpack.encode(message))

    def send_deltas(self, *deltas: Delta) -> None:
        self.send(Output(list(deltas), STATS))

    def send_bytes(self, payload: bytes) -> None:
        assert self._greeted.wait(WAIT_S)
        self._inbox.send(payload)

    def next_submit(self) -> Submit:
        return self.submits.get(timeout=WAIT_S)

    def next_abort(self) -> str:
        return self.aborts.get(timeout=WAIT_S)

    def stop(self) -> None:
        self._inbox.send(b"")
        self._thread.join()
        self._listener.close(linger_ms=0)
        for socket in (self._inbox, self._outbox):
            socket.close(linger=0)
        self._gate.close()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._listener.socket, zmq.POLLIN)
        poller.register(self._outbox, zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            while (received := self._listener.receive()) is not None:
                self._receive(*received)
            if self._outbox in ready:
                payload = self._outbox.recv()
                if not payload:
                    return
                for frontend in self._frontends:
                    self._listener.send(frontend, payload)

    def _receive(self, frontend: bytes, message: ToEngine) -> None:
        match message:
            case Hello():
                self._frontends.add(frontend)
                if self._is_ready:
                    self._listener.send(frontend, msgspec.msgpack.encode(self.ready))
                self._greeted.set()
            case Submit() as submit:
                self.submits.put(submit)
                for one in self.script(submit):
                    output = msgspec.msgpack.encode(Output([one], STATS))
                    self._listener.send(frontend, output)
            case Abort(request_id):
                self.aborts.put(request_id)
