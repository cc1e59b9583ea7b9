"""Latency budgets as requests and operators write them, and the one place where they become one."""

import json
from dataclasses import dataclass, field
from typing import Annotated, Any

from msgspec.structs import asdict
from pydantic import BaseModel, ConfigDict, Field

from shardline_scheduler.budget import (
    BudgetOutcome,
    BudgetPrediction,
    LatencyBudget,
    OnMiss,
    Priority,
)
from shardline_server.strict_model import StrictModel

Milliseconds = Annotated[float, Field(gt=0, le=86_400_000)]
# Strict models take no text for an enum's member otherwise.
PriorityName = Annotated[Priority, Field(strict=False)]
OnMissName = Annotated[OnMiss, Field(strict=False)]


class BudgetFields(StrictModel):
    """What a request says about its time; None means "not said"."""

    ttft_ms: Milliseconds | None = Field(default=None, description="arrival to first token")
    tpot_ms: Milliseconds | None = Field(default=None, description="mean time of each later token")
    deadline_ms: Milliseconds | None = Field(default=None, description="arrival to last token")
    priority: PriorityName | None = Field(
        default=None, description="the class that fills in what is not said [default: the server's]"
    )
    on_miss: OnMissName | None = Field(
        default=None,
        description="reject: refused, or ended, when it cannot be kept; degrade: served late",
    )


class BudgetClass(BaseModel):
    """What requests of one priority get where they say nothing themselves."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    ttft_ms: Milliseconds | None = None
    tpot_ms: Milliseconds | None = None
    deadline_ms: Milliseconds | None = None
    on_miss: OnMiss = OnMiss.REJECT


class BudgetClasses(BaseModel):
    """The named classes, one for each priority; naming one replaces all its limits."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    interactive: BudgetClass = BudgetClass(ttft_ms=2000, tpot_ms=250)
    standard: BudgetClass = BudgetClass()
    batch: BudgetClass = BudgetClass(on_miss=OnMiss.DEGRADE)

    def __str__(self) -> str:
        return json.dumps({name: one.model_dump(exclude_unset=True) for name, one in self})

    def of(self, priority: Priority) -> BudgetClass:
        """The class of a priority."""
        named: BudgetClass = getattr(self, priority.value)
        return named


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetPolicy:
    """The classes, and the one for requests that name none."""

    classes: BudgetClasses = field(default_factory=BudgetClasses)
    default: Priority = Priority.STANDARD

    def budget_of(
        self, asked: BudgetFields | None, *, call_deadline_ms: float | None = None
    ) -> LatencyBudget:
        """What holds for a request; `call_deadline_ms` is what the transport leaves it."""
        said = {} if asked is None else asked.model_dump(exclude_none=True)
        priority = said.get("priority", self.default)
        limits = self.classes.of(priority).model_dump() | said | {"priority": priority}
        deadlines = [ms for ms in (limits["deadline_ms"], call_deadline_ms) if ms is not None]
        return LatencyBudget(**limits | {"deadline_ms": min(deadlines, default=None)})


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetTimes:
    """What a budget limits, as it was."""

    ttft_ms: float | None
    tpot_ms: float | None
    e2e_ms: float


def outcome_of(budget: LatencyBudget, times: BudgetTimes) -> BudgetOutcome:
    """For a choice that the front end ended, of which the engine says nothing more."""
    pairs = (
        (budget.ttft_ms, times.ttft_ms),
        (budget.tpot_ms, times.tpot_ms),
        (budget.deadline_ms, times.e2e_ms),
    )
    return BudgetOutcome(
        met=all(limit is None or took is None or took <= limit for limit, took in pairs),
        ttft_ms=times.ttft_ms,
        tpot_ms=times.tpot_ms,
        e2e_ms=times.e2e_ms,
        predicted=BudgetPrediction(),
    )


def worst_outcome(outcomes: list[BudgetOutcome]) -> BudgetOutcome:
    """Of a request's choices: met if all are, and every time the longest."""
    return BudgetOutcome(
        met=all(one.met for one in outcomes),
        ttft_ms=_longest([one.ttft_ms for one in outcomes]),
        tpot_ms=_longest([one.tpot_ms for one in outcomes]),
        e2e_ms=max(one.e2e_ms for one in outcomes),
        predicted=BudgetPrediction(
            ttft_ms=_longest([one.predicted.ttft_ms for one in outcomes]),
            tpot_ms=_longest([one.predicted.tpot_ms for one in outcomes]),
            e2e_ms=_longest([one.predicted.e2e_ms for one in outcomes]),
        ),
    )


def outcome_fields(outcome: BudgetOutcome) -> dict[str, bool | float | None]:
    """Flat, as both doors tell it."""
    predicted = outcome.predicted
    return {
        "met": outcome.met,
        "ttft_ms": outcome.ttft_ms,
        "tpot_ms": outcome.tpot_ms,
        "e2e_ms": outcome.e2e_ms,
        "predicted_ttft_ms": predicted.ttft_ms,
        "predicted_tpot_ms": predicted.tpot_ms,
        "predicted_e2e_ms": predicted.e2e_ms,
    }


def said_fields(said: LatencyBudget | BudgetPrediction) -> dict[str, Any]:
    """What a struct says, by name, with its defaults and without what is None."""
    return {name: value for name, value in asdict(said).items() if value is not None}


def _longest(times: list[float | None]) -> float | None:
    return max((one for one in times if one is not None), default=None)
