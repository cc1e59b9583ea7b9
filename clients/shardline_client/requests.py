"""What can be asked, the same over both doors. Ranges and meanings are the server's to check."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

from shardline_client.errors import InvalidRequest


class Message(TypedDict):
    """One message of a conversation; the role is system, developer, user or assistant."""

    role: str
    content: str
    name: NotRequired[str]


Prompt = str | Sequence[int]
Messages = Sequence[Message]


class LatencyBudget(TypedDict, total=False):
    """How long an answer may take, in milliseconds; what is left out the priority's class says.

    `ttft_ms` is for the first token, `tpot_ms` for the mean time of each later one, `deadline_ms`
    for the last; `priority` is "interactive", "standard" or "batch"; `on_miss` "reject" or
    "degrade".
    """

    ttft_ms: float
    tpot_ms: float
    deadline_ms: float
    priority: str
    on_miss: str


class Sampling(TypedDict, total=False):
    """How tokens are chosen and when they end; what is left out is the server's to say.

    `logprobs` asks for each token's and for this many alternatives, also in a chat.
    """

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    stop: str | Sequence[str]
    include_stop_str_in_output: bool
    stop_token_ids: Sequence[int]
    min_tokens: int
    ignore_eos: bool
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: Mapping[int, float]
    n: int
    logprobs: int
    skip_special_tokens: bool


class _Common(Sampling, total=False):
    model: str
    request_id: str
    timeout_s: float | None
    add_special_tokens: bool
    latency_budget: LatencyBudget


class CompleteOptions(_Common, total=False):
    """What `complete` takes beside its prompt. `echo` begins the text with the prompt."""

    echo: bool


class ChatOptions(_Common, total=False):
    """What `chat` takes beside its messages, for the model's chat template."""

    add_generation_prompt: bool
    continue_final_message: bool
    chat_template_kwargs: Mapping[str, Any]


TEMPLATE_FIELDS = ("add_generation_prompt", "continue_final_message", "chat_template_kwargs")
_OWN_FIELDS = (
    "model",
    "request_id",
    "timeout_s",
    "add_special_tokens",
    "latency_budget",
    *TEMPLATE_FIELDS,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Generate:
    """One request for text; exactly one of `prompt` and `messages` is set.

    `sampling` and `template` hold only what the caller said.
    """

    request_id: str
    model: str | None
    prompt: str | tuple[int, ...] | None
    messages: tuple[Message, ...] | None
    add_special_tokens: bool | None
    sampling: Mapping[str, Any]
    template: Mapping[str, Any]
    latency_budget: LatencyBudget | None

    @property
    def num_choices(self) -> int:
        """How many answers are asked for."""
        n = self.sampling.get("n", 1)
        return n if isinstance(n, int) and n > 0 else 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokenize:
    """A text or a conversation whose token ids are wanted."""

    model: str | None
    text: str | None
    messages: tuple[Message, ...] | None


def completion_request(
    prompt: Prompt, options: Mapping[str, Any], *, request_id: str, model: str | None
) -> Generate:
    """Raises InvalidRequest for a name that nobody knows, or more than one prompt."""
    _require_known(options, CompleteOptions)
    given = prompt if isinstance(prompt, str) else tuple(prompt)
    if not isinstance(given, str) and not all(isinstance(one, int) for one in given):
        raise InvalidRequest("A prompt is one text, or one list of token ids.", param="prompt")
    return _generate(options, request_id, model, prompt=given, messages=None)


def chat_request(
    messages: Messages, options: Mapping[str, Any], *, request_id: str, model: str | None
) -> Generate:
    """Raises InvalidRequest for a name that nobody knows."""
    _require_known(options, ChatOptions)
    return _generate(options, request_id, model, prompt=None, messages=tuple(messages))


def tokenize_request(prompt: str | Messages, *, model: str | None) -> Tokenize:
    """A text, or the messages of a conversation."""
    if isinstance(prompt, str):
        return Tokenize(model=model, text=prompt, messages=None)
    return Tokenize(model=model, text=None, messages=tuple(prompt))


def _generate(
    options: Mapping[str, Any],
    request_id: str,
    model: str | None,
    *,
    prompt: str | tuple[int, ...] | None,
    messages: tuple[Message, ...] | None,
) -> Generate:
    said = {name: value for name, value in options.items() if value is not None}
    sampling = {name: value for name, value in said.items() if name not in _OWN_FIELDS}
    if isinstance(sampling.get("stop"), str):
        sampling["stop"] = [sampling["stop"]]
    return Generate(
        request_id=request_id,
        model=model,
        prompt=prompt,
        messages=messages,
        add_special_tokens=said.get("add_special_tokens"),
        sampling=sampling,
        latency_budget=said.get("latency_budget"),
        template={name: said[name] for name in TEMPLATE_FIELDS if name in said},
    )


def _require_known(options: Mapping[str, Any], known: type[Any]) -> None:
    for name in options:
        if name not in known.__annotations__:
            raise InvalidRequest(f"Unknown parameter `{name}`.", param=name)
