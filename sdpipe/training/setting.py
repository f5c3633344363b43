"""What decides the result of a training, its name, and how one differs from another."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sdpipe.provenance import fingerprint

_MOST_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class Setting:
    """run: its name, which decides nothing; the others are those of `provenance.fingerprint`."""

    run: str
    params: Mapping[str, Any]
    data: str
    code: str
    compute: Mapping[str, str]

    def fingerprint(self, *, without: tuple[str, ...] = ()) -> str:
        """16 hexadecimal digits. without: params that shall not count."""
        params = {key: value for key, value in self.params.items() if key not in without}
        return fingerprint(params=params, data=self.data, code=self.code, compute=self.compute)

    def differences(self, older: "Setting") -> str:
        """For people: what is other than in an older one, the first three of it."""
        found = [*_changed("train.", self.params, older.params), *_changed("", self.compute, older.compute)]
        if self.data != older.data:
            found.append("the data were others")
        if self.code != older.code:
            found.append("the code was another")
        more = len(found) - _MOST_NAMED
        return ", ".join(found[:_MOST_NAMED]) + (f", and {more} more" if more > 0 else "")


def _changed(prefix: str, new: Mapping[str, Any], old: Mapping[str, Any]) -> Iterator[str]:
    for key in dict.fromkeys([*new, *old]):
        if new.get(key) != old.get(key):
            yield f"{prefix}{key} was {old.get(key)}"
