"""Classes of requests: how many of all, how long, and what latency they are judged by."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

PRIORITIES = ("interactive", "standard", "batch")
ON_MISS = ("reject", "degrade")
_EXAMPLE = "interactive:ttft=1500,tpot=100,share=0.7"


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestClass:
    """Requests of one kind; a limit of None is none, a length of None is the run's own.

    `ttft_ms` is for the first token, `tpot_ms` for the mean of each later one, `deadline_ms` for
    the last one, all from the intended moment of sending.
    """

    name: str
    share: float = 1.0
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    deadline_ms: float | None = None
    on_miss: str = "reject"
    prompt_tokens: tuple[int, int] | None = None
    output_tokens: tuple[int, int] | None = None

    @property
    def budget(self) -> dict[str, Any]:
        """As our servers take it in `latency_budget`."""
        limits = {
            "ttft_ms": self.ttft_ms,
            "tpot_ms": self.tpot_ms,
            "deadline_ms": self.deadline_ms,
        }
        asked = {name: limit for name, limit in limits.items() if limit is not None}
        return asked | {"priority": self.name, "on_miss": self.on_miss}


UNLIMITED = RequestClass(name="standard")


def parse_class(text: str) -> RequestClass:
    """Of "interactive:ttft=1500,tpot=100,share=0.7"; raises ValueError that says what is wrong."""
    name, _, rest = text.partition(":")
    if name not in PRIORITIES:
        raise ValueError(f"--budget {text!r}: a class is {_one_of(PRIORITIES)}, as in {_EXAMPLE}.")
    fields: dict[str, Any] = {}
    for pair in filter(None, rest.split(",")):
        key, _, value = pair.partition("=")
        if key not in _FIELDS:
            raise ValueError(f"--budget {text!r}: {key!r} is not {_one_of(tuple(_FIELDS))}.")
        field, read = _FIELDS[key]
        try:
            fields[field] = read(value)
        except ValueError as error:
            raise ValueError(f"--budget {text!r}: {key}={value}: {error}") from None
    return RequestClass(name=name, **fields)


def parse_lengths(text: str) -> tuple[int, int]:
    """Of "256" or "128:512"; raises ValueError."""
    low, _, high = text.partition(":")
    try:
        lengths = int(low), int(high or low)
    except ValueError:
        raise ValueError(
            f"{text!r} is not a number such as 256, nor a range such as 128:512."
        ) from None
    if not 1 <= lengths[0] <= lengths[1]:
        raise ValueError(f"{text!r}: 1 <= LOW <= HIGH must hold.")
    return lengths


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError("it must be a number.") from None
    if not 0 < value < float("inf"):
        raise ValueError("it must be above 0.")
    return value


def _on_miss(text: str) -> str:
    if text not in ON_MISS:
        raise ValueError(f"it must be {_one_of(ON_MISS)}.")
    return text


def _one_of(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


_FIELDS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "ttft": ("ttft_ms", _positive),
    "tpot": ("tpot_ms", _positive),
    "deadline": ("deadline_ms", _positive),
    "share": ("share", _positive),
    "on_miss": ("on_miss", _on_miss),
    "prompt": ("prompt_tokens", parse_lengths),
    "output": ("output_tokens", parse_lengths),
}
