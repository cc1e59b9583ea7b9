"""One request through every way that a client can send it, with results that can be compared."""

import json
from dataclasses import dataclass, field
from typing import Any

import httpx

from shardline_server.protos.shardline.v1 import generation_pb2 as pb
from shardline_server.protos.shardline.v1.generation_pb2_grpc import GenerationStub


@dataclass
class Answer:
    """One choice, as any door tells it."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    tokens: list[str] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)


@dataclass
class Result:
    choices: list[Answer]
    prompt_tokens: int
    completion_tokens: int


def http_whole(client: httpx.Client, body: dict[str, Any]) -> Result:
    answer = client.post("/v1/completions", json=body | {"return_token_ids": True})
    assert answer.status_code == 200, answer.text
    return _from_chunks([answer.json()])


def http_stream(client: httpx.Client, body: dict[str, Any]) -> Result:
    options = {"stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}
    answer = client.post("/v1/completions", json=body | options)
    assert answer.status_code == 200, answer.text
    *records, done = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert done == "[DONE]"
    return _from_chunks([json.loads(record) for record in records])


def grpc_whole(stub: GenerationStub, body: dict[str, Any]) -> Result:
    answer = stub.Generate(grpc_request(body))
    return _from_deltas(list(answer.choices), answer.usage)


def grpc_stream(stub: GenerationStub, body: dict[str, Any]) -> Result:
    deltas = list(stub.GenerateStream(grpc_request(body)))
    return _from_deltas(deltas, deltas[-1].usage)


def grpc_request(body: dict[str, Any]) -> pb.GenerateRequest:
    sampling = dict(body)
    prompt = sampling.pop("prompt")
    bias = {int(key): value for key, value in sampling.pop("logit_bias", {}).items()}
    params = pb.SamplingParams(**sampling, logit_bias=bias)
    if isinstance(prompt, str):
        return pb.GenerateRequest(text=prompt, sampling=params)
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling=params)


def _from_chunks(chunks: list[dict[str, Any]]) -> Result:
    answers: dict[int, Answer] = {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        answer = answers.setdefault(choice["index"], Answer())
        assert answer.finish_reason is None, "something came after the end"
        answer.text += choice["text"]
        answer.token_ids += choice["token_ids"]
        answer.finish_reason = choice["finish_reason"]
        answer.stop_reason = choice.get("stop_reason")
        if choice["logprobs"]:
            answer.tokens += choice["logprobs"]["tokens"]
            answer.logprobs += choice["logprobs"]["token_logprobs"]
            answer.offsets += choice["logprobs"]["text_offset"]
    usage = chunks[-1]["usage"]
    return Result(_in_order(answers), usage["prompt_tokens"], usage["completion_tokens"])


def _from_deltas(deltas: list[pb.GenerateDelta], usage: pb.Usage) -> Result:
    answers: dict[int, Answer] = {}
    for delta in deltas:
        answer = answers.setdefault(delta.choice, Answer())
        assert answer.finish_reason is None, "something came after the end"
        assert delta.index == len(answer.token_ids)
        answer.text += delta.text
        answer.token_ids += delta.token_ids
        name = pb.FinishReason.Name(delta.finish_reason).removeprefix("FINISH_REASON_").lower()
        answer.finish_reason = None if name == "unspecified" else name
        kind = delta.WhichOneof("stop_reason")
        answer.stop_reason = getattr(delta, kind) if kind else None
        for one in delta.logprobs:
            answer.tokens.append(one.text)
            answer.logprobs.append(one.logprob if one.HasField("logprob") else None)
            answer.offsets.append(one.text_offset)
    return Result(_in_order(answers), usage.prompt_tokens, usage.completion_tokens)


def _in_order(answers: dict[int, Answer]) -> list[Answer]:
    return [answers[index] for index in sorted(answers)]
