"""JSON objects with a checksum of themselves: what a run keeps of itself and reads again later."""

import json
import zlib
from typing import Any

_NAME = "checksum"


def seal(value: dict[str, Any]) -> dict[str, Any]:
    """The object with `checksum`, which is of all other fields, whatever their order."""
    return value | {_NAME: checksum(value)}


def is_sealed(value: dict[str, Any]) -> bool:
    """Whether an object has a checksum, right or wrong; older files have none."""
    return _NAME in value


def unseal(value: dict[str, Any]) -> dict[str, Any] | None:
    """The object without its checksum; None where they do not belong together."""
    rest = {name: item for name, item in value.items() if name != _NAME}
    return rest if value.get(_NAME) == checksum(rest) else None


def checksum(value: Any) -> str:
    """CRC-32 of a value as JSON with sorted names: it stays the same through a file and back."""
    text = json.dumps(json.loads(json.dumps(value)), sort_keys=True)
    return f"{zlib.crc32(text.encode()):08x}"
