"""A disk tier under test: its settings, its folder and processes seen from outside, and calls for the child.

Functions whose first argument is `llm` are executed in the engine's process.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tests.engine import scenarios
from tests.engine.harness import Engine, clean_environ
from tests.engine.scenarios import Ask, Ran, Stepper

_SLOW_IO = Path(__file__).parent / "slow_io"

SMALL: dict[str, Any] = {"max_model_len": 640, "num_gpu_blocks_override": 64, "max_num_seqs": 8}
"""Options of an engine that starts in seconds."""


def settings(
    *folders: Path, host: int | None = 64, disk: int = 256, more: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Environment of an engine that writes every block to disk and reads whatever is there.

    host, disk: blocks. more: further settings; an empty one takes its default.
    """
    env = {
        "DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS": str(disk),
        "DYN_KVBM_DISK_CACHE_DIR": ":".join(map(str, folders)),
        "DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER": "1",
        "KVBM_DISK_SKIP_SLOW_LOADS": "0",
    }
    if host:
        env["DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS"] = str(host)
    return {**env, **(more or {})}


class SlowIo:
    """How slow the I/O processes of an engine are; `env` belongs into its environment."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "slow-io"
        path = f"{_SLOW_IO}{os.pathsep}{clean_environ({})['PYTHONPATH']}"
        self.env = {"SLOW_IO_FILE": str(self._file), "PYTHONPATH": path}
        self.set()

    def set(self, *, read_s: float = 0.0, write_s: float = 0.0) -> None:
        """Seconds that every record takes beyond its usual time."""
        fresh = self._file.with_suffix(".new")
        fresh.write_text(f"{read_s} {write_s}")
        fresh.replace(self._file)


# ---- from outside


def io_processes(engine: Engine) -> list[int]:
    """Its I/O processes: they are in the process group that it leads, also after its death."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
                if (
                    int(stat[2]) == engine.pid
                    and stat[0] != "Z"
                    and b"kvbm.storage.process" in (entry / "cmdline").read_bytes()
                ):
                    found.append(int(entry.name))
    return found


def kill_io(engine: Engine) -> int:
    """kill -9 of its I/O processes alone; how many there were."""
    pids = io_processes(engine)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return len(pids)


def kill_engine(engine: Engine) -> None:
    """kill -9 of the engine's process alone. Its I/O process has to end by itself, soon."""
    os.kill(engine.pid, signal.SIGKILL)
    end = time.monotonic() + 20
    while io_processes(engine):
        if time.monotonic() > end:
            raise TimeoutError("the I/O process outlives its engine")
        time.sleep(0.02)
    engine.close()


# ---- in the child


def quick_restarts() -> None:
    """To be called before the engine is made: a dead I/O process is started again at once, however often."""
    from kvbm.logic import disk
    from kvbm.storage import client

    client._BACKOFF_S = (0.05, 0.05)
    disk._PAUSE_S = (0.05, 0.05)


@dataclass(frozen=True)
class DiskSeen:
    """State of the disk tier at one moment; counters count blocks from the engine's start."""

    ready: bool
    off_reason: str | None
    recovered: int
    written: int
    read: int
    not_admitted: int
    dropped: int
    declined: int
    registered: int
    leftovers: int  # pins, operations, fetches and slots being read into: 0 when nothing is under way
    failures: dict[tuple[str, str], int] = field(default_factory=dict)


@dataclass(frozen=True)
class DiskRan(Ran):
    """Outcome of some requests over a disk tier."""

    disk_before: DiskSeen
    disk_after: DiskSeen

    @property
    def read(self) -> int:
        """Blocks that came from disk."""
        return self.disk_after.read - self.disk_before.read

    @property
    def written(self) -> int:
        return self.disk_after.written - self.disk_before.written

    @property
    def at_rest(self) -> bool:
        """Nothing is followed, pinned or off, and the engine has all its device blocks."""
        after = self.after
        return (after.pins, after.followed, self.disk_after.leftovers) == (0, 0, 0) and (
            after.off_reason is None and after.free_device_blocks == after.device_blocks
        )


def seen(llm: Any) -> DiskSeen:
    disk = scenarios.leader(llm).disk
    stats = disk.stats
    return DiskSeen(
        disk.ready,
        disk.off_reason,
        stats.recovered_blocks,
        stats.written_blocks,
        stats.read_blocks,
        stats.not_admitted_blocks,
        stats.dropped_blocks,
        stats.declined_blocks,
        disk.pool.num_registered,
        int(disk.pool.pins(np.arange(disk.pool.capacity)).sum())
        + len(disk._in_flight)
        + len(disk._fetches)
        + disk._fetched
        + disk._queued_reads
        + disk._queued_writes
        + int(disk._arriving.sum()),
        {(d.name, f.name): n for (d, f), n in stats.failures.items()},
    )


def run(llm: Any, asks: Sequence[Ask]) -> DiskRan:
    before = seen(llm)
    ran = scenarios.run(llm, asks)
    return DiskRan(ran.tokens, ran.cached, ran.before, ran.after, before, seen(llm))


def run_again(llm: Any, asks: Sequence[Ask]) -> DiskRan:
    """With an empty device cache."""
    scenarios.drain(llm)
    if not scenarios.reset(llm):
        raise RuntimeError("the device cache could not be reset")
    return run(llm, asks)


def from_disk(llm: Any, asks: Sequence[Ask]) -> DiskRan:
    """With an empty device cache and an empty host tier: what hits was read from disk."""
    wait_ready(llm)
    scenarios.drain(llm)
    scenarios.leader(llm)._planner.clear()
    return run_again(llm, asks)


def wait_ready(llm: Any, deadline_s: float = 30.0) -> DiskSeen:
    """Step until the disk tier can be used, and says what it found."""
    end = time.monotonic() + deadline_s
    while not seen(llm).ready:
        if time.monotonic() > end:
            raise TimeoutError(f"the disk tier does not get ready: {seen(llm)}")
        scenarios.step_for(llm, 0.01)
    scenarios.drain(llm)
    return seen(llm)


def set_timeout(llm: Any, seconds: float) -> None:
    """KVBM_DISK_TIMEOUT_S from here on."""
    tier = scenarios.leader(llm).disk
    tier._limits = replace(tier._limits, timeout_s=seconds)


def wait_io(llm: Any, deadline_s: float = 20.0) -> None:
    """Ask trifles until the I/O process, which may have died, answers again: an idle engine does not step."""
    client = scenarios.worker(llm)._disk
    end = time.monotonic() + deadline_s
    while not client.ready or not _lives(client._process):
        if time.monotonic() > end:
            raise TimeoutError("the I/O process is not started again")
        scenarios.run(llm, [Ask((1000, 1001, 1002), 1)])


def _lives(process: subprocess.Popen[bytes] | None) -> bool:
    """Whether it isn't about to die either, of which its client hears later: its memory goes first."""
    try:
        return process is not None and bool(Path(f"/proc/{process.pid}/cmdline").read_bytes())
    except OSError:
        return False


def stored(llm: Any, asks: Sequence[Ask]) -> list[int]:
    """Leading blocks of each prompt that are on disk."""
    disk = scenarios.leader(llm).disk
    return [len(disk.pool.match(scenarios.hashes(llm, ask.prompt, ask.salt))) for ask in asks]


def store(llm: Any, asks: Sequence[Ask], rounds: int = 8) -> DiskRan:
    """Run until every full block of the prompts is on disk: writes that find no room are dropped."""
    wait_ready(llm)
    first = run(llm, asks)
    block_size = scenarios.leader(llm)._block_size
    want = [len(ask.prompt) // block_size for ask in asks]
    for _ in range(rounds):
        if stored(llm, asks) == want:
            return first
        run_again(llm, asks)
    raise RuntimeError(f"not all is on disk: {stored(llm, asks)} of {want}, {seen(llm)}")


def compute(llm: Any, asks: Sequence[Ask]) -> list[list[int]]:
    """Answers that no cache had a part in."""
    from vllm import SamplingParams

    outputs = llm.generate(
        [{"prompt_token_ids": list(ask.prompt)} for ask in asks],
        [
            SamplingParams(
                temperature=0, max_tokens=ask.max_tokens, ignore_eos=True, skip_reading_prefix_cache=True
            )
            for ask in asks
        ],
        use_tqdm=False,
    )
    if any(output.num_cached_tokens for output in outputs):
        raise RuntimeError("a cache was used")
    scenarios.drain(llm)
    return [list(output.outputs[0].token_ids) for output in outputs]


def begin_writes(llm: Any, asks: Sequence[Ask]) -> int:
    """Answer requests, and return while their blocks are still being written: how many."""
    wait_ready(llm)
    scenarios.run(llm, asks, drained=False)
    disk = scenarios.leader(llm).disk
    end = time.monotonic() + 30
    while not disk._queued_writes or scenarios.leader(llm)._planner.has_work:
        if time.monotonic() > end:
            raise TimeoutError(f"nothing is written: {seen(llm)}")
        llm.llm_engine.step()
    llm.llm_engine.step()  # the orders travel with a step
    return disk._queued_writes


def reads_under_way(llm: Any) -> int:
    """Blocks that are on their way from disk."""
    return scenarios.leader(llm).disk._queued_reads


def abort_during_fetches(llm: Any, asks: Sequence[Ask], every: int) -> dict[str, Any]:
    """All requests at once; when their blocks are on their way from disk, every n-th is aborted."""
    wait_ready(llm)
    scenarios.leader(llm)._planner.clear()
    if not scenarios.reset(llm):
        raise RuntimeError("the device cache could not be reset")
    before, stepper = seen(llm), Stepper(llm)
    for index, ask in enumerate(asks):
        stepper.add(str(index), ask)
    end = time.monotonic() + 30
    while not reads_under_way(llm):
        if time.monotonic() > end or not llm.llm_engine.has_unfinished_requests():
            raise RuntimeError("nothing was read")
        stepper.step()
    disk = scenarios.leader(llm).disk
    # vLLM appends to the names that it was given.
    waiting = {name.split("-")[0] for name, fetch in disk._fetches.items() if len(fetch.slots)}
    aborted = [str(index) for index in range(0, len(asks), every)]
    for name in aborted:
        stepper.abort(name)
    stepper.finish()
    scenarios.drain(llm)
    return {
        "aborted_while_waiting": len(waiting & set(aborted)),
        "tokens": {int(name): stepper.tokens[name] for name in stepper.finished - set(aborted)},
        "before": before,
        "after": seen(llm),
        "engine": scenarios.observe(llm),
    }
