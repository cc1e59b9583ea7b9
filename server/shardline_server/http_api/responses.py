"""The bodies that we send, in exactly OpenAI's shapes; `None` is `null` unless marked absent."""

from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, Field

T = TypeVar("T")
AbsentIfNone = Annotated[T | None, Field(exclude_if=lambda value: value is None)]


class PromptTokensDetails(BaseModel):
    """Where prompt tokens came from."""

    cached_tokens: int


class UsageBody(BaseModel):
    """What a request took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class BudgetOutcomeBody(BaseModel):
    """How the request went, in milliseconds from its arrival; of several choices the worst.

    `met` is true where no limit was asked for. `tpot_ms` is null below two output tokens, a
    prediction where there was none.
    """

    met: bool
    ttft_ms: float | None
    tpot_ms: float | None
    e2e_ms: float
    predicted_ttft_ms: float | None
    predicted_tpot_ms: float | None
    predicted_e2e_ms: float | None


class CompletionLogprobs(BaseModel):
    """Logprobs of a completion: four lists with one entry a token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """A choice of a completion, or a chunk of one."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: AbsentIfNone[str | int] = None
    token_ids: AbsentIfNone[list[int]] = None
    prompt_token_ids: AbsentIfNone[list[int]] = None


class Completion(BaseModel):
    """The answer of /v1/completions, whole or as a chunk of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: AbsentIfNone[UsageBody] = None
    latency_budget: AbsentIfNone[BudgetOutcomeBody] = None


class TopLogprob(BaseModel):
    """A token with its bytes, which a character may share with its neighbours."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopLogprob):
    """An output token and the likeliest alternatives."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Logprobs of a chat answer."""

    content: list[ChatTokenLogprob]
    refusal: None = None


class AssistantMessage(BaseModel):
    """The whole answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatDelta(BaseModel):
    """A piece of the answer."""

    role: AbsentIfNone[Literal["assistant"]] = None
    content: AbsentIfNone[str] = None


class ChatChoice(BaseModel):
    """A choice of a chat completion."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: AbsentIfNone[str | int] = None
    token_ids: AbsentIfNone[list[int]] = None


class ChatChunkChoice(BaseModel):
    """A choice's part of a chunk."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: AbsentIfNone[str | int] = None
    token_ids: AbsentIfNone[list[int]] = None


class ChatCompletion(BaseModel):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageBody
    latency_budget: AbsentIfNone[BudgetOutcomeBody] = None
    prompt_token_ids: AbsentIfNone[list[int]] = None


class ChatCompletionChunk(BaseModel):
    """One record of a streamed chat answer."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: AbsentIfNone[UsageBody] = None
    latency_budget: AbsentIfNone[BudgetOutcomeBody] = None


class ModelCard(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["shardline"] = "shardline"
    max_model_len: int


class ModelList(BaseModel):
    """The answer of /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Tokens(BaseModel):
    """The answer of /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Text(BaseModel):
    """The answer of /detokenize."""

    prompt: str


class RefusedBudget(BaseModel):
    """What was asked for, after the class had filled it in, and what the server expected."""

    asked: dict[str, float | str] | None
    predicted: dict[str, float] | None


class ErrorBody(BaseModel):
    """What went wrong: for people, for programs, and which field of the request it is about."""

    message: str
    type: str
    param: str | None
    code: str | None
    retry_after_s: AbsentIfNone[float] = None
    latency_budget: AbsentIfNone[RefusedBudget] = None


class ErrorResponse(BaseModel):
    """Every answer that is not a success."""

    error: ErrorBody
