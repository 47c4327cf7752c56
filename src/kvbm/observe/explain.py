"""Why a request missed, in words: from its record, the history of blocks and the other requests."""

from collections.abc import Iterable
from typing import Any

from kvbm.logic.history import BlockHistory, Entry, Fate
from kvbm.observe.requests import Explanation, Miss, RequestRecord

_OF_FATE = {
    Fate.EVICTED: Miss.EVICTED,
    Fate.DAMAGED: Miss.FAILED_CHECK,
    Fate.LOST: Miss.COPY_FAILED,
    Fate.CLEARED: Miss.CLEARED,
    Fate.NO_ROOM: Miss.TIER_FULL,
    Fate.NOT_ADMITTED: Miss.NOT_ADMITTED,
}
_KEPT_OUT = (Fate.NOT_ADMITTED, Fate.NO_ROOM, Fate.LOST)


def explain(
    record: RequestRecord,
    others: Iterable[RequestRecord],
    history: BlockHistory,
    *,
    foreign_records: bool = False,
    weights_changed: float | None = None,
) -> Explanation:
    """foreign_records: the disk cache held blocks of another model or geometry when it was opened.

    weights_changed: when, by the leader's clock.
    """
    miss = record.miss
    if not record.answered and record.finished:
        return Explanation(None, "The request ended before the engine had started on it.")
    if not record.answered:
        return Explanation(None, "The request waits: the engine has not started on it.")
    if miss is None:
        return Explanation(None, "Nothing was missed: all blocks that could be of use were there.")
    if miss.reason == Miss.UNSUPPORTED:
        return Explanation(miss.reason, f"KVBM was not asked: {miss.detail}.")
    if miss.reason is not None:
        return Explanation(miss.reason, _sentence(miss.block, miss.detail or miss.reason))
    entries = [entry for entry in history.find(miss.word) if entry.at <= record.clock] if miss.word else []
    if entries:
        reason, detail = _of_history(entries, record.clock)
        return Explanation(reason, _sentence(miss.block, detail))
    if weights_changed is not None and _had_come_before(weights_changed, record, others):
        ago = max(0.0, record.clock - weights_changed)
        detail = f"the model's weights had changed, or all caches were reset, {ago:.1f} s before"
        return Explanation(Miss.CLEARED, _sentence(miss.block, detail))
    if miss.block == 0 and _has_twin(record, others):
        detail = "another request had the same tokens under another salt or adapter, which never share"
        return Explanation(Miss.OTHER_IDENTITY, _sentence(miss.block, detail))
    if foreign_records:
        detail = (
            "the disk cache was of another model, dtype or layout, which can't be used, and was begun anew"
        )
        return Explanation(Miss.OTHER_NAMESPACE, _sentence(miss.block, detail))
    return Explanation(
        Miss.NEVER_SEEN, _sentence(miss.block, "these tokens were never seen, or too long ago")
    )


def describe(record: RequestRecord, explanation: Explanation) -> dict[str, Any]:
    """As JSON: what `kvbm explain` and the page show."""
    return {
        "id": record.id,
        "at": record.at,
        "finished": record.finished,
        "prompt_tokens": record.prompt_tokens,
        "device_tokens": record.device_tokens,
        "host_tokens": record.host_tokens,
        "disk_tokens": record.disk_tokens,
        "failed_tokens": record.failed_tokens,
        "computed_tokens": record.computed_tokens,
        "saved_seconds": round(record.saved_s, 6),
        "missed_block": record.miss.block if record.miss is not None else None,
        "reason": explanation.miss,
        "explanation": explanation.text,
    }


def _of_history(entries: list[Entry], clock: float) -> tuple[Miss, str]:
    """entries: newest first."""
    newest = entries[0]
    # A block that did not get to the disk is missed when the host tier gives it up.
    below = next((entry for entry in entries if entry.tier == "disk"), None)
    evicted = newest.tier == "host" and newest.fate == Fate.EVICTED
    if evicted and below is not None and below.fate in _KEPT_OUT:
        return _OF_FATE[below.fate], f"{_words(newest, clock)}, and {_words(below, clock)}"
    return _OF_FATE[newest.fate], _words(newest, clock)


def _words(entry: Entry, clock: float) -> str:
    ago = f"{max(0.0, clock - entry.at):.1f} s before"
    match entry.fate:
        case Fate.EVICTED if not entry.wanted:
            return f"it was given up {ago}, when the {entry.tier} tier was made smaller"
        case Fate.EVICTED:
            return f"it was evicted from the {entry.tier} tier {ago}, when {entry.wanted} blocks needed room"
        case Fate.DAMAGED:
            return f"its record in the {entry.tier} tier failed its check {ago} and was dropped"
        case Fate.LOST:
            return f"a copy to or from the {entry.tier} tier failed or was given up {ago}"
        case Fate.CLEARED:
            return f"the {entry.tier} tier was cleared {ago}"
        case Fate.NO_ROOM:
            return f"the {entry.tier} tier had no room for it {ago}"
        case Fate.NOT_ADMITTED:
            return f"it was not admitted to disk {ago}, as it had been used only once"


def _sentence(block: int, detail: str) -> str:
    return f"Block {block} was missed: {detail}."


def _had_come_before(moment: float, record: RequestRecord, records: Iterable[RequestRecord]) -> bool:
    """Whether a request that began alike was answered before the moment, and this one after it."""
    mine = record.identity
    return record.clock >= moment and any(
        other.identity == mine and other.answered and other.clock < moment for other in records
    )


def _has_twin(record: RequestRecord, records: Iterable[RequestRecord]) -> bool:
    mine = record.identity
    return bool(mine.first_block) and any(
        other.identity.first_block == mine.first_block
        and (other.identity.salt, other.identity.adapter) != (mine.salt, mine.adapter)
        and other.at <= record.at
        for other in records
    )
