"""Random prompts of a wanted length, which no prefix cache has seen."""

import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from shardline_client.async_client import AsyncClient
from shardline_client.errors import ClientError
from shardline_client.requests import Prompt

_TEXT = """
river stone window garden letter winter music bread silver mountain paper candle harbour
story engine forest market bridge summer copper island teacher machine ocean village table
horse question memory number colour shadow kitchen answer thunder planet doctor feather
before after while under never always quickly slowly bright heavy green seven old new and
the of to in that with for on by from they this have not are but what all were when
"""
WORDS = _TEXT.split()
_CALIBRATION_WORDS = 64


@dataclass(frozen=True, slots=True)
class TokenPrompts:
    """Token ids, drawn from those of ordinary words: the length is exact."""

    token_ids: Sequence[int]

    def make(self, num_tokens: int, rng: random.Random) -> Prompt:
        """A new prompt."""
        return rng.choices(self.token_ids, k=num_tokens)


@dataclass(frozen=True, slots=True)
class TextPrompts:
    """Words, as many as give about the wanted number of tokens."""

    words_per_token: float

    def make(self, num_tokens: int, rng: random.Random) -> Prompt:
        """A new prompt."""
        return " ".join(rng.choices(WORDS, k=max(1, round(num_tokens * self.words_per_token))))


Prompts = TokenPrompts | TextPrompts


async def make_prompts(client: AsyncClient, *, is_chat: bool) -> Prompts:
    """Token ids where the server has a tokenizer to ask (ours, vLLM), else text."""
    if not is_chat:
        with suppress(ClientError):  # OpenAI's API has no tokenizer
            tokens = await client.tokenize(" ".join(WORDS))
            return TokenPrompts(sorted(set(tokens.token_ids)))
    try:
        return TextPrompts(await _words_per_token(client, is_chat=is_chat))
    except ClientError:
        return TextPrompts(1.0)  # the load will tell what is wrong


async def _words_per_token(client: AsyncClient, *, is_chat: bool) -> float:
    """By the server's own count for two lengths."""
    counts = []
    for num_words in (1, 1 + _CALIBRATION_WORDS):
        text = " ".join((WORDS * 2)[:num_words])
        stream = (
            client.stream_chat([{"role": "user", "content": text}], max_tokens=1)
            if is_chat
            else client.stream_complete(text, max_tokens=1)
        )
        await stream.collect()
        counts.append(stream.usage.prompt_tokens if stream.usage else num_words)
    return _CALIBRATION_WORDS / max(1, counts[1] - counts[0])
