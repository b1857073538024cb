"""JSON that notices when it was damaged: a version and a SHA-256 over everything else.

A flipped digit in a loss, a step or a noise range is still valid JSON; the digest is what tells.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NoReturn

from dbtrain.errors import ShardError
from dbtrain.shards.storage.errors import damaged, is_finite_number, one_line, short

NUMBER_LIMIT = 1e300
"""JSON integers have no limit, floats have."""


def canonical(value: Any, where: str) -> str:
    """One spelling of a JSON value: sorted keys, no spaces, ASCII.

    Raises:
        ShardError: the value holds something that JSON has no word for (a tensor, NaN, a set).
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as err:
        raise ShardError(f"{where} cannot be written as JSON: {one_line(err)}; use plain, finite values") from err


def parse_json(data: bytes, where: str) -> Any:
    """Parse strict JSON (no NaN, no Infinity).

    Raises:
        DamagedError: it is not UTF-8 or not JSON, or nested or numbered absurdly.
    """
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as err:
        damaged(where, f"not JSON ({one_line(err)})")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def seal(fields: Mapping[str, Any], version: int, where: str) -> bytes:
    """Readable, deterministic JSON of the fields plus ``version`` and ``digest``.

    Raises:
        ShardError: a field is not JSON, or is called ``version`` or ``digest``.
    """
    for taken in ("version", "digest"):
        if taken in fields:
            raise ShardError(f"{where}: the field {taken!r} is reserved; rename it")
    # Through the text and back, so that the digest sees what a reader will see (tuples as lists,
    # int keys as text).
    body = json.loads(canonical({**fields, "version": version}, where))
    body["digest"] = _digest(body, where)
    return (json.dumps(body, sort_keys=True, indent=1) + "\n").encode()


def unseal(data: bytes, version: int, where: str) -> dict[str, Any]:
    """Inverse of :func:`seal`: the fields, without ``version`` and ``digest``.

    Raises:
        DamagedError: not JSON, not an object, or the digest does not match.
        ShardError: undamaged, but of another version.
    """
    body = parse_json(data, where)
    if not isinstance(body, dict):
        damaged(where, f"expected a JSON object, found {type(body).__name__}")
    digest = body.pop("digest", None)
    # The digest comes first: a flipped version number is damage, not another version.
    if digest != _digest(body, where):
        damaged(where, "its digest does not match its content (it was edited or a bit flipped)")
    stored = body.pop("version", None)
    if stored != version or isinstance(stored, bool):
        raise ShardError(f"{where} has format version {short(stored)}, this dbtrain reads {version}: use that release")
    return body


def _digest(body: dict[str, Any], where: str) -> str:
    return hashlib.sha256(canonical(body, where).encode()).hexdigest()


class Fields:
    """Typed access to the fields of a parsed JSON object;
    every miss is a DamagedError that names field and file."""

    def __init__(self, data: Any, where: str) -> None:
        if not isinstance(data, dict):
            damaged(where, f"expected a JSON object, found {type(data).__name__}")
        self._data: dict[str, Any] = data
        self._where = where

    def integer(self, name: str, low: int = 0) -> int:
        """An integer not below ``low``."""
        value = self._get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            self.reject(name, f"an integer not below {low}")
        return int(value)

    def text(self, name: str) -> str:
        """A string, possibly empty."""
        value = self._get(name)
        if not isinstance(value, str):
            self.reject(name, "a string")
        return str(value)

    def flag(self, name: str) -> bool:
        """True or false."""
        value = self._get(name)
        if not isinstance(value, bool):
            self.reject(name, "true or false")
        return bool(value)

    def number(self, name: str) -> float:
        """A finite number."""
        value = self._get(name)
        if not is_finite_number(value) or abs(value) > NUMBER_LIMIT:
            self.reject(name, "a finite number")
        return float(value)

    def mapping(self, name: str) -> dict[str, Any]:
        """A JSON object."""
        value = self._get(name)
        if not isinstance(value, dict):
            self.reject(name, "an object")
        return dict(value)

    def items(self, name: str) -> list[Any]:
        """A JSON array."""
        value = self._get(name)
        if not isinstance(value, list):
            self.reject(name, "a list")
        return list(value)

    def reject(self, name: str, wanted: str) -> NoReturn:
        """Raise the DamagedError of one field."""
        damaged(self._where, f"{name} must be {wanted}, found {short(self._data.get(name))}")

    def _get(self, name: str) -> Any:
        if name not in self._data:
            damaged(self._where, f"{name} is missing")
        return self._data[name]
