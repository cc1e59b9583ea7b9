"""One choice of a request: the engine's tokens in, text out, until something ends it."""

import logging
from collections.abc import Sequence

import msgspec

from shardline_scheduler.plan import SamplingParams, TokenLogprobs
from shardline_server.errors import RequestFailed
from shardline_server.messages import Delta, FinishReason
from shardline_server.prompts import Prompt
from shardline_server.request_fields import SamplingFields
from shardline_server.text import IncrementalDetokenizer, StopMatcher
from shardline_server.tokenizer import Tokenizer

logger = logging.getLogger("shardline.frontend")

LEAST_LOGPROB = -9999.0  # what OpenAI and vLLM write for minus infinity, which JSON lacks


class TextLogprob(msgspec.Struct, frozen=True):
    """A token's logprobs and where it begins in the choice's text, in characters.

    `logprob` is None for a prompt's first token, which nothing precedes. All are finite.
    """

    token_id: int
    offset: int
    logprob: float | None
    top: list[tuple[int, float]]


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """A streamed piece of one choice. `token_ids` are its output tokens `index`, `index + 1`, …

    `text` may be empty while a character or a possible stop string is unfinished. With `echo` the
    first piece also brings the prompt's text and logprobs. The last piece has a `finish_reason`;
    `stop_reason` is the stop string, or the stop token that the client named.
    """

    choice: int
    index: int
    token_ids: list[int]
    text: str
    logprobs: list[TextLogprob]
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


def joined(pieces: Sequence[Piece]) -> Piece:
    """All pieces of one choice as one."""
    return Piece(
        choice=pieces[0].choice,
        index=pieces[0].index,
        token_ids=[token_id for piece in pieces for token_id in piece.token_ids],
        text="".join(piece.text for piece in pieces),
        logprobs=[logprob for piece in pieces for logprob in piece.logprobs],
        finish_reason=pieces[-1].finish_reason,
        stop_reason=pieces[-1].stop_reason,
    )


class Choice:
    """The state of one choice between Deltas; also what its usage is counted from."""

    def __init__(
        self,
        index: int,
        prompt: Prompt,
        params: SamplingParams,
        fields: SamplingFields,
        tokenizer: Tokenizer,
    ) -> None:
        self.index = index
        self.prompt = prompt
        self.params = params
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self._fields = fields
        self._tokenizer = tokenizer
        self._skips_special = fields.skip_special_tokens is not False
        self._detokenizer = IncrementalDetokenizer(
            tokenizer.backend, prompt.token_ids, skip_special_tokens=self._skips_special
        )
        self._stops = StopMatcher(
            fields.stop or [], include_in_output=bool(fields.include_stop_str_in_output)
        )
        self._echo_is_due = fields.echoes_prompt
        self._echo_length = 0
        self._prompt_logprobs: list[TokenLogprobs] = []

    def advance(self, delta: Delta) -> Piece:
        """Take one Delta; tokens after a stop string are dropped.

        Raises RequestFailed where tokens are missing, or come again: nothing says that what comes
        again is the same, so it is no more dropped than a gap is bridged.
        """
        self._require_next(delta)
        self.num_cached_tokens = delta.num_cached_tokens
        self._prompt_logprobs += delta.prompt_logprobs
        index = self.num_tokens
        text, logprobs = self._echo(delta)
        taken = 0
        for token_id in delta.token_ids:
            if delta.logprobs:
                logprobs.append(self._with_offset(delta.logprobs[taken]))
            taken += 1
            is_last = taken == len(delta.token_ids)
            text += self._text_of(token_id, delta.finish_reason if is_last else None)
            if self._stops.matched is not None:
                break
        finish_reason = delta.finish_reason if self._stops.matched is None else FinishReason.STOP
        if finish_reason is not None:
            text += self._rest()
        return Piece(
            choice=self.index,
            index=index,
            token_ids=list(delta.token_ids[:taken]),
            text=text,
            logprobs=logprobs,
            finish_reason=finish_reason,
            stop_reason=self._stop_reason(delta),
        )

    def _require_next(self, delta: Delta) -> None:
        if delta.index == self.num_tokens:
            return
        what = "Tokens are missing" if delta.index > self.num_tokens else "Tokens came again"
        message = (
            f"{what} inside the server: output token {delta.index} came where {self.num_tokens} "
            "was due. The request was ended; send it again."
        )
        logger.error("%s (request %s)", message, delta.request_id)
        raise RequestFailed(message)

    def _text_of(self, token_id: int, finish_reason: FinishReason | None) -> str:
        self.num_tokens += 1
        is_stop_token = (
            finish_reason is FinishReason.STOP and token_id in self.params.stop_token_ids
        )
        if is_stop_token and not self._fields.include_stop_str_in_output:
            return ""
        text = self._detokenizer.push(token_id)
        # Before `min_tokens` a stop string is text like any other.
        return text if self.num_tokens < self.params.min_tokens else self._stops.push(text)

    def _rest(self) -> str:
        if self._stops.matched is not None:
            return ""
        return self._stops.push(self._detokenizer.flush()) + self._stops.flush()

    def _stop_reason(self, delta: Delta) -> str | int | None:
        if self._stops.matched is not None or delta.finish_reason is not FinishReason.STOP:
            return self._stops.matched
        last = delta.token_ids[-1] if delta.token_ids else None
        return last if last in (self._fields.stop_token_ids or ()) else None

    def _with_offset(self, logprobs: TokenLogprobs) -> TextLogprob:
        return _text_logprob(logprobs, self._echo_length + self._detokenizer.num_characters)

    def _echo(self, delta: Delta) -> tuple[str, list[TextLogprob]]:
        """The prompt's text and logprobs, once the first output (or the end) is here."""
        if not self._echo_is_due or not (delta.token_ids or delta.finish_reason):
            return "", []
        self._echo_is_due = False
        text, offsets = self.prompt.echo(self._tokenizer, skip_special_tokens=self._skips_special)
        self._echo_length = len(text)
        if not self._prompt_logprobs:
            return text, []
        first = TextLogprob(self.prompt.token_ids[0], offsets[0], None, [])
        rest = [
            _text_logprob(logprobs, offset)
            for logprobs, offset in zip(self._prompt_logprobs, offsets[1:], strict=True)
        ]
        return text, [first, *rest]


def _text_logprob(logprobs: TokenLogprobs, offset: int) -> TextLogprob:
    top = [(token_id, max(logprob, LEAST_LOGPROB)) for token_id, logprob in logprobs.top]
    return TextLogprob(logprobs.token_id, offset, max(logprobs.logprob, LEAST_LOGPROB), top)
