"""What every model of a client's words is made of: nothing unknown, nothing converted."""

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

HINTS = {"best_of": "; use n and choose by logprobs"}


class StrictModel(BaseModel):
    """Unknown fields, wrong types, NaN and infinities are errors.

    `ignored` names fields that may hold anything; `unsupported` names those that may hold nothing
    but None or the listed values, which mean that the field is not used.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    ignored: ClassVar[set[str]] = set()
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_what_has_no_effect(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            if name in cls.model_fields:
                kept[name] = value
            elif name in cls.unsupported:
                _require_neutral(name, value, cls.unsupported[name])
            elif name not in cls.ignored:
                kept[name] = value
        return kept


def _require_neutral(name: str, value: Any, neutral: tuple[Any, ...]) -> None:
    if value is None or any(type(value) is type(same) and value == same for same in neutral):
        return
    raise refusal(name, f"This server does not support `{name}`{HINTS.get(name, '')}.")


def refusal(param: str, message: str) -> PydanticCustomError:
    """What a validator raises when fields are well-formed but cannot be served."""
    return PydanticCustomError("refused", "{message}", {"message": message, "param": param})
