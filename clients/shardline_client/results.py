"""What comes back, the same over both doors."""

from collections.abc import Mapping
from dataclasses import dataclass, field

StopReason = str | int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetOutcome:
    """How a request kept its latency budget; of several choices the worst. In milliseconds.

    `met` is true where nothing was asked for. `tpot_ms` is None below two output tokens, a
    prediction where there was none.
    """

    met: bool
    ttft_ms: float | None
    tpot_ms: float | None
    e2e_ms: float
    predicted_ttft_ms: float | None
    predicted_tpot_ms: float | None
    predicted_e2e_ms: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What a request took, in tokens; each prompt counts once, whatever `n` is."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprob:
    """One token; `logprob` is None for a prompt's first token, which nothing precedes.

    `top` maps the likeliest tokens' texts to their logprobs, best first.
    """

    text: str
    logprob: float | None
    top: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A piece of one choice.

    `token_ids` are the choice's output tokens index, index + 1, …; a server that does not tell
    them leaves them empty. `finish_reason` is set in a choice's last piece, and only there: "stop",
    "length", "deadline", or "abort". `stop_reason` is the stop string or id that ended it.
    """

    choice: int = 0
    index: int = 0
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    stop_reason: StopReason = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One whole answer."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: str | None
    stop_reason: StopReason


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """All answers to one request; `usage` is None where the server never told (an abort), and
    `latency_budget` likewise.
    """

    request_id: str
    choices: tuple[Choice, ...]
    usage: Usage | None
    latency_budget: BudgetOutcome | None

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.choices[0].text

    @property
    def finish_reason(self) -> str | None:
        """Why the first choice ended."""
        return self.choices[0].finish_reason


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """The token ids of a text or a conversation."""

    token_ids: tuple[int, ...]
    max_model_len: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A name that the server answers to; `max_model_len` is None where it does not tell."""

    name: str
    owned_by: str
    max_model_len: int | None = None


@dataclass(slots=True)
class Collector:
    """Puts the pieces of a request together again."""

    num_choices: int
    usage: Usage | None = None
    latency_budget: BudgetOutcome | None = None
    _pieces: list[list[Piece]] = field(init=False)

    def __post_init__(self) -> None:
        self._pieces = [[] for _ in range(self.num_choices)]

    def add(self, part: Piece | Usage | BudgetOutcome) -> None:
        """Pieces of one choice come in order."""
        match part:
            case Piece():
                self._pieces[part.choice].append(part)
            case Usage():
                self.usage = part
            case BudgetOutcome():
                self.latency_budget = part

    def abort(self) -> list[Piece]:
        """Add a last piece to each choice that has not ended; these pieces."""
        added = []
        for choice, pieces in enumerate(self._pieces):
            if not pieces or pieces[-1].finish_reason is None:
                index = sum(len(piece.token_ids) for piece in pieces)
                added.append(Piece(choice=choice, index=index, finish_reason="abort"))
                pieces.append(added[-1])
        return added

    def completion(self, request_id: str) -> Completion:
        """Everything that has come so far."""
        choices = tuple(_joined(pieces) for pieces in self._pieces)
        return Completion(
            request_id=request_id,
            choices=choices,
            usage=self.usage,
            latency_budget=self.latency_budget,
        )


def _joined(pieces: list[Piece]) -> Choice:
    last = pieces[-1] if pieces else Piece()
    return Choice(
        text="".join(piece.text for piece in pieces),
        token_ids=tuple(token_id for piece in pieces for token_id in piece.token_ids),
        logprobs=tuple(one for piece in pieces for one in piece.logprobs),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
    )
