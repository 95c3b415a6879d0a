"""JSON objects with a checksum, for files that a run writes and reads again later."""

import json
import zlib
from typing import Any

_NAME = "checksum"


def seal(value: dict[str, Any]) -> dict[str, Any]:
    """Returns the object with a `checksum` of all its fields, independent of their order."""
    return value | {_NAME: checksum(value)}


def is_sealed(value: dict[str, Any]) -> bool:
    """Returns whether an object has a checksum, valid or not; older files have none."""
    return _NAME in value


def unseal(value: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the object without its checksum, or None if the checksum does not match."""
    rest = {name: item for name, item in value.items() if name != _NAME}
    return rest if value.get(_NAME) == checksum(rest) else None


def checksum(value: Any) -> str:
    """Returns the CRC-32 of a value as JSON with sorted names; a round trip does not change it."""
    text = json.dumps(json.loads(json.dumps(value)), sort_keys=True)
    return f"{zlib.crc32(text.encode()):08x}"
