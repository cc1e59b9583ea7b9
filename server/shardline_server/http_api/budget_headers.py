"""`X-Latency-Budget-*`: the latency budget for clients whose SDK can add no field to the body."""

from typing import Annotated, TypeVar

from fastapi import Depends, Header, Request
from pydantic import BaseModel, ConfigDict, Field

from shardline_scheduler.budget import OnMiss, Priority
from shardline_server.budgets import BudgetFields, Milliseconds
from shardline_server.errors import InvalidRequest
from shardline_server.request_fields import SamplingFields

PREFIX = "X-Latency-Budget-"
FieldsT = TypeVar("FieldsT", bound=SamplingFields)


class _Headers(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False)

    ttft_ms: Milliseconds | None = Field(None, alias="X-Latency-Budget-Ttft-Ms")
    tpot_ms: Milliseconds | None = Field(None, alias="X-Latency-Budget-Tpot-Ms")
    deadline_ms: Milliseconds | None = Field(None, alias="X-Latency-Budget-Deadline-Ms")
    priority: Priority | None = Field(None, alias="X-Latency-Budget-Priority")
    on_miss: OnMiss | None = Field(None, alias="X-Latency-Budget-On-Miss")


_NAMES = {name: str(field.alias) for name, field in _Headers.model_fields.items()}


async def _read(request: Request, headers: Annotated[_Headers, Header()]) -> BudgetFields | None:
    # Not for waiting: FastAPI sends what is not async through a thread.
    known = {name.lower() for name in _NAMES.values()}
    for name in request.headers:
        if name.startswith(PREFIX.lower()) and name not in known:
            raise InvalidRequest(f"Unknown header {name}; there is {', '.join(_NAMES.values())}.")
    said = headers.model_dump(exclude_none=True)
    return BudgetFields.model_validate(said) if said else None


HeaderBudget = Annotated[BudgetFields | None, Depends(_read)]


def with_headers(fields: FieldsT, headers: BudgetFields | None) -> FieldsT:
    """The request with what its headers add; raises InvalidRequest where they contradict it."""
    if headers is None:
        return fields
    in_body = (fields.latency_budget or BudgetFields()).model_dump(exclude_none=True)
    in_headers = headers.model_dump(exclude_none=True)
    for name in in_body.keys() & in_headers.keys():
        if in_body[name] != in_headers[name]:
            raise InvalidRequest(
                f"latency_budget.{name} is {in_body[name]} and the header {_NAMES[name]} says "
                f"{in_headers[name]}; send one of them.",
                param=f"latency_budget.{name}",
            )
    both = BudgetFields.model_validate(in_body | in_headers)
    return fields.model_copy(update={"latency_budget": both})
