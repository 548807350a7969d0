"""What all configs share: frozen pydantic models that refuse unknown fields, and the types of their fields."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


class FrozenConfig(BaseModel):
    """Immutable, hashable, JSON round trip. Build variants through the constructor: `model_copy` skips validators."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


def _power_of_two(value: int) -> int:
    if value & (value - 1):
        raise ValueError(f"expected a power of two, got {value}; the next one is {1 << value.bit_length()}")
    return value


Count = Annotated[int, Field(ge=1, strict=True)]  # strict: neither "8" nor True is a count
PowerOfTwo = Annotated[int, Field(ge=1, strict=True), AfterValidator(_power_of_two)]
