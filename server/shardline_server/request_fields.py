"""What a request may say beside its prompt, strictly typed, and which known fields we do not serve.

Both doors validate with these models; nothing that would change the output is ever ignored.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

from pydantic import (
    BeforeValidator,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from shardline_server.budgets import BudgetFields
from shardline_server.errors import InvalidRequest
from shardline_server.strict_model import StrictModel, refusal

MAX_BIASES = 1024
MAX_CHOICES = 1024
MAX_N = 128
MAX_STOP_STRINGS = 16
MAX_LOGPROBS = 20
MAX_SEED = 2**63 - 1

# They say who asks or how to bill, never what comes out.
IGNORED_FIELDS: set[str] = {
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "request_id",
    "safety_identifier",
    "spaces_between_special_tokens",
    "user",
}
# Fields of OpenAI's and vLLM's APIs that we do not serve, with the values that mean "not used".
# None always means that.
UNSUPPORTED_FIELDS: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "best_of": (),
    "chat_template": (),
    "detokenize": (True,),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_reasoning": (True,),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "mm_processor_kwargs": (),
    "modalities": (["text"],),
    "prediction": (),
    "priority": (0,),
    "prompt_logprobs": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}


def described(description: str) -> WrapValidator:
    """One message for a field of several shapes, instead of one for each shape that fails."""

    def validate(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError as error:
            raise PydanticCustomError("shape", "{text}", {"text": description}) from error

    return WrapValidator(validate)


def _one_as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


NonEmptyText = Annotated[str, Field(min_length=1, max_length=1024)]
StopStrings = Annotated[
    list[NonEmptyText],
    Field(max_length=MAX_STOP_STRINGS),
    described(f"Must be a non-empty string, or a list of at most {MAX_STOP_STRINGS} of them."),
    BeforeValidator(_one_as_list, json_schema_input_type=str | list[str]),
]
LogitBias = Annotated[
    dict[Annotated[int, Field(strict=False)], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=MAX_BIASES),
    described(f"Must map at most {MAX_BIASES} token ids to numbers from -100 to 100."),
]
TokenId = Annotated[int, Field(ge=0)]


class SamplingFields(StrictModel, ABC):
    """The parameters that every endpoint and both doors share; None means "not said"."""

    ignored = IGNORED_FIELDS
    unsupported = UNSUPPORTED_FIELDS

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = Field(
        default=None, description="0 and -1 mean the whole vocabulary."
    )
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-MAX_SEED - 1, le=MAX_SEED)] | None = None
    stop: StopStrings | None = None
    include_stop_str_in_output: bool | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    ignore_eos: bool | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: LogitBias | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    skip_special_tokens: bool | None = None
    latency_budget: BudgetFields | None = None

    @model_validator(mode="after")
    def _agree(self) -> Self:
        either = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(either) > 1:
            message = "max_tokens and max_completion_tokens differ; send one of them."
            raise refusal("max_tokens", message)
        return self

    @property
    def requested_max_tokens(self) -> int | None:
        """The limit the client asked for, under either name."""
        return self.max_tokens or self.max_completion_tokens

    @property
    @abstractmethod
    def num_logprobs(self) -> int | None:
        """Alternatives wanted beside each output token; None: no logprobs at all."""

    @property
    @abstractmethod
    def num_prompt_logprobs(self) -> int | None:
        """The same for the tokens of the prompt."""

    @property
    @abstractmethod
    def echoes_prompt(self) -> bool:
        """Whether the text begins with the prompt."""


class CompletionFields(SamplingFields):
    """The parameters of plain completions, and of every generation over gRPC."""

    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None

    @property
    def num_logprobs(self) -> int | None:
        """As asked for."""
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        """The prompt has logprobs where it is part of the text."""
        return self.logprobs if self.echo else None

    @property
    def echoes_prompt(self) -> bool:
        """As asked for."""
        return bool(self.echo)


class ChatFields(SamplingFields):
    """The parameters of chat completions."""

    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _logprobs_first(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise refusal("top_logprobs", "top_logprobs needs logprobs to be true.")
        return self

    @property
    def num_logprobs(self) -> int | None:
        """`top_logprobs` of them, if logprobs are wanted."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def num_prompt_logprobs(self) -> int | None:
        """Never: a chat answer does not repeat its prompt."""
        return None

    @property
    def echoes_prompt(self) -> bool:
        """Never."""
        return False


def invalid_request(errors: Sequence[Mapping[str, Any]]) -> InvalidRequest:
    """The first of pydantic's errors in words that name the field (`messages[0].role`)."""
    first = errors[0]
    context = first.get("ctx") or {}
    if first["type"] == "refused":
        return InvalidRequest(context["message"], param=context["param"])
    param = _path(first["loc"])
    if first["type"] == "extra_forbidden":
        return InvalidRequest(f"Unknown field `{param}`.", param=param)
    if first["type"] == "missing":
        return InvalidRequest(f"The field `{param}` is missing.", param=param)
    if param is None:
        return InvalidRequest(f"The request is not as it should be: {first['msg']}.")
    got = repr(first.get("input"))
    shown = got if len(got) <= 80 else got[:77] + "..."
    return InvalidRequest(f"{param}: {first['msg'].rstrip('.')}; got {shown}.", param=param)


def _path(location: Sequence[str | int]) -> str | None:
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return "".join(parts).removeprefix(".") or None
