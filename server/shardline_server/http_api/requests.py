"""The bodies that clients send, in OpenAI's shapes (and vLLM's, for its extensions)."""

from typing import ClassVar, Self

from pydantic import model_validator

from shardline_server.prompts import ChatPrompt, Messages, PromptList, TemplateOptions
from shardline_server.request_fields import (
    ChatFields,
    CompletionFields,
    SamplingFields,
)
from shardline_server.strict_model import StrictModel, refusal


class StreamOptions(StrictModel):
    """OpenAI's `stream_options`."""

    ignored: ClassVar = {"include_obfuscation"}
    unsupported: ClassVar = {"continuous_usage_stats": (False,)}

    include_usage: bool | None = None


class OpenAIFields(SamplingFields):
    """What both OpenAI endpoints say beside their prompt and their parameters."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise refusal("stream_options", "stream_options needs stream to be true.")
        return self

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class CompletionRequest(OpenAIFields, CompletionFields):
    """POST /v1/completions."""

    prompt: PromptList
    add_special_tokens: bool | None = None


class ChatCompletionRequest(OpenAIFields, ChatFields, ChatPrompt):
    """POST /v1/chat/completions."""


class TokenizeRequest(TemplateOptions):
    """POST /tokenize, with a text or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise refusal("prompt", "Send either prompt or messages.")
        return self


class DetokenizeRequest(StrictModel):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int]
