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
        train, before = ({"train": each.params} for each in (self, older))
        found = [*_changed(train, before), *_changed(self.compute, older.compute)]
        if self.data != older.data:
            found.append("the data were others")
        if self.code != older.code:
            found.append("the code was another")
        more = len(found) - _MOST_NAMED
        return ", ".join(found[:_MOST_NAMED]) + (f", and {more} more" if more > 0 else "")


def _changed(new: Mapping[str, Any], old: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key in dict.fromkeys([*new, *old]):
        name = f"{prefix}{key}"
        if key not in old:
            yield f"{name} is new"
        elif key not in new:
            yield f"{name} is no more"
        elif isinstance(new[key], Mapping) and isinstance(old[key], Mapping):
            yield from _changed(new[key], old[key], f"{name}.")
        elif new[key] != old[key]:
            yield f"{name} was {old[key]}"
