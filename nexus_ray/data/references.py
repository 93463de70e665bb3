"""How a dataset of the `datasets` library is written, so that it can stand where a path stands.

`DIRECTORY?split=SPLIT` is a directory that `save_to_disk` wrote,
`datasets://NAME?config=CONFIG&split=SPLIT&revision=REVISION` a name on the hub. SPLIT may be a slice, such as
train[:10%]; nothing is escaped.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from nexus_ray.errors import DataError

SCHEME = "datasets://"
_KEYS = ("config", "split", "revision")
_QUERY = re.compile(rf"\?({'|'.join(_KEYS)})=")


@dataclass(frozen=True)
class Reference:
    """A dataset and one of its splits.

    Attributes:
        place: the name on the hub, or the directory.
        saved: whether the place is a directory that `save_to_disk` wrote.
        config: configuration of a named dataset, "" for the only one.
        split: split or slice, "" for the only split.
        revision: commit, branch or tag of a named dataset, "" for the latest.
    """

    place: str
    saved: bool
    config: str = ""
    split: str = ""
    revision: str = ""

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Read a reference.

        Raises:
            DataError: it has a key that there is not, or no name.
        """
        saved = not text.startswith(SCHEME)
        place, _, query = text.rpartition("?") if _QUERY.search(text) else (text, "", "")
        place = place.removeprefix(SCHEME)
        values = dict(part.partition("=")[::2] for part in query.split("&") if part)
        unknown = sorted(set(values) - set(("split",) if saved else _KEYS))
        if unknown or not place:
            raise DataError(
                f"{text}: {f'there is no {unknown[0]}=' if unknown else 'the name is missing'}",
                f"write {SCHEME}NAME?config=CONFIG&split=SPLIT&revision=REVISION, or DIRECTORY?split=SPLIT",
            )
        return cls(place, saved, **values)

    def __str__(self) -> str:
        """The reference as it is written, `split` always among it for a saved dataset."""
        if self.saved:
            return f"{self.place}?split={self.split}"
        query = "&".join(f"{key}={getattr(self, key)}" for key in _KEYS if getattr(self, key))
        return f"{SCHEME}{self.place}" + (f"?{query}" if query else "")


def is_reference(path: str) -> bool:
    """Whether a path, pattern or shard stands for a dataset rather than for files."""
    return path.startswith(SCHEME) or _QUERY.search(path) is not None
