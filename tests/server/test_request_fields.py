"""What a request may say: strict types, known harmless fields, and refusals by name."""

import pytest
from pydantic import ValidationError

from shardline_server.http_api.requests import ChatCompletionRequest, CompletionRequest
from shardline_server.request_fields import UNSUPPORTED_FIELDS, CompletionFields, invalid_request

MESSAGES = [{"role": "user", "content": "Hi"}]


def refusal_of(model, **body):
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    return invalid_request(caught.value.errors())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", "5"),
        ("max_tokens", True),
        ("max_tokens", 5.0),
        ("max_tokens", 0),
        ("max_completion_tokens", -1),
        ("temperature", 2.1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -2),
        ("min_p", -0.1),
        ("seed", 2**63),
        ("seed", 1.5),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", ["x"] * 17),
        ("stop", [1]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", 3),
        ("min_tokens", -1),
        ("ignore_eos", 1),
        ("presence_penalty", 3),
        ("frequency_penalty", float("inf")),
        ("repetition_penalty", 0),
        ("logit_bias", {"word": 1}),
        ("logit_bias", {"5": 101}),
        ("n", 0),
        ("n", 129),
        ("logprobs", 21),
        ("logprobs", True),
    ],
)
def test_a_wrong_value_is_refused_under_its_field(field, value):
    error = refusal_of(CompletionFields, **{field: value})
    assert (error.param or "").split("[")[0] == field
    assert field in error.message


@pytest.mark.parametrize("model", [CompletionRequest, ChatCompletionRequest])
def test_null_means_not_said(model):
    prompt = {"prompt": "x"} if model is CompletionRequest else {"messages": MESSAGES}
    optional = {name: None for name in model.model_fields if name not in prompt}
    assert model.model_validate(prompt | optional) == model.model_validate(prompt)


@pytest.mark.parametrize(
    "harmless",
    [
        {"user": "me", "metadata": {"a": "b"}, "safety_identifier": "x", "store": False},
        {"service_tier": "auto", "parallel_tool_calls": True, "prompt_cache_key": "k"},
        {"tools": [], "tool_choice": "none", "functions": None, "audio": None},
        {"response_format": {"type": "text"}, "modalities": ["text"], "suffix": None},
        {"best_of": None, "use_beam_search": False, "length_penalty": 1.0, "priority": 0},
        {"spaces_between_special_tokens": True, "include_reasoning": True},
    ],
)
def test_fields_without_effect_are_accepted(harmless):
    ChatCompletionRequest.model_validate({"messages": MESSAGES, **harmless})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("response_format", {"type": "json_object"}),
        ("functions", [{}]),
        ("modalities", ["text", "audio"]),
        ("best_of", 2),
        ("suffix", "end"),
        ("guided_json", {}),
        ("priority", False),
        ("service_tier", "priority"),
        ("store", True),
        ("echo", True),
        ("logit_processor_of_mine", 1),
    ],
)
def test_fields_that_would_change_the_output_are_refused_by_name(field, value):
    error = refusal_of(ChatCompletionRequest, messages=MESSAGES, **{field: value})
    assert error.param == field
    assert field in error.message


def test_every_unsupported_field_is_refused_with_a_value_of_no_meaning():
    for field in UNSUPPORTED_FIELDS:
        assert refusal_of(ChatCompletionRequest, messages=MESSAGES, **{field: "?"}).param == field


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs"),
        ({"stream": True, "stream_options": {"other": 1}}, "stream_options.other"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content",
        ),
        ({"messages": []}, "messages"),
    ],
)
def test_what_does_not_go_together(body, param):
    assert refusal_of(ChatCompletionRequest, **{"messages": MESSAGES, **body}).param == param


def test_an_answer_can_be_sent_back_as_a_message():
    answer = {"role": "assistant", "content": "Hi", "refusal": None, "tool_calls": None}
    ChatCompletionRequest.model_validate({"messages": [*MESSAGES, answer | {"audio": None}]})


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        ("", [""]),
    ],
)
def test_prompts_in_four_shapes(prompt, prompts):
    assert CompletionRequest.model_validate({"prompt": prompt}).prompt == prompts


@pytest.mark.parametrize("prompt", [None, 3, [], [1, "a"], [[1], "a"], [True], {"a": 1}, [1.0]])
def test_other_shapes_are_refused(prompt):
    error = refusal_of(CompletionRequest, prompt=prompt)
    assert error.param == "prompt"
    assert "a list of token ids" in error.message
