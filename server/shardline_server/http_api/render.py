"""From Pieces to OpenAI's JSON: one renderer for completions, one for chat."""

import time
from collections.abc import Iterator, Sequence

from shardline_server.budgets import outcome_fields
from shardline_server.choice import Piece, TextLogprob
from shardline_server.generation import Generation
from shardline_server.http_api.requests import ChatCompletionRequest, CompletionRequest
from shardline_server.http_api.responses import (
    AssistantMessage,
    BudgetOutcomeBody,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
    ChatTokenLogprob,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    PromptTokensDetails,
    TopLogprob,
    UsageBody,
)
from shardline_server.tokenizer import Tokenizer


class CompletionRenderer:
    """/v1/completions."""

    def __init__(
        self, request: CompletionRequest, generation: Generation, tokenizer: Tokenizer, model: str
    ) -> None:
        self.includes_usage = request.includes_usage
        self._returns_token_ids = bool(request.return_token_ids)
        self._generation = generation
        self._tokenizer = tokenizer
        self._model = model
        self._created = int(time.time())

    def whole(self, choices: list[Piece]) -> Completion:
        """The answer that is not streamed."""
        body = self._body([self._choice(piece) for piece in choices])
        body.usage = usage_body(self._generation)
        body.latency_budget = outcome_body(self._generation)
        return body

    def chunks(self, piece: Piece) -> Iterator[Completion]:
        """One chunk, unless there is nothing to show yet."""
        if is_visible(piece) or self._returns_token_ids:
            chunk = self._body([self._choice(piece)])
            if not self.includes_usage:  # nothing else follows that could say it
                chunk.latency_budget = outcome_body(self._generation)
            yield chunk

    def usage_chunk(self) -> Completion:
        """No choices, only the usage."""
        return self.whole([])

    def _body(self, choices: list[CompletionChoice]) -> Completion:
        return Completion(
            id=self._generation.request_id,
            created=self._created,
            model=self._model,
            choices=choices,
        )

    def _choice(self, piece: Piece) -> CompletionChoice:
        with_ids = self._returns_token_ids
        prompt = self._generation.choices[piece.choice].prompt
        return CompletionChoice(
            index=piece.choice,
            text=piece.text,
            logprobs=self._logprobs(piece.logprobs) if piece.logprobs else None,
            finish_reason=piece.finish_reason,
            stop_reason=piece.stop_reason,
            token_ids=piece.token_ids if with_ids else None,
            prompt_token_ids=prompt.token_ids if with_ids and piece.index == 0 else None,
        )

    def _logprobs(self, logprobs: Sequence[TextLogprob]) -> CompletionLogprobs:
        text_of = self._tokenizer.token_text
        return CompletionLogprobs(
            tokens=[text_of(one.token_id) for one in logprobs],
            token_logprobs=[one.logprob for one in logprobs],
            top_logprobs=[self._top(one) for one in logprobs],
            text_offset=[one.offset for one in logprobs],
        )

    def _top(self, one: TextLogprob) -> dict[str, float] | None:
        """The likeliest tokens, and the chosen one in any case."""
        if one.logprob is None:
            return None
        candidates = [*one.top, (one.token_id, one.logprob)]
        text_of = self._tokenizer.token_text
        return {text_of(token_id): logprob for token_id, logprob in candidates}


class ChatRenderer:
    """/v1/chat/completions."""

    def __init__(
        self,
        request: ChatCompletionRequest,
        generation: Generation,
        tokenizer: Tokenizer,
        model: str,
    ) -> None:
        self.includes_usage = request.includes_usage
        self._returns_token_ids = bool(request.return_token_ids)
        self._generation = generation
        self._tokenizer = tokenizer
        self._model = model
        self._created = int(time.time())
        self._begun: set[int] = set()

    def whole(self, choices: list[Piece]) -> ChatCompletion:
        """The answer that is not streamed."""
        prompt = self._generation.choices[0].prompt
        return ChatCompletion(
            id=self._generation.request_id,
            created=self._created,
            model=self._model,
            choices=[self._choice(piece) for piece in choices],
            usage=usage_body(self._generation),
            latency_budget=outcome_body(self._generation),
            prompt_token_ids=prompt.token_ids if self._returns_token_ids else None,
        )

    def chunks(self, piece: Piece) -> Iterator[ChatCompletionChunk]:
        """A choice's first chunk carries the role; then a chunk wherever there is something new."""
        if piece.choice not in self._begun:
            self._begun.add(piece.choice)
            role = ChatDelta(role="assistant", content="")
            first = ChatChunkChoice(
                index=piece.choice, delta=role, logprobs=None, finish_reason=None
            )
            yield self._chunk([first])
        if is_visible(piece) or self._returns_token_ids:
            chunk = self._chunk([self._chunk_choice(piece)])
            if not self.includes_usage:  # nothing else follows that could say it
                chunk.latency_budget = outcome_body(self._generation)
            yield chunk

    def usage_chunk(self) -> ChatCompletionChunk:
        """No choices, only the usage."""
        chunk = self._chunk([])
        chunk.usage = usage_body(self._generation)
        chunk.latency_budget = outcome_body(self._generation)
        return chunk

    def _chunk(self, choices: list[ChatChunkChoice]) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            id=self._generation.request_id,
            created=self._created,
            model=self._model,
            choices=choices,
        )

    def _choice(self, piece: Piece) -> ChatChoice:
        return ChatChoice(
            index=piece.choice,
            message=AssistantMessage(content=piece.text),
            logprobs=self._logprobs(piece.logprobs),
            finish_reason=piece.finish_reason,
            stop_reason=piece.stop_reason,
            token_ids=piece.token_ids if self._returns_token_ids else None,
        )

    def _chunk_choice(self, piece: Piece) -> ChatChunkChoice:
        return ChatChunkChoice(
            index=piece.choice,
            delta=ChatDelta(content=piece.text or None),
            logprobs=self._logprobs(piece.logprobs),
            finish_reason=piece.finish_reason,
            stop_reason=piece.stop_reason,
            token_ids=piece.token_ids if self._returns_token_ids else None,
        )

    def _logprobs(self, logprobs: Sequence[TextLogprob]) -> ChatLogprobs | None:
        if not logprobs:
            return None
        return ChatLogprobs(
            content=[
                ChatTokenLogprob(
                    **self._token(one.token_id, one.logprob).model_dump(),
                    top_logprobs=[self._token(*candidate) for candidate in one.top],
                )
                for one in logprobs
            ]
        )

    def _token(self, token_id: int, logprob: float | None) -> TopLogprob:
        assert logprob is not None  # only a prompt's first token has none
        return TopLogprob(
            token=self._tokenizer.token_text(token_id),
            logprob=logprob,
            bytes=list(self._tokenizer.token_bytes(token_id)),
        )


def is_visible(piece: Piece) -> bool:
    """Whether a client would see anything new."""
    return bool(piece.text or piece.logprobs or piece.finish_reason)


def outcome_body(generation: Generation) -> BudgetOutcomeBody | None:
    """How its budget was kept; None until it has ended."""
    outcome = generation.outcome
    return None if outcome is None else BudgetOutcomeBody.model_validate(outcome_fields(outcome))


def usage_body(generation: Generation) -> UsageBody:
    """The usage as of now."""
    usage = generation.usage
    return UsageBody(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=usage.cached_tokens),
    )
