"""Requests, KV blocks, step planning. No torch, no asyncio, no I/O, no clock of its own."""

from .budget import BudgetOutcome, BudgetPrediction, LatencyBudget, OnMiss, Priority
from .config import SchedulerConfig
from .cost import StepCost, StepLoad, TokenBudget
from .errors import DuplicateRequest, QueueFull, RequestTooLong, SchedulerError
from .outputs import RequestOutput, SchedulerStats
from .policy import POLICIES, Fcfs, Policy
from .request import FinishReason, Request, RequestState
from .scheduler import Scheduler

__all__ = [
    "POLICIES",
    "BudgetOutcome",
    "BudgetPrediction",
    "DuplicateRequest",
    "Fcfs",
    "FinishReason",
    "LatencyBudget",
    "OnMiss",
    "Policy",
    "Priority",
    "QueueFull",
    "Request",
    "RequestOutput",
    "RequestState",
    "RequestTooLong",
    "Scheduler",
    "SchedulerConfig",
    "SchedulerError",
    "SchedulerStats",
    "StepCost",
    "StepLoad",
    "TokenBudget",
]
