"""What a row is about, and why there is none. Imports neither JAX nor torch."""

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What a row is about: enough to tell it from every other row."""

    op: str
    implementation: str
    T: int
    D: int
    V: int
    dtype: str = "bfloat16"
    setting: str = ""

    @property
    def key(self) -> str:
        """One string for all fields."""
        return json.dumps(list(asdict(self).values()))


def why(error: BaseException) -> str:
    """The last words of an error, short enough for a row."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0].strip()}"[:300]
