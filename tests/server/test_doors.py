"""Every behaviour through both doors, whole and streamed, before the real split model."""

from concurrent.futures import ThreadPoolExecutor

import grpc
import httpx
import pytest
from tests.server.doors import (
    Result,
    grpc_request,
    grpc_stream,
    grpc_whole,
    http_stream,
    http_whole,
)

from shardline_server.protos.shardline.v1 import generation_pb2 as pb
from shardline_server.protos.shardline.v1.generation_pb2_grpc import GenerationStub

PROMPT = "The quick brown fox jumps over 你好"
LOGPROB_TOLERANCE = 1e-4  # fp32; chunks and batches differ in the order of their sums
SCENARIOS = {
    "greedy": {"temperature": 0.0, "max_tokens": 20},
    "seeded": {"seed": 7, "max_tokens": 20},
    "hot and cut": {"seed": 7, "temperature": 1.5, "top_p": 0.9, "top_k": 50, "min_p": 0.01},
    "choices": {"seed": 3, "n": 3, "max_tokens": 8},
    "default length": {"seed": 1, "ignore_eos": True},
    "penalties": {
        "temperature": 0.0,
        "presence_penalty": 1.5,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.3,
    },
    "bias": {"temperature": 0.0, "logit_bias": {"300": 100.0}, "max_tokens": 4},
    "stop token": {
        "temperature": 0.0,
        "logit_bias": {"300": 100.0},
        "stop_token_ids": [300],
        "min_tokens": 3,
    },
    "end token": {"temperature": 0.0, "logit_bias": {"2": 100.0}, "min_tokens": 2},
    "logprobs": {"seed": 5, "logprobs": 3, "max_tokens": 6},
    "echo": {"seed": 5, "logprobs": 0, "echo": True, "max_tokens": 4, "n": 2},
    "token ids": {"prompt": [5, 6, 7, 300], "temperature": 0.0},
    "special tokens": {
        "temperature": 0.0,
        "logit_bias": {"1": 100.0},
        "max_tokens": 3,
        "skip_special_tokens": False,
    },
}


@pytest.fixture(scope="module")
def client(served):
    with httpx.Client(base_url=served.addresses.http_url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def stub(served):
    with grpc.insecure_channel(served.addresses.grpc_target) as channel:
        yield GenerationStub(channel)


@pytest.fixture(scope="module")
def every_way(client, stub):
    """A request sent in all four ways; one result, since all are equal."""

    def send(**body) -> Result:
        body = {"prompt": PROMPT} | body
        ways = [
            http_whole(client, body),
            http_stream(client, body),
            grpc_whole(stub, body),
            grpc_stream(stub, body),
        ]
        for other in ways[1:]:
            assert_same(ways[0], other)
        return ways[0]

    return send


def assert_same(one: Result, other: Result) -> None:
    for a, b in zip(one.choices, other.choices, strict=True):
        assert (a.text, a.token_ids) == (b.text, b.token_ids)
        assert (a.finish_reason, a.stop_reason) == (b.finish_reason, b.stop_reason)
        assert (a.tokens, a.offsets) == (b.tokens, b.offsets)
        assert a.logprobs == pytest.approx(b.logprobs, abs=LOGPROB_TOLERANCE)
    assert one.prompt_tokens == other.prompt_tokens
    assert one.completion_tokens == other.completion_tokens


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_all_ways_give_the_same(every_way, scenario):
    result = every_way(**SCENARIOS[scenario])
    assert result.completion_tokens == sum(len(choice.token_ids) for choice in result.choices)


def test_tokens_text_and_usage_agree(every_way, tokenizer):
    [choice] = (result := every_way(temperature=0.0, max_tokens=20, ignore_eos=True)).choices
    assert len(choice.token_ids) == result.completion_tokens == 20
    assert choice.finish_reason == "length"
    assert result.prompt_tokens == len(tokenizer.encode(PROMPT).ids)
    assert choice.text == tokenizer.decode(choice.token_ids, skip_special_tokens=True)


def test_a_stop_string_across_tokens(every_way, tokenizer):
    [whole] = every_way(temperature=0.0, max_tokens=24, logit_bias=WORDY).choices
    # A stop string from inside one token to inside a later one.
    start = len(tokenizer.decode(whole.token_ids[:3])) + 1
    stop = whole.text[start : start + 9]
    cut = whole.text.index(stop)
    body = {"temperature": 0.0, "max_tokens": 24, "logit_bias": WORDY, "stop": [stop]}
    [choice] = (result := every_way(**body)).choices
    assert (choice.text, choice.finish_reason, choice.stop_reason) == (
        whole.text[:cut],
        "stop",
        stop,
    )
    assert result.completion_tokens < 24
    assert stop in tokenizer.decode(choice.token_ids)
    [choice] = every_way(**body, include_stop_str_in_output=True).choices
    assert choice.text == whole.text[: cut + len(stop)]


# Whole words only, so that texts are easy to cut.
WORDY = {str(token_id): 100.0 for token_id in range(300, 360)}


def test_the_end_token_ends_and_is_counted(every_way):
    [choice] = (result := every_way(**SCENARIOS["end token"])).choices
    assert choice.finish_reason == "stop" and choice.stop_reason is None
    assert choice.token_ids[-1] == 2 and len(choice.token_ids) == 3
    assert result.completion_tokens == 3


def test_a_named_stop_token_is_the_reason(every_way):
    [choice] = every_way(**SCENARIOS["stop token"]).choices
    assert (choice.finish_reason, choice.stop_reason) == ("stop", 300)
    assert len(choice.token_ids) == 4


def test_echo_brings_the_prompt_and_its_logprobs(every_way, tokenizer):
    result = every_way(**SCENARIOS["echo"])
    num_prompt_tokens = len(tokenizer.encode(PROMPT).ids)
    for choice in result.choices:
        assert choice.text.startswith(PROMPT)
        assert choice.logprobs[0] is None and None not in choice.logprobs[1:]
        assert len(choice.logprobs) == num_prompt_tokens + 4
        assert choice.offsets[num_prompt_tokens] == len(PROMPT)


def test_a_choice_is_what_its_seed_alone_gives(every_way):
    together = every_way(seed=11, n=3, max_tokens=8).choices
    alone = [every_way(seed=11 + i, max_tokens=8).choices[0] for i in range(3)]
    assert [choice.token_ids for choice in together] == [choice.token_ids for choice in alone]


def test_chat_is_the_same_through_both_doors(client, stub):
    body = {"messages": [{"role": "user", "content": "Hi"}], "seed": 4, "max_tokens": 8}
    http = client.post("/v1/chat/completions", json=body | {"return_token_ids": True}).json()
    request = grpc_request({"prompt": "", "seed": 4, "max_tokens": 8})
    request.chat.CopyFrom(pb.Chat(messages=[pb.ChatMessage(role="user", content="Hi")]))
    [choice] = (answer := stub.Generate(request)).choices
    assert http["choices"][0]["message"]["content"] == choice.text
    assert http["choices"][0]["token_ids"] == list(choice.token_ids)
    assert http["usage"]["prompt_tokens"] == answer.usage.prompt_tokens


def test_many_at_once_are_each_what_they_are_alone(client, stub):
    bodies = [{"prompt": PROMPT[: 4 + i], "seed": i, "max_tokens": 4 + i % 9} for i in range(24)]
    alone = [http_whole(client, body) for body in bodies]
    with ThreadPoolExecutor(24) as pool:
        over_http = list(pool.map(lambda body: http_stream(client, body), bodies))
        over_grpc = list(pool.map(lambda body: grpc_stream(stub, body), bodies))
    for one, http, rpc in zip(alone, over_http, over_grpc, strict=True):
        assert_same(one, http)
        assert_same(one, rpc)


def test_clients_that_leave_free_their_blocks(client, stub):
    body = {"prompt": PROMPT, "max_tokens": 400, "ignore_eos": True}
    with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        next(response.iter_lines())
    pieces = stub.GenerateStream(grpc_request(body))
    next(pieces)
    pieces.cancel()
    metric = "shardline:num_requests_running"
    while not any(line.startswith(metric) and line.endswith(" 0.0") for line in lines(client)):
        pass  # ends within a step or two of the engine, else the test's time limit ends it


def lines(client):
    return client.get("/metrics").text.splitlines()


def test_the_limits_are_the_models(client):
    limit = client.get("/v1/models").json()["data"][0]["max_model_len"]
    response = client.post("/v1/completions", json={"prompt": [5] * limit})
    assert response.status_code == 400
    assert f"at most {limit - 1} tokens" in response.json()["error"]["message"]
    response = client.post("/v1/completions", json={"prompt": [400]})
    assert "0 to 399" in response.json()["error"]["message"]
