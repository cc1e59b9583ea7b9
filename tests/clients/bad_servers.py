"""Servers on real sockets that answer what a test tells them to, over either door."""

import json
import ssl
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, Protocol, Self
from urllib.parse import urlsplit

import grpc

from shardline_client.protos.shardline.v1 import generation_pb2 as pb
from shardline_client.protos.shardline.v1 import generation_pb2_grpc as rpc

PROMPT_TOKENS = 3


@dataclass(frozen=True)
class Refuse:
    """No answer but an error."""

    why: Literal["full", "failed"]
    retry_after: str | None = None


@dataclass(frozen=True)
class Say:
    """So many pieces, each with one token, and then the end or something else."""

    num_pieces: int
    then: Literal["end", "error", "stop", "silence"] = "end"


@dataclass(frozen=True)
class SayTogether:
    """One piece, as soon as so many requests are there."""

    barrier: threading.Barrier


@dataclass(frozen=True)
class SayAtOnce:
    """The whole answer, though a stream was asked for; only over HTTP."""


Answer = Refuse | Say | SayTogether | SayAtOnce


class BadServer(Protocol):
    """`answers` are given in order, the last one for ever; `num_requests` counts."""

    url: str
    answers: list[Answer]
    num_requests: int


class _Script:
    def __init__(self) -> None:
        self.answers: list[Answer] = [Say(1)]
        self.num_requests = 0
        self.stopping = threading.Event()

    def next(self) -> Answer:
        self.num_requests += 1
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


class HttpBadServer(_Script):
    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        super().__init__()
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[Message] = []
        self.owner = "somebody"
        self.num_forgotten = 0
        self.forgets_connections = False  # A second request of one gets no answer.
        script = self

        class Handler(_HttpHandler):
            def do_GET(self) -> None:
                self.keeps_connection = script.forgets_connections
                card = {"id": "bad", "object": "model", "created": 0, "owned_by": script.owner}
                self._send_json(200, {"object": "list", "data": [card]})

            def do_POST(self) -> None:
                if self.keeps_connection:
                    script.num_forgotten += 1
                    self.close_connection = True
                    return
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if not urlsplit(self.path).path.startswith(
                    "/v1/"
                ):  # a proxy gets the whole address
                    self._send_json(404, {"error": {"message": "no such path"}})
                    return
                script.bodies.append(body)
                script.headers.append(self.headers)
                self.answer(script.next(), script.stopping)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        scheme = "http"
        if context is not None:
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
            scheme = "https"
        self.url = f"{scheme}://localhost:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _HttpHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    keeps_connection = False

    def answer(self, answer: Answer, stopping: threading.Event) -> None:
        self.close_connection = True
        match answer:
            case Refuse():
                self._refuse(answer)
            case Say():
                self._say(answer, stopping)
            case SayTogether():
                answer.barrier.wait()
                self._say(Say(1), stopping)
            case SayAtOnce():
                self._send_json(200, {"choices": [{"index": 0, "text": "0,"}]})

    def _refuse(self, answer: Refuse) -> None:
        message = {"message": f"I am {answer.why}.", "type": "t", "param": None, "code": "why"}
        headers = {} if answer.retry_after is None else {"Retry-After": answer.retry_after}
        self._send_json(503 if answer.why == "full" else 500, {"error": message}, headers)

    def _say(self, answer: Say, stopping: threading.Event) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for i in range(answer.num_pieces):
            is_last = answer.then == "end" and i == answer.num_pieces - 1
            choice = {"index": 0, "text": f"{i},", "token_ids": [i], "logprobs": None}
            self._event({"choices": [choice | {"finish_reason": "length" if is_last else None}]})
        match answer.then:
            case "end":
                usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": answer.num_pieces}
                self._event({"choices": [], "usage": usage})
                self.wfile.write(b"data: [DONE]\n\n")
            case "error":
                self._event({"error": {"message": "The engine died.", "code": "engine_died"}})
            case "silence":
                stopping.wait()

    def _event(self, record: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(record).encode() + b"\n\n")
        self.wfile.flush()

    def _send_json(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Connection", "keep-alive" if self.keeps_connection else "close")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        pass


class GrpcBadServer(_Script, rpc.GenerationServicer):
    def __init__(self, credentials: grpc.ServerCredentials | None = None) -> None:
        super().__init__()
        self._server = grpc.server(ThreadPoolExecutor(8))
        rpc.add_GenerationServicer_to_server(self, self._server)
        if credentials is None:
            port = self._server.add_insecure_port("127.0.0.1:0")
            self.url = f"grpc://127.0.0.1:{port}"
        else:
            port = self._server.add_secure_port("127.0.0.1:0", credentials)
            self.url = f"grpcs://localhost:{port}"

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stopping.set()
        self._server.stop(None).wait()

    def ListModels(self, request: Any, context: grpc.ServicerContext) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=[pb.Model(name="bad", max_model_len=64)])

    def Tokenize(self, request: Any, context: grpc.ServicerContext) -> pb.TokenizeResponse:
        return pb.TokenizeResponse(token_ids=[5, 6, 7], max_model_len=64)

    def GenerateStream(
        self, request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateDelta]:
        answer = self.next()
        if isinstance(answer, Refuse):
            self._refuse(answer, context)
            return
        assert isinstance(answer, Say)
        for i in range(answer.num_pieces):
            delta = pb.GenerateDelta(index=i, token_ids=[i], text=f"{i},")
            if answer.then == "end" and i == answer.num_pieces - 1:
                delta.finish_reason = pb.FINISH_REASON_LENGTH
                usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": answer.num_pieces}
                delta.usage.CopyFrom(pb.Usage(**usage))
            yield delta
        if answer.then == "error":
            context.set_trailing_metadata((("shardline-error-code", "engine_died"),))
            context.abort(grpc.StatusCode.INTERNAL, "The engine died.")
        if answer.then == "silence":
            self.stopping.wait()

    def _refuse(self, answer: Refuse, context: grpc.ServicerContext) -> None:
        metadata = [("shardline-error-code", "why")]
        if answer.retry_after is not None:
            metadata.append(("retry-delay", answer.retry_after))
        context.set_trailing_metadata(tuple(metadata))
        code = grpc.StatusCode.RESOURCE_EXHAUSTED
        if answer.why == "failed":
            code = grpc.StatusCode.INTERNAL
        context.abort(code, f"I am {answer.why}.")
