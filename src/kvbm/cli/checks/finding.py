"""What a check has found."""

import enum
from dataclasses import asdict, dataclass
from pathlib import Path


class State(enum.StrEnum):
    OK = "ok"
    ADVICE = "advice"  # works, but could be better
    PROBLEM = "problem"  # KVBM, or a tier of it, will not work as it is set
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Finding:
    name: str
    state: State
    found: str
    to_do: str = ""

    def to_json(self) -> dict[str, str]:
        return asdict(self)


def read(path: Path) -> str | None:
    """Text of a small file of /proc or /sys, None where there is none."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None
