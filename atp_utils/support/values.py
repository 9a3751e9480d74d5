"""Kinds of values that parameters have, as pydantic checks them."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


class Parameters(BaseModel):
    """Parameters of a notebook: a field's annotation is its type, its description the help that users read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def option(default: Any, text: str) -> Any:
    """A field with its default and its help."""
    return Field(default=default, description=text, validate_default=True)


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is expected, not true or false")
    # What Python or a quoting hand wrote: '1e-5'.
    return float(value) if isinstance(value, str) else value


def _distinct(values: list) -> list:
    seen: set[str] = set()
    for value in values:
        if repr(value) in seen:
            raise ValueError(f"{value!r} stands twice")
        seen.add(repr(value))
    return values


Natural = Annotated[int, Field(ge=0, strict=True)]
Positive = Annotated[int, Field(ge=1, strict=True)]
Even = Annotated[int, Field(ge=2, multiple_of=2, strict=True)]
Real = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Rate = Annotated[Real, Field(gt=0)]
NotNegative = Annotated[Real, Field(ge=0)]
Share = Annotated[Real, Field(ge=0, le=1)]
Flag = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(min_length=1)]
Distinct = AfterValidator(_distinct)
Arm = Literal["base", "dpo", "grpo"]
Temperature = Annotated[Real, Field(ge=0, le=10)]
Precision = Literal["auto", "float32", "bfloat16"]
