"""Every method of both clients over both doors, before a real split model."""

import httpx
import pytest

from shardline_client import InvalidRequest, NotFound, Usage

MESSAGES = [{"role": "user", "content": "Say something, please."}]
GREEDY = {"temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def expected(server):
    """What the HTTP door says, read by no client of ours."""

    def ask(path, **body):
        answer = httpx.post(f"{server['http']}{path}", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()

    return ask


def test_models_and_tokens(client, expected):
    assert [(model.name, model.owned_by) for model in client.models()] == [("tiny", "shardline")]
    assert client.models()[0].max_model_len == 512
    text = "The 🎉"
    assert list(client.tokenize(text).token_ids) == expected("/tokenize", prompt=text)["tokens"]
    chat = expected("/tokenize", messages=MESSAGES)
    assert list(client.tokenize(MESSAGES).token_ids) == chat["tokens"]


def test_a_completion(client, expected):
    body = {"prompt": "The quick", "max_tokens": 8, "return_token_ids": True, **GREEDY}
    [choice] = expected("/v1/completions", **body)["choices"]
    answer = client.complete("The quick", max_tokens=8, **GREEDY)
    assert answer.text == choice["text"]
    assert list(answer.choices[0].token_ids) == choice["token_ids"]
    assert answer.finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (
        len(client.tokenize("The quick").token_ids),
        8,
    )


def test_token_ids_are_a_prompt_too(client):
    ids = client.tokenize("The quick").token_ids
    assert client.complete(ids, max_tokens=8, **GREEDY).text == (
        client.complete("The quick", max_tokens=8, **GREEDY).text
    )


def test_a_chat_answer(client, expected):
    body = {"messages": MESSAGES, "max_tokens": 8, **GREEDY}
    [choice] = expected("/v1/chat/completions", **body)["choices"]
    assert client.chat(MESSAGES, max_tokens=8, **GREEDY).text == choice["message"]["content"]


@pytest.mark.parametrize("is_chat", [False, True])
def test_the_pieces_are_the_whole(client, is_chat):
    options = {"max_tokens": 12, "seed": 3, "n": 2, "temperature": 1.2, "logprobs": 2}
    whole = client.chat(MESSAGES, **options) if is_chat else client.complete("The", **options)
    pieces = (client.read_chat if is_chat else client.read_complete)(
        MESSAGES if is_chat else "The", **options
    )
    for number, choice in enumerate(whole.choices):
        own = [piece for piece in pieces if piece.choice == number]
        assert "".join(piece.text for piece in own) == choice.text
        tokens = [one for piece in own for one in piece.logprobs]
        for one, other in zip(tokens, choice.logprobs, strict=True):
            assert (one.text, list(one.top)) == (other.text, list(other.top))
            assert one.logprob == pytest.approx(other.logprob, rel=1e-5)  # batches differ
        assert len(choice.logprobs) == len(choice.token_ids)
        assert [piece.finish_reason is None for piece in own] == [True] * (len(own) - 1) + [False]
        num_before = 0
        for piece in own:
            assert piece.index == num_before
            num_before += len(piece.token_ids)


def test_both_doors_say_the_same(make_client, server):
    options = {"max_tokens": 10, "seed": 5, "n": 2, "logprobs": 3, "echo": True}
    answers = [
        make_client(server[door]).complete("The quick", **options, request_id="same")
        for door in ("http", "grpc")
    ]
    http, grpc = answers
    assert http.choices[0].text.startswith("The quick")
    assert (http.request_id, http.usage.completion_tokens) == ("same", grpc.usage.completion_tokens)
    for one, other in zip(http.choices, grpc.choices, strict=True):
        assert (one.text, one.token_ids) == (other.text, other.token_ids)
        assert [token.text for token in one.logprobs] == [token.text for token in other.logprobs]
        assert one.logprobs[0].logprob is None
        for mine, theirs in zip(one.logprobs[1:], other.logprobs[1:], strict=True):
            assert mine.logprob == pytest.approx(theirs.logprob, rel=1e-5)
            assert list(mine.top) == list(theirs.top)


def test_what_stopped_it(client):
    whole = client.complete("The quick", max_tokens=16, **GREEDY)
    stop = whole.text[4:6]
    stopped = client.complete("The quick", max_tokens=16, stop=stop, **GREEDY)
    assert (stopped.finish_reason, stopped.choices[0].stop_reason) == ("stop", stop)
    assert stopped.text == whole.text[: whole.text.index(stop)]
    token_id = whole.choices[0].token_ids[2]
    stopped = client.complete("The quick", max_tokens=16, stop_token_ids=[token_id], **GREEDY)
    assert stopped.choices[0].stop_reason == token_id


def test_usage_tells_what_was_cached(client):
    prompt = list(range(10, 90))
    client.complete(prompt, max_tokens=1)
    assert client.complete(prompt, max_tokens=1).usage == Usage(
        prompt_tokens=80, completion_tokens=1, cached_tokens=64
    )


@pytest.mark.parametrize(
    ("options", "error", "param"),
    [
        ({"max_tokens": -1}, InvalidRequest, "max_tokens"),
        ({"temperature": 9.5}, InvalidRequest, "temperature"),
        ({"max_tokens": 2**31}, InvalidRequest, "max_tokens"),
        ({"temprature": 1}, InvalidRequest, "temprature"),
        ({"model": "other"}, NotFound, "model"),
    ],
)
def test_a_wrong_request_is_named(client, options, error, param):
    with pytest.raises(error) as caught:
        client.complete("The", **options)
    assert caught.value.param == param


@pytest.mark.parametrize("options", [{"temperature": "hot"}, {"seed": 2**70}, {"n": 0}])
def test_what_a_door_cannot_even_carry_is_refused_alike(client, options):
    with pytest.raises(InvalidRequest):
        client.complete("The", **options)


@pytest.mark.parametrize("prompt", ["\ud800", "", [], ["one", "two"], [[1, 2]], [-1], [10**6]])
def test_a_prompt_that_is_none_is_refused(client, prompt):
    with pytest.raises(InvalidRequest):
        client.complete(prompt)


def test_line_separators_do_not_cut_an_event(client):
    prompt = "a\u2028b\x85c\x1cd\re"
    assert client.complete(prompt, max_tokens=1, echo=True).text.startswith(prompt)


def test_the_code_of_a_refusal(client):
    with pytest.raises(InvalidRequest) as caught:
        client.complete("The", max_tokens=2**30)
    assert caught.value.code == "context_length_exceeded"
