"""What all configs share: frozen pydantic models that refuse unknown fields, and the types of their fields."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from moe.checks import plain_number

if TYPE_CHECKING:
    from typing_extensions import Self


class FrozenConfig(BaseModel):
    """Immutable, hashable, JSON round trip."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)
    # Slots, which neither copies nor pickles take along: strings hash anew in each process.
    __slots__ = ("_kept_hash", "_kept_identity")

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """The config with some fields changed, validated as a new one is. pydantic's own would keep what it computed before."""
        return type(self)(**{name: getattr(self, name) for name in type(self).model_fields} | dict(update or {}))

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """Enums by their names, so that what is printed evaluates to the config."""
        for name, value in super().__repr_args__():
            yield name, _Written(f"{type(value).__name__}.{value.name}") if isinstance(value, Enum) else value

    def __hash__(self) -> int:
        """Computed once: configs are keys of what is kept for a launch."""
        try:
            return self._kept_hash  # type: ignore[attr-defined]  # a slot
        except AttributeError:
            value = hash(_type_and_values(self))
            object.__setattr__(self, "_kept_hash", value)
            return value

    def __eq__(self, other: object) -> bool:
        """Same type, same values. Compared field by field once: each layer of a model looks up kernels by its own config."""
        if self is other:
            return True
        if type(self) is not type(other):
            return NotImplemented
        return _identity_of(self) is _identity_of(other)


class _Written:
    """Something whose repr is this text."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


# The first of all that are equal. Never freed, as the caches of kernels are not.
_identities: dict[tuple[Any, ...], tuple[Any, ...]] = {}


def _identity_of(config: Any) -> tuple[Any, ...]:
    """One object for all configs that are equal."""
    try:
        return object.__getattribute__(config, "_kept_identity")
    except AttributeError:
        values = _type_and_values(config)
        identity = _identities.setdefault(values, values)
        object.__setattr__(config, "_kept_identity", identity)
        return identity


def _type_and_values(config: Any) -> tuple[Any, ...]:
    return (type(config), *(getattr(config, name) for name in type(config).model_fields))


Names = Mapping[tuple[str, str], tuple[str, str]]  # (stage, field) -> the name that a caller knows, words to lead with


def plain_error(error: ValidationError, names: Names) -> ValueError:
    """What pydantic found in a config of several stages: a line by the caller's names, with what came."""
    found = []
    for detail in error.errors():
        stage, *fields = [str(part) for part in detail["loc"]] or [""]  # no place: stages that disagree
        name, words = names.get((stage, fields[-1]), (fields[-1], "")) if fields else ("", "")
        message = detail["msg"].removeprefix("Value error, ")
        if detail["type"] == "value_error":  # ours, which says what came
            found.append(f"{name}: {message}" if name and name not in message else message)
        else:
            found.append(f"{words}{name or stage}: {message[0].lower()}{message[1:]}, got {detail['input']!r}")
    return ValueError("; ".join(dict.fromkeys(found)))


def _power_of_two(value: int) -> int:
    if value & (value - 1):
        raise ValueError(f"expected a power of two, got {value}; the next one is {1 << value.bit_length()}")
    return value


# Strict: neither "8" nor True is a number. numpy's numbers and tensors without an axis, as engines pass them, are.
Count = Annotated[int, Field(ge=1, strict=True), BeforeValidator(plain_number)]
CountOrZero = Annotated[int, Field(ge=0, strict=True), BeforeValidator(plain_number)]
Factor = Annotated[float, Field(allow_inf_nan=False, strict=True), BeforeValidator(plain_number)]
# What kernels read as float32: larger ones would be infinite there.
LARGEST_FLOAT32 = (2 - 2**-23) * 2.0**127
Float32 = Annotated[Factor, Field(ge=-LARGEST_FLOAT32, le=LARGEST_FLOAT32)]
PowerOfTwo = Annotated[int, Field(ge=1, strict=True), BeforeValidator(plain_number), AfterValidator(_power_of_two)]
