"""What is read back from storage, where anybody may have written it: checked against its dataclass at the door."""

from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")


def read_back(kind: type[T], data: bytes) -> T:
    """An object of a dataclass from its JSON.

    Raises:
        ValueError: it is not JSON, or not that of such an object; one line.
    """
    try:
        return TypeAdapter(kind).validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{place}: {first['msg']}" if place else first["msg"]) from error
