"""When requests arrive: drawn, or as a trace recorded them. Times are seconds from the start."""

import csv
import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class TracedRequest:
    """One line of a trace."""

    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in the order of their arrival, the first at 0."""

    requests: tuple[TracedRequest, ...]

    @property
    def rate(self) -> float:
        """Mean arrivals per second; 0 where there is no time between them."""
        span_s = self.requests[-1].arrival_s
        return (len(self.requests) - 1) / span_s if span_s else 0.0

    def first(self, num_requests: int) -> "Trace":
        """Its beginning."""
        return Trace(self.requests[:num_requests])

    def scaled(self, *, time: float, length: float) -> "Trace":
        """With times and lengths multiplied; a length stays at least 1."""
        return Trace(
            tuple(
                TracedRequest(
                    arrival_s=one.arrival_s * time,
                    num_prompt_tokens=max(1, round(one.num_prompt_tokens * length)),
                    num_output_tokens=max(1, round(one.num_output_tokens * length)),
                )
                for one in self.requests
            )
        )


def read_trace(path: Path) -> Trace:
    """A CSV as Azure publishes its LLM inference traces; raises ValueError, OSError.

    https://github.com/Azure/AzurePublicDataset: AzureLLMInferenceDataset2023 and 2024.
    """
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        missing = [name for name in COLUMNS if name not in (rows.fieldnames or ())]
        if missing:
            raise ValueError(f"{path} has no column {', '.join(missing)}: not an Azure trace.")
        moments = sorted(_moment(path, rows.line_num, row) for row in rows)
    if not moments:
        raise ValueError(f"{path} holds no requests.")
    start = moments[0][0]
    return Trace(
        tuple(
            TracedRequest(
                arrival_s=(moment - start).total_seconds(),
                num_prompt_tokens=num_prompt,
                num_output_tokens=num_output,
            )
            for moment, num_prompt, num_output in moments
        )
    )


def _moment(path: Path, line: int, row: dict[str, str]) -> tuple[datetime, int, int]:
    try:
        moment, num_prompt, num_output = (row[name] for name in COLUMNS)
        return datetime.fromisoformat(moment), int(num_prompt), int(num_output)
    except (ValueError, TypeError):
        raise ValueError(f"{path}, line {line}: {row} is not a time and two counts.") from None


def drawn_arrivals(rate: float, cv: float, rng: random.Random) -> Iterator[float]:
    """Gamma distributed gaps of mean 1/rate and coefficient of variation `cv`; the first is at 0.

    The shape is 1/cv² (what others call burstiness); 1 is a Poisson process.
    """
    shape = 1 / cv**2
    arrival_s = 0.0
    while True:
        yield arrival_s
        arrival_s += rng.gammavariate(shape, 1 / (shape * rate))
