"""Requests, KV blocks, step planning. No torch, no asyncio, no I/O, no clock of its own."""

from .accuracy import Accuracy
from .budget import BudgetOutcome, BudgetPrediction, LatencyBudget, OnMiss, Priority
from .config import SchedulerConfig
from .cost import StepCost, StepLoad, TokenBudget
from .cost_model import PipeModel, Sample, StageModel
from .errors import (
    BudgetImpossible,
    BudgetRefused,
    BudgetUnmet,
    DuplicateRequest,
    QueueFull,
    RequestTooLong,
    SchedulerError,
    TenantQuotaExceeded,
)
from .outcome import ClassStats
from .outputs import RequestOutput, SchedulerStats
from .policy import POLICIES, EarliestDeadline, Fcfs, Policy
from .request import FinishReason, Request, RequestState
from .scheduler import Scheduler

__all__ = [
    "POLICIES",
    "Accuracy",
    "BudgetImpossible",
    "BudgetOutcome",
    "BudgetPrediction",
    "BudgetRefused",
    "BudgetUnmet",
    "ClassStats",
    "DuplicateRequest",
    "EarliestDeadline",
    "Fcfs",
    "FinishReason",
    "LatencyBudget",
    "OnMiss",
    "PipeModel",
    "Policy",
    "Priority",
    "QueueFull",
    "Request",
    "RequestOutput",
    "RequestState",
    "RequestTooLong",
    "Sample",
    "Scheduler",
    "SchedulerConfig",
    "SchedulerError",
    "SchedulerStats",
    "StageModel",
    "StepCost",
    "StepLoad",
    "TenantQuotaExceeded",
    "TokenBudget",
]
