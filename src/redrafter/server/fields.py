"""What the parts of requests have in common: strict models, and types of values."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WrapValidator


class Strict(BaseModel):
    """Base of all parts of a request: no unknown fields, no conversion between types."""

    model_config = ConfigDict(extra="forbid", strict=True)


def described(rule: str) -> WrapValidator:
    """One error for a value that fits no member of a union, instead of one for each member."""

    def check(value: Any, validate: Any) -> Any:
        try:
            return validate(value)
        except ValidationError:
            raise ValueError(rule) from None

    return WrapValidator(check)


Token = Annotated[int, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
PositiveProbability = Annotated[float, Field(gt=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
NewTokens = Annotated[int, Field(ge=1)]
StopString = Annotated[str, Field(min_length=1)]
Stop = Annotated[
    StopString | Annotated[list[StopString], Field(max_length=4)],
    described("must be a string or up to 4 strings, none of them empty"),
]
TokenText = Annotated[str, Field(pattern="^[0-9]+$")]
"""A token id as a key of a JSON object."""
