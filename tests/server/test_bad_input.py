"""Every kind of bad input, at both doors: one clear error each, and nothing reaches the engine."""

import json

import grpc
import pytest

from shardline_server.protos.shardline.v1 import generation_pb2 as pb

CASES = {
    "unknown model": ({"model": "other"}, 404, "model", "not served"),
    "max_tokens 0": ({"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
    "max_tokens 2^31": ({"max_tokens": 2**31}, 400, "max_tokens", "at most 62 here"),
    "prompt too long": ({"prompt": [5] * 64}, 400, "prompt", "at most 63 tokens"),
    "unknown token": ({"prompt": [5, 512]}, 400, "prompt", "512 is not in the vocabulary"),
    "unknown stop token": ({"stop_token_ids": [600]}, 400, "stop_token_ids", "0 to 511"),
    "unknown biased token": ({"logit_bias": {"600": 1.0}}, 400, "logit_bias", "0 to 511"),
    "empty prompt": ({"prompt": ""}, 400, "prompt", "empty"),
    "no tokens": ({"prompt": [[]]}, 400, "prompt", "empty"),
    "temperature": ({"temperature": -1.0}, 400, "temperature", "greater than or equal to 0"),
    "not a number": ({"top_p": float("nan")}, 400, "top_p", "nan"),
    "too many choices": ({"n": 200}, 400, "n", "less than or equal to 128"),
    "too few tokens": (
        {"min_tokens": 9, "max_tokens": 3},
        400,
        "min_tokens",
        "more than max_tokens",
    ),
}
CODES = {404: grpc.StatusCode.NOT_FOUND, 400: grpc.StatusCode.INVALID_ARGUMENT}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_over_http(http, peer, case, stream):
    body, status, param, words = CASES[case]
    body = {"prompt": "the fox", "stream": stream} | body
    response = http.post("/v1/completions", content=json.dumps(body))
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param)
    assert error["type"] == "invalid_request_error"
    assert words in error["message"]
    assert peer.submits.empty()


def as_grpc(prompt="the fox", model="", **sampling):
    bias = sampling.pop("logit_bias", {})
    params = pb.SamplingParams(**sampling, logit_bias={int(k): v for k, v in bias.items()})
    request = pb.GenerateRequest(model=model, sampling=params)
    if isinstance(prompt, str):
        request.text = prompt
    else:
        flat = prompt[0] if prompt and isinstance(prompt[0], list) else prompt
        request.token_ids.CopyFrom(pb.TokenIds(ids=flat))
    return request


@pytest.mark.parametrize("case", CASES)
def test_over_grpc(stub, peer, case):
    body, status, param, words = CASES[case]
    request = as_grpc(**body)
    for call in (stub.Generate, lambda request: list(stub.GenerateStream(request))):
        with pytest.raises(grpc.RpcError) as caught:
            call(request)
        assert caught.value.code() is CODES[status]
        assert words in caught.value.details()
        assert dict(caught.value.trailing_metadata())["shardline-error-param"] == param
    assert peer.submits.empty()


def test_a_prompt_is_needed_over_grpc(stub):
    with pytest.raises(grpc.RpcError) as caught:
        stub.Generate(pb.GenerateRequest())
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "no prompt" in caught.value.details()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"prompt": "x"', "not valid JSON"),
        (b"[1, 2]", "must be a JSON object"),
        (b'"text"', "must be a JSON object"),
        (b"", "must be a JSON object"),
        (b"\xff\xfe", "body"),
        (b'{"prompt": "x", "max_tokens": "5"}', "max_tokens"),
        (b'{"prompt": "x", "max_tokens": true}', "max_tokens"),
        (b'{"prompt": "x", "maximum": 5}', "Unknown field `maximum`"),
        (b'{"max_tokens": 5}', "`prompt` is missing"),
        (b'{"prompt": "\\ud800"}', "not valid Unicode"),
        (b'{"prompt": "x", "tools": [{}]}', "does not support `tools`"),
        (b"[" * 100_000, "body"),
    ],
)
def test_broken_bodies(http, content, words):
    response = http.post("/v1/completions", content=content)
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]


def test_a_form_is_told_that_json_is_wanted(http):
    response = http.post("/v1/completions", data={"prompt": "x"})
    assert response.status_code == 400
    assert "Content-Type: application/json" in response.json()["error"]["message"]


def test_unknown_paths_and_wrong_methods_have_the_same_shape(http):
    unknown, wrong = http.get("/v2/nothing"), http.get("/v1/completions")
    assert (unknown.status_code, wrong.status_code) == (404, 405)
    assert "/v2/nothing" in unknown.json()["error"]["message"]
    assert wrong.headers["allow"] == "POST"
    assert wrong.json()["error"]["type"] == "invalid_request_error"
    assert http.get("/v1/models/other").json()["error"]["code"] == "model_not_found"


def test_bad_messages_name_the_message(http):
    messages = [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]
    response = http.post("/v1/chat/completions", json={"messages": messages})
    assert response.json()["error"]["param"] == "messages[1].role"


def test_a_bad_role_over_grpc(stub):
    chat = pb.Chat(messages=[pb.ChatMessage(role="robot", content="a")])
    with pytest.raises(grpc.RpcError) as caught:
        stub.Generate(pb.GenerateRequest(chat=chat))
    assert "messages[0].role" in caught.value.details()
