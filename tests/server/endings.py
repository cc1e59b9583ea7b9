"""One request sent in each of the ways there are, and everything that ends what comes of it."""

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import grpc
import httpx

from shardline_server.protos.shardline.v1 import generation_pb2 as pb
from shardline_server.protos.shardline.v1.generation_pb2_grpc import GenerationStub

PATHS = {"completion": "/v1/completions", "chat": "/v1/chat/completions"}
PROMPT = "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs!"
MESSAGES = [{"role": "user", "content": PROMPT}]


@dataclass
class Ending:
    """What ended a request, as a client counts it.

    `reasons` has what each choice was ended with, `num_tokens` counts each choice's. `errors` are
    the error records of a stream, or the answer if it is one; `num_done` counts `[DONE]`.
    """

    reasons: dict[int, list[str]] = field(default_factory=dict)
    num_tokens: Counter[int] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    num_done: int = 0
    usages: list[tuple[int, int, int]] = field(default_factory=list)
    last: str = ""

    def take(self, choice: int, token_ids: list[int], reason: str | None) -> None:
        """A piece of a choice; the last one of what comes so far."""
        assert not self.reasons.get(choice), f"choice {choice} goes on after its end"
        self.num_tokens[choice] += len(token_ids)
        self.reasons.setdefault(choice, []).extend([reason] if reason else [])
        self.last = "piece"


def http_whole(url: str, kind: str, fields: dict[str, Any]) -> Ending:
    response = _post(url, kind, fields)
    ending = Ending()
    _take_body(ending, response.json())
    assert response.is_success == (not ending.errors)
    return ending


def http_stream(url: str, kind: str, fields: dict[str, Any]) -> Ending:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    response = _post(url, kind, fields | options)
    if not response.is_success:  # refused before it began, which a stream can be as well
        ending = Ending()
        _take_body(ending, response.json())
        return ending
    ending = Ending()
    for record in response.text.split("\n\n")[:-1]:
        data = record.removeprefix("data: ")
        if data == "[DONE]":
            ending.num_done += 1
            ending.last = "done"
        else:
            _take_body(ending, json.loads(data))
    return ending


def grpc_whole(target: str, kind: str, fields: dict[str, Any]) -> Ending:
    with grpc.insecure_channel(target) as channel:
        ending = Ending()
        try:
            answer = GenerationStub(channel).Generate(_request(kind, fields))
        except grpc.RpcError as error:
            ending.errors.append(error.details())
            return ending
        for choice in answer.choices:
            _take_delta(ending, choice)
        _take_usage(ending, answer.usage)
        return ending


def grpc_stream(target: str, kind: str, fields: dict[str, Any]) -> Ending:
    with grpc.insecure_channel(target) as channel:
        ending = Ending()
        try:
            for delta in GenerationStub(channel).GenerateStream(_request(kind, fields)):
                _take_delta(ending, delta)
                if delta.HasField("usage"):
                    _take_usage(ending, delta.usage)
        except grpc.RpcError as error:
            ending.errors.append(error.details())
            ending.last = "error"
        return ending


HTTP_WAYS = {"http whole": http_whole, "http stream": http_stream}
GRPC_WAYS = {"grpc whole": grpc_whole, "grpc stream": grpc_stream}


def _post(url: str, kind: str, fields: dict[str, Any]) -> httpx.Response:
    prompt = {"prompt": PROMPT} if kind == "completion" else {"messages": MESSAGES}
    body = prompt | fields | {"return_token_ids": True}
    return httpx.post(f"{url}{PATHS[kind]}", json=body, timeout=120)


def _take_body(ending: Ending, body: dict[str, Any]) -> None:
    if "error" in body:
        ending.errors.append(body["error"]["message"])
        ending.last = "error"
        return
    for choice in body["choices"]:
        ending.take(choice["index"], choice.get("token_ids") or [], choice["finish_reason"])
    if usage := body.get("usage"):
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        ending.usages.append((usage["prompt_tokens"], usage["completion_tokens"], cached))
        ending.last = "usage"


def _take_delta(ending: Ending, delta: pb.GenerateDelta) -> None:
    assert delta.index == ending.num_tokens[delta.choice]
    name = pb.FinishReason.Name(delta.finish_reason).removeprefix("FINISH_REASON_").lower()
    ending.take(delta.choice, list(delta.token_ids), None if name == "unspecified" else name)


def _take_usage(ending: Ending, usage: pb.Usage) -> None:
    ending.usages.append((usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens))
    ending.last = "usage"


def _request(kind: str, fields: dict[str, Any]) -> pb.GenerateRequest:
    sampling = pb.SamplingParams(**fields)
    if kind == "completion":
        return pb.GenerateRequest(text=PROMPT, sampling=sampling)
    chat = pb.Chat(messages=[pb.ChatMessage(**message) for message in MESSAGES])
    return pb.GenerateRequest(chat=chat, sampling=sampling)
