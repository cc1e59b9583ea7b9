"""From token ids to text, piece by piece: detokenizing and stop strings. No I/O, no engine."""

from collections.abc import Sequence

from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import DecodeStream

REPLACEMENT = "\ufffd"

# A character has at most four bytes, so this many tokens without text cannot be one unfinished
# character; they are let go, or a run of invalid bytes would be decoded again and again.
MAX_PENDING_TOKENS = 16

# Enough tokens of the prompt that a decoder does not take the first output token for a sentence's
# beginning and drop its leading space.
NUM_CONTEXT_TOKENS = 6


class IncrementalDetokenizer:
    """Turns output tokens into text as they come, never a part of a multi-byte character.

    The pieces joined are the text of all tokens, as if decoded after the prompt. `num_characters`
    counts the text given out so far.
    """

    def __init__(
        self,
        tokenizer: FastTokenizer,
        prompt_token_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._context: list[int]
        self._stream: DecodeStream
        self._pending: list[int] = []
        self._restart(list(prompt_token_ids[-NUM_CONTEXT_TOKENS:]))
        self.num_characters = 0

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that is now complete, often one token's, maybe none."""
        self._pending.append(token_id)
        text = self._stream.step(self._tokenizer, token_id)
        if text:
            self._context, self._pending = self._pending, []
        elif len(self._pending) >= MAX_PENDING_TOKENS:
            return self.flush()
        self.num_characters += len(text or "")
        return text or ""

    def flush(self) -> str:
        """Text of the tokens that are left: an unfinished character comes out as U+FFFD."""
        if not self._pending:
            return ""
        before = self._decode(self._context)
        text = self._decode(self._context + self._pending)[len(before) :]
        self._restart(self._pending)
        self._pending = []
        self.num_characters += len(text)
        return text

    def _restart(self, context: list[int]) -> None:
        if self._decode(context).endswith(REPLACEMENT):
            context = []  # ends inside a character: the stream would give it out as its own text
        self._context = context
        self._stream = DecodeStream(context, self._skip_special_tokens)

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens)


class StopMatcher:
    """Finds stop strings in a text that comes in pieces, also across the borders of pieces.

    Reading character by character, the first stop string that is complete ends the text (the
    longest, if several are complete at once). Text is held back only as far as it could still be
    the beginning of a stop string. `matched` is the stop string that was found, or None.
    """

    def __init__(self, stops: Sequence[str], *, include_in_output: bool = False) -> None:
        self._stops = stops
        self._include_in_output = include_in_output
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Add a piece; returns the text that is safe to send."""
        if not self._stops:
            return text
        text = self._held + text
        found = [(text.find(stop) + len(stop), stop) for stop in self._stops if stop in text]
        if found:
            end, self.matched = min(found, key=lambda match: (match[0], -len(match[1])))
            self._held = ""
            return text[: end if self._include_in_output else end - len(self.matched)]
        num_held = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
