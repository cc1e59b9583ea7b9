"""The HTTP door before a scripted engine: shapes, keys, failures, and clients that leave."""

import json
import socket

import httpx
import pytest
from tests.server.peer import WAIT_S, delta, made_up_logprobs, silence
from tests.server.running import running_frontend

from shardline_server.door_config import DoorConfig
from shardline_server.messages import EngineFailed, FinishReason, PipeStats, StageStats

MESSAGES = [{"role": "user", "content": "Hi"}]


def records(response):
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [line.removeprefix("data: ") for line in lines]


def test_a_completion(http, tokenizer):
    response = http.post("/v1/completions", json={"prompt": "the fox", "max_tokens": 4})
    body = response.json()
    assert body["id"].startswith("cmpl-") and body["id"] == response.headers["x-request-id"]
    assert (body["object"], body["model"]) == ("text_completion", "tiny")
    [choice] = body["choices"]
    assert choice == {
        "index": 0,
        "text": "the foxthe fox",
        "logprobs": None,
        "finish_reason": "length",
    }
    assert body["usage"] == {
        "prompt_tokens": len(tokenizer.encode("the fox").ids),
        "completion_tokens": 4,
        "total_tokens": len(tokenizer.encode("the fox").ids) + 4,
        "prompt_tokens_details": {"cached_tokens": 1},
    }


def test_a_streamed_completion(http):
    body = {"prompt": "the fox", "max_tokens": 3, "stream": True}
    body["stream_options"] = {"include_usage": True}
    response = http.post("/v1/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, usage, done = records(response)
    assert done == "[DONE]"
    chunks = [json.loads(chunk) for chunk in chunks]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "the foxthe"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "length"]
    assert json.loads(usage)["choices"] == []
    assert json.loads(usage)["usage"]["completion_tokens"] == 3


def test_a_chat_answer(http):
    response = http.post("/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 3})
    body = response.json()
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"]["role"] == "assistant"
    assert body["choices"][0]["finish_reason"] == "length"


def test_a_streamed_chat_answer(http):
    body = {"messages": MESSAGES, "max_tokens": 4, "stream": True, "n": 2}
    *chunks, done = records(http.post("/v1/chat/completions", json=body))
    assert done == "[DONE]"
    choices = [json.loads(chunk)["choices"][0] for chunk in chunks]
    for index in (0, 1):
        own = [choice for choice in choices if choice["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert all("role" not in choice["delta"] for choice in own[1:])
        assert [choice["finish_reason"] for choice in own][-1] == "length"


def test_what_reaches_the_engine(http, peer, tokenizer):
    http.post(
        "/v1/chat/completions", json={"messages": MESSAGES, "seed": 5, "n": 2, "max_tokens": 1}
    )
    first, second = peer.next_submit(), peer.next_submit()
    prompt = "<|start|>user\nHi<|end|>\n<|start|>assistant\n"
    assert first.token_ids == second.token_ids == tokenizer.encode(prompt).ids
    assert (first.sampling.seed, second.sampling.seed) == (5, 6)
    assert first.sampling.stop_token_ids == (tokenizer.eos_token_id,)


def test_defaults_for_max_tokens(http, peer):
    http.post("/v1/completions", json={"prompt": "the"})
    assert peer.next_submit().sampling.max_tokens == 16
    http.post("/v1/chat/completions", json={"messages": MESSAGES})
    submit = peer.next_submit()
    assert submit.sampling.max_tokens == peer.ready.max_model_len - len(submit.token_ids)


def test_logprobs_of_a_completion_with_echo(http):
    body = {"prompt": "the fox", "max_tokens": 1, "echo": True, "logprobs": 1}
    [choice] = http.post("/v1/completions", json=body).json()["choices"]
    assert choice["text"] == "the foxthe"
    assert choice["logprobs"] == {
        "tokens": ["the", " fox", "the"],
        "token_logprobs": [None, -0.5, -0.5],
        "top_logprobs": [None, *[choice["logprobs"]["top_logprobs"][i] for i in (1, 2)]],
        "text_offset": [0, 3, 7],
    }
    assert choice["logprobs"]["top_logprobs"][1][" fox"] == -0.5
    assert -9999.0 in choice["logprobs"]["top_logprobs"][1].values()


def test_logprobs_of_a_chat_answer(http):
    body = {"messages": MESSAGES, "max_tokens": 2, "logprobs": True, "top_logprobs": 2}
    [choice] = http.post("/v1/chat/completions", json=body).json()["choices"]
    first = choice["logprobs"]["content"][0]
    assert first["token"] == "<|start|>"
    assert bytes(first["bytes"]) == b"<|start|>"
    assert [top["logprob"] for top in first["top_logprobs"]] == [-0.5, -9999.0]


def test_a_stop_string_ends_the_request_in_the_engine(http, peer, tokenizer):
    token_ids = tokenizer.encode("the quick brown fox").ids
    peer.script = lambda submit: [delta(submit.request_id, 0, token_ids)]
    body = {"prompt": "x", "stop": ["ick br"], "max_tokens": 40, "return_token_ids": True}
    answer = http.post("/v1/completions", json=body).json()
    [choice] = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("the qu", "stop")
    assert choice["stop_reason"] == "ick br"
    num_taken = answer["usage"]["completion_tokens"]
    assert choice["token_ids"] == token_ids[:num_taken]
    assert "ick br" in tokenizer.decode(token_ids[:num_taken])
    assert "ick br" not in tokenizer.decode(token_ids[: num_taken - 1])
    assert peer.next_abort() == peer.next_submit().request_id


def test_a_stop_string_counts_from_min_tokens_on(http):
    body = {"prompt": "the fox", "stop": "the", "max_tokens": 8}
    texts = [
        http.post("/v1/completions", json=body | {"min_tokens": num}).json()["choices"][0]["text"]
        for num in (0, 1, 2, 3, 4)
    ]
    assert texts == ["", "", "the fox", "the fox", "the foxthe fox"]


def test_stop_tokens_are_not_part_of_the_text(http, tokenizer):
    quick = tokenizer.encode(" quick").ids[0]
    body = {"prompt": "the quick", "stop_token_ids": [quick], "return_token_ids": True}
    [choice] = http.post("/v1/completions", json=body).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("the", "stop")
    assert choice["stop_reason"] == quick and choice["token_ids"][-1] == quick
    body["include_stop_str_in_output"] = True
    [choice] = http.post("/v1/completions", json=body).json()["choices"]
    assert choice["text"] == "the quick"


def test_several_prompts_and_choices_keep_their_order(http):
    body = {"prompt": ["the", "fox"], "n": 2, "max_tokens": 1}
    answer = http.post("/v1/completions", json=body).json()
    assert [choice["text"] for choice in answer["choices"]] == ["the", "the", "f", "f"]
    assert answer["usage"]["completion_tokens"] == 4


def test_tokenize_and_detokenize(http, tokenizer):
    text = http.post("/tokenize", json={"prompt": "the 🎉", "return_token_strs": True}).json()
    assert text["tokens"] == tokenizer.encode("the 🎉").ids
    assert (text["count"], text["max_model_len"]) == (len(text["tokens"]), 64)
    assert text["token_strs"][0] == "the"
    chat = http.post("/tokenize", json={"messages": MESSAGES}).json()
    assert tokenizer.decode(chat["tokens"]).endswith("<|start|>assistant\n")
    back = http.post("/detokenize", json={"tokens": text["tokens"]}).json()
    assert back == {"prompt": "the 🎉"}
    assert http.post("/detokenize", json={"tokens": [512]}).status_code == 400
    for wrong in ({"prompt": 3}, {}, {"prompt": "x", "messages": MESSAGES}):
        assert http.post("/tokenize", json=wrong).json()["error"]["param"] == "prompt"


def test_models_version_load_and_docs(http):
    models = http.get("/v1/models").json()["data"]
    assert [model["id"] for model in models] == ["tiny", "tiny-alias"]
    assert http.get("/v1/models/tiny-alias").json()["max_model_len"] == 64
    assert http.get("/version").json()["version"]
    assert http.get("/load").json()["server_load"] == 0
    paths = http.get("/openapi.json").json()["paths"]
    assert {"/v1/completions", "/v1/chat/completions", "/metrics"} <= paths.keys()
    assert http.get("/docs").status_code == 200


def test_where_the_pipes_time_goes(own_http, own_peer):
    assert own_http.get("/load").json()["pipe"] is None
    parts = {"compute": 3.0, "communication": 0.5, "starved": 0.25, "scheduler": 0.25, "idle": 4.0}
    own_peer.send(PipeStats(8.0, 40, 0.125, 0.25, [StageStats(parts, 0.0625, 0.05)]))
    own_http.post("/v1/completions", json={"prompt": "the fox", "max_tokens": 1})
    assert own_http.get("/load").json()["pipe"]["stages"] == [
        {"seconds": parts, "step_s": 0.0625, "predicted_s": 0.05}
    ]
    text = own_http.get("/metrics").text
    for line in (
        'shardline:pipe_batch_imbalance{model_name="tiny"} 0.125',
        'shardline:pipe_stage_imbalance{model_name="tiny"} 0.25',
        'shardline:stage_step_seconds{model_name="tiny",stage="0"} 0.0625',
        'shardline:stage_predicted_step_seconds{model_name="tiny",stage="0"} 0.05',
        'shardline:stage_time_seconds_total{model_name="tiny",part="starved",stage="0"} 0.25',
        'shardline:stage_time_seconds_total{model_name="tiny",part="idle",stage="0"} 4.0',
    ):
        assert line in text


def test_metrics(own_http, own_peer):
    own_http.post("/v1/completions", json={"prompt": "the fox", "max_tokens": 3})
    text = own_http.get("/metrics").text
    for line in (
        'shardline:num_requests_running{model_name="tiny"} 3.0',
        'shardline:num_requests_waiting{model_name="tiny"} 2.0',
        'shardline:kv_cache_usage_perc{model_name="tiny"} 0.25',
        'shardline:prefix_cache_hits_total{model_name="tiny"} 30.0',
        'shardline:prefix_cache_queries_total{model_name="tiny"} 40.0',
        'shardline:num_preemptions_total{model_name="tiny"} 1.0',
        'shardline:prompt_tokens_total{model_name="tiny"} 2.0',
        'shardline:generation_tokens_total{model_name="tiny"} 3.0',
        'shardline:request_success_total{finished_reason="length",model_name="tiny"} 1.0',
        'shardline:time_to_first_token_seconds_count{model_name="tiny"} 1.0',
        'shardline:inter_token_latency_seconds_count{model_name="tiny"} 2.0',
        'shardline:e2e_request_latency_seconds_count{model_name="tiny"} 1.0',
    ):
        assert line in text, line


@pytest.mark.parametrize(
    ("code", "status"), [("QueueFull", 503), ("PromptTooLong", 400), ("Unheard", 500)]
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_refuses_has_a_status_even_as_a_stream(http, peer, code, status, stream):
    peer.script = lambda submit: [
        delta(
            submit.request_id,
            finish_reason=FinishReason.ERROR,
            error_code=code,
            error_message="it is so",
        )
    ]
    response = http.post("/v1/completions", json={"prompt": "the", "stream": stream})
    assert response.status_code == status
    assert response.json()["error"]["message"] == "it is so"


def test_an_error_in_the_middle_of_a_stream_is_its_last_record(http, peer):
    peer.script = lambda submit: [
        delta(submit.request_id, 0, [300]),
        delta(
            submit.request_id,
            1,
            finish_reason=FinishReason.ERROR,
            error_code="RequestFailed",
            error_message="a worker died",
        ),
    ]
    response = http.post("/v1/completions", json={"prompt": "the", "stream": True})
    assert response.status_code == 200
    *_, last = records(response)
    assert json.loads(last)["error"]["message"] == "a worker died"
    assert "[DONE]" not in response.text


@pytest.mark.parametrize("stream", [False, True])
def test_what_nobody_expected_is_logged_and_told_in_general_words(http, peer, caplog, stream):
    body = {"prompt": "the fox", "echo": True, "logprobs": 1, "stream": stream}
    prompt_logprobs_of_another_length = [made_up_logprobs(5)] * 7
    peer.script = lambda submit: [
        delta(submit.request_id, 0, [300], prompt_logprobs=prompt_logprobs_of_another_length)
    ]
    response = http.post("/v1/completions", json=body)
    assert response.status_code == 500
    assert response.json()["error"]["message"].startswith("An internal error")
    while "zip()" not in caplog.text:
        pass  # the log is written just after the answer
    assert "Traceback" in caplog.text
    assert peer.next_abort() == peer.next_submit().request_id


def test_one_failed_choice_ends_the_others(http, peer):
    def fail_the_second(submit):
        if not submit.request_id.endswith("-1"):
            return []
        return [delta(submit.request_id, finish_reason=FinishReason.ERROR, error_message="no")]

    peer.script = fail_the_second
    response = http.post("/v1/completions", json={"prompt": "the", "n": 3})
    assert response.status_code == 500
    assert {peer.next_abort()[-2:], peer.next_abort()[-2:]} == {"-0", "-2"}


def test_when_the_engine_dies_streams_end_and_health_says_why(own_http, own_peer):
    own_peer.script = lambda submit: [delta(submit.request_id, 0, [300])]
    with own_http.stream(
        "POST", "/v1/completions", json={"prompt": "a", "stream": True}
    ) as response:
        lines = response.iter_lines()
        next(lines)
        own_peer.send(EngineFailed("worker stage=1 tp=0 was killed by signal 9"))
        rest = [line for line in lines if line]
    assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "engine_unavailable"
    for path in ("/health", "/ready", "/v1/models"):
        response = own_http.get(path)
        assert response.status_code == 503
        assert "worker stage=1 tp=0 was killed" in response.json()["error"]["message"]
    assert own_http.get("/version").status_code == 200


def test_a_message_that_cannot_be_read_ends_what_it_may_have_been_part_of(own_http, own_peer):
    own_peer.script = lambda submit: [delta(submit.request_id, 0, [300])]
    body = {"prompt": "a", "stream": True}
    with own_http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        own_peer.send_bytes(b"\xc1 not msgpack")
        rest = [line for line in lines if line]
    assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "engine_unavailable"
    assert own_peer.next_abort() == own_peer.next_submit().request_id
    own_peer.reset()
    assert own_http.post("/v1/completions", json={"prompt": "a"}).status_code == 200
    assert (
        'dropped_total{channel="frontend",model_name="tiny"} 1.0' in own_http.get("/metrics").text
    )


def test_before_the_engine_is_ready_only_health_is_good(tokenizer_folder, own_peer):
    own_peer._is_ready = False
    with (
        running_frontend(own_peer.endpoint, tokenizer_folder, wait_ready=False) as running,
        httpx.Client(base_url=running.addresses.http_url) as http,
    ):
        assert http.get("/health").status_code == 200
        assert http.get("/ready").status_code == 503
        refused = http.post("/v1/completions", json={"prompt": "x"})
        assert refused.status_code == 503
        assert "loading" in refused.json()["error"]["message"]
        own_peer.send(own_peer.ready)
        running.call(running.frontend.wait_ready())
        assert http.get("/ready").status_code == 200


def test_keys(tokenizer_folder, peer):
    with (
        running_frontend(
            peer.endpoint, tokenizer_folder, door=DoorConfig(api_keys=("a key", "b"))
        ) as running,
        httpx.Client(base_url=running.addresses.http_url) as http,
    ):
        for headers in ({}, {"Authorization": "Bearer c"}, {"Authorization": "Basic b"}):
            response = http.get("/v1/models", headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
        for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
            assert http.post(path, json={"prompt": "x"}).status_code == 401
        assert http.get("/v1/models", headers={"Authorization": "Bearer b"}).status_code == 200
        assert http.get("/v1/models", headers={"Authorization": "bearer a key"}).status_code == 200
        for path in ("/health", "/ready", "/metrics"):
            assert http.get(path).status_code == 200


def raw_post(address, body, receive_buffer=65536):
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(WAIT_S)
    connection.connect((address.host, address.http_port))
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
    connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + content)
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_the_first_token_frees_its_request(running, peer, stream):
    peer.script = silence
    with raw_post(running.addresses, {"prompt": "the fox", "stream": stream, "n": 2}):
        submitted = {peer.next_submit().request_id, peer.next_submit().request_id}
    assert {peer.next_abort(), peer.next_abort()} == submitted


def test_a_client_that_leaves_in_the_middle_of_a_stream_frees_its_request(running, peer):
    peer.script = lambda submit: [delta(submit.request_id, 0, [300])]
    with raw_post(running.addresses, {"prompt": "the fox", "stream": True}) as connection:
        received = b""
        while b"data: " not in received:
            received += connection.recv(4096)
    assert peer.next_abort() == peer.next_submit().request_id


def test_a_reader_that_does_not_read_holds_up_nobody(running, http, peer, tokenizer):
    flood = tokenizer.encode("👩‍👩‍👧 ").ids * 5000

    def flood_the_first(submit):
        starts = [i * len(flood) for i in range(80 if submit.sampling.seed == 1 else 0)]
        floods = [delta(submit.request_id, start, flood) for start in starts]
        end = len(flood) * len(floods)
        return [*floods, delta(submit.request_id, end, [300], finish_reason=FinishReason.LENGTH)]

    peer.script = flood_the_first
    body = {"prompt": "the fox", "stream": True, "seed": 1}
    with raw_post(running.addresses, body, receive_buffer=4096):
        peer.next_submit()
        for _ in range(3):
            answer = http.post("/v1/completions", json={"prompt": "the fox", "seed": 2})
            assert answer.status_code == 200
        assert http.get("/load").json()["server_load"] == 1  # still stuck
