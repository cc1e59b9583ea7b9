"""The official `openai` client, pointed at us, before the real split model."""

import openai
import pytest
from openai import OpenAI

MESSAGES = [{"role": "user", "content": "Say something, please."}]


@pytest.fixture(scope="module")
def client(served):
    url = f"{served.addresses.http_url}/v1"
    with OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny", "tiny-alias"]
    assert client.models.retrieve("tiny").owned_by == "shardline"


def test_a_completion(client):
    answer = client.completions.create(
        model="tiny", prompt="The quick", max_tokens=8, temperature=0, logprobs=2, user="me"
    )
    [choice] = answer.choices
    assert choice.finish_reason in {"length", "stop"}
    assert len(choice.logprobs.tokens) == answer.usage.completion_tokens
    assert all(len(top) in (2, 3) for top in choice.logprobs.top_logprobs)
    assert choice.logprobs.text_offset[0] == 0


def test_a_streamed_completion_is_the_whole_one(client):
    request = {"model": "tiny", "prompt": "The quick", "max_tokens": 8, "seed": 3}
    whole = client.completions.create(**request)
    chunks = list(client.completions.create(**request, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_a_chat_answer(client):
    answer = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_completion_tokens=8,
        seed=3,
        logprobs=True,
        top_logprobs=2,
    )
    [choice] = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.tool_calls is None
    assert len(choice.logprobs.content) == answer.usage.completion_tokens
    assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_streamed_chat_answer_is_the_whole_one(client):
    request = {"model": "tiny", "messages": MESSAGES, "max_tokens": 12, "seed": 3, "n": 2}
    whole = client.chat.completions.create(**request)
    options = {"include_usage": True}
    stream = client.chat.completions.create(**request, stream=True, stream_options=options)
    *chunks, last = stream
    assert last.choices == [] and last.usage.completion_tokens == whole.usage.completion_tokens
    for choice in whole.choices:
        own = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert own[0].delta.role == "assistant"
        assert "".join(c.delta.content or "" for c in own) == choice.message.content
        assert own[-1].finish_reason == choice.finish_reason


def test_the_stream_helper_of_the_client(client):
    # It wants an answer that ends by itself: the end token, as soon as four others are there.
    request = {"model": "tiny", "messages": MESSAGES, "seed": 3, "logit_bias": {"2": 100}}
    request["extra_body"] = {"min_tokens": 4}
    with client.chat.completions.stream(**request) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    whole = client.chat.completions.create(**request)
    assert final.choices[0].finish_reason == "stop"
    assert final.choices[0].message.content == whole.choices[0].message.content


def test_the_same_seed_gives_the_same_and_another_another(client):
    def ask(seed):
        request = {"model": "tiny", "prompt": "The", "max_tokens": 16, "temperature": 1.5}
        return client.completions.create(**request, seed=seed).choices[0].text

    assert ask(1) == ask(1)
    assert ask(1) != ask(2)


def test_stop_and_fields_of_vllms_users(client):
    request = {"model": "tiny", "prompt": "The quick", "max_tokens": 16, "temperature": 0}
    extra = {"ignore_eos": True, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.1}
    text = client.completions.create(**request, extra_body=extra).choices[0].text
    stop = text[4:6]
    choice = client.completions.create(**request, stop=stop, extra_body=extra).choices[0]
    assert choice.finish_reason == "stop"
    assert choice.text == text[: text.index(stop)]


def test_errors_are_the_clients_own_kinds(client):
    with pytest.raises(openai.NotFoundError, match="not served"):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="x", max_tokens=2**31)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "max_tokens"
    with pytest.raises(openai.BadRequestError, match="does not support `tools`"):
        client.chat.completions.create(
            model="tiny", messages=MESSAGES, tools=[{"type": "function", "function": {}}]
        )
    with pytest.raises(openai.BadRequestError, match="best_of"):
        client.completions.create(model="tiny", prompt="x", best_of=3)
