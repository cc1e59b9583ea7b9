"""What a request may give as its prompt, and how that becomes token ids. Both doors use it."""

import asyncio
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from tokenizers import Encoding
from transformers import PreTrainedTokenizerFast

from shardline_server.errors import InvalidRequest
from shardline_server.request_fields import MAX_CHOICES, described
from shardline_server.sampling import check_prompt
from shardline_server.served_model import ServedModel
from shardline_server.strict_model import StrictModel, refusal
from shardline_server.text import IncrementalDetokenizer
from shardline_server.tokenizer import Tokenizer

# In characters: about a millisecond, of which going through a thread would take another half.
_SHORT_TEXT = 1_500
TEMPLATE_PARAMETERS = set(
    inspect.signature(PreTrainedTokenizerFast.apply_chat_template).parameters
) | {"messages"}


def _as_list_of_prompts(value: Any) -> Any:
    is_token_ids = isinstance(value, list) and value != [] and isinstance(value[0], int)
    return [value] if is_token_ids or isinstance(value, str) else value


PromptList = Annotated[
    list[str] | list[list[int]],
    Field(min_length=1, max_length=MAX_CHOICES),
    described(
        "Must be a string, a list of strings, a list of token ids, or a list of such lists, "
        f"and not empty, with at most {MAX_CHOICES} prompts."
    ),
    BeforeValidator(
        _as_list_of_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]
    ),
]


class TextPart(StrictModel):
    """One part of a message; only text is served."""

    type: Literal["text"]
    text: str


Content = Annotated[
    str | list[TextPart],
    described("Must be a string or a list of parts with type `text`; only text is served."),
]


class ChatMessage(StrictModel):
    """One message of a conversation."""

    ignored: ClassVar = {"annotations"}
    unsupported: ClassVar = {
        "audio": (),
        "function_call": (),
        "reasoning": (),
        "reasoning_content": (),
        "refusal": (),
        "tool_call_id": (),
        "tool_calls": ([],),
    }

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = None

    def for_template(self) -> dict[str, Any]:
        """As chat templates read it: the content is one text."""
        parts = self.content
        text = parts if isinstance(parts, str) else "\n".join(part.text for part in parts)
        return {"role": self.role, "content": text} | ({"name": self.name} if self.name else {})


class TemplateOptions(StrictModel):
    """How a conversation is put through the chat template."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_kind_of_end(self) -> Self:
        if self.continue_final_message and self.add_generation_prompt:
            raise refusal(
                "continue_final_message",
                "continue_final_message and add_generation_prompt exclude each other.",
            )
        reserved = TEMPLATE_PARAMETERS.intersection(self.chat_template_kwargs or ())
        if reserved:
            names = ", ".join(sorted(reserved))
            raise refusal("chat_template_kwargs", f"chat_template_kwargs may not set {names}.")
        return self


Messages = Annotated[list[ChatMessage], Field(min_length=1)]


class ChatPrompt(TemplateOptions):
    """A conversation that is to become a prompt."""

    messages: Messages


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A checked prompt; `text` and `encoding` are None where the client sent token ids."""

    token_ids: list[int]
    text: str | None = None
    encoding: Encoding | None = None

    def echo(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> tuple[str, list[int]]:
        """The prompt's text, as sent if it was text, and where in it each token begins."""
        if self.text is not None and self.encoding is not None:
            return self.text, [start for start, _ in self.encoding.offsets]
        detokenizer = IncrementalDetokenizer(
            tokenizer.backend, skip_special_tokens=skip_special_tokens
        )
        pieces, offsets = [], []
        for token_id in self.token_ids:
            offsets.append(detokenizer.num_characters)
            pieces.append(detokenizer.push(token_id))
        return "".join([*pieces, detokenizer.flush()]), offsets


async def encode_prompts(
    model: ServedModel, prompts: Sequence[str] | Sequence[list[int]], *, add_special_tokens: bool
) -> list[Prompt]:
    """Tokenize what is text and check every prompt's token ids; raises InvalidRequest."""
    return [
        await encode_text(model, prompt, add_special_tokens=add_special_tokens)
        if isinstance(prompt, str)
        else _checked(model, Prompt(token_ids=prompt))
        for prompt in prompts
    ]


async def encode_chat(
    model: ServedModel, messages: Sequence[ChatMessage], options: TemplateOptions
) -> Prompt:
    """The conversation through the model's chat template; raises InvalidRequest."""
    continues = bool(options.continue_final_message)
    asked = options.add_generation_prompt
    begins = not continues if asked is None else asked
    text = model.tokenizer.render_chat(
        [message.for_template() for message in messages],
        add_generation_prompt=begins,
        continue_final_message=continues,
        **(options.chat_template_kwargs or {}),
    )
    return await encode_text(
        model, text, add_special_tokens=bool(options.add_special_tokens), param="messages"
    )


async def encode_text(
    model: ServedModel, text: str, *, add_special_tokens: bool, param: str = "prompt"
) -> Prompt:
    """Tokenize, a long text in a thread. Raises InvalidRequest."""
    encode = partial(model.tokenizer.encode, text, add_special_tokens=add_special_tokens)
    try:
        is_short = len(text) <= _SHORT_TEXT
        encoding = encode() if is_short else await asyncio.to_thread(encode)
    except TypeError as error:  # what the tokenizer says of a lone surrogate
        raise InvalidRequest(f"{param} is not valid Unicode text.", param=param) from error
    prompt = Prompt(token_ids=encoding.ids, text=text, encoding=encoding)
    return _checked(model, prompt, param)


def _checked(model: ServedModel, prompt: Prompt, param: str = "prompt") -> Prompt:
    check_prompt(prompt.token_ids, model.limits, param=param)
    return prompt
