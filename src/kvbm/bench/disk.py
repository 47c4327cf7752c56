"""How fast records move between host memory and local disk, beside fio on the same files, and what it costs.

    kvbm bench disk --dir /mnt/nvme [--record-mib 2] [--gib 2] [--rounds 5] [--json FILE]
    kvbm bench disk --dir /mnt/nvme --restart 1000000

The first measures, in rounds that alternate: fio, bare system calls, and KVBM's I/O process with its
checksums, reading and writing records of one size in random order at one depth (fio over a few buffers that
stay in a CPU's cache, in huge pages where some are reserved: sysctl vm.nr_hugepages=32; the others over host
memory); CPU seconds of the I/O process per GB; what a Python loop on a core of its own loses that asks for
answers every 5 ms, as the thread of an engine does with every step, what it loses beside fio, of which it
knows nothing, and what part of its time it spends on the disk. The second: how long a store of so many
records takes to open. Without fio (apt-get install fio) the rest is measured.
"""

import argparse
import json
import mmap
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvbm.bench.report import make_parser, progress, words, write_figures
from kvbm.digest import digest
from kvbm.memory import reserved_huge_pages
from kvbm.storage.client import StorageClient
from kvbm.storage.containers import ensure_room, paths_of, stride_of
from kvbm.storage.disk_store import DiskStore
from kvbm.storage.messages import Batch, Options
from kvbm.storage.process import writers
from kvbm.storage.store import Identity, Key
from kvbm.transfer.arena import HostArena

BATCH = 32
STEP_S = 0.005  # how often an engine asks for answers
NAMESPACE = b"benchmark of disk"[:16]


class Ours:
    """KVBM's path: batches to an I/O process over a shared arena."""

    def __init__(
        self, folder: Path, record_bytes: int, records: int, arena_records: int, threads: int, backend: str
    ) -> None:
        self.records = records
        self.arena = HostArena(min(arena_records, records), record_bytes)
        self.arena.touch(0, self.arena.num_slots)  # as on a GPU
        self.arena.slots[:] = np.random.default_rng(0).integers(0, 256, self.arena.slots.shape, np.uint8)
        ensure_room([folder], records, stride_of(self.arena.slot_bytes), 0)
        self.client = StorageClient(
            Options(
                folders=[str(folder)],
                namespace=NAMESPACE,
                rank=0,
                ranks=1,
                record_bytes=record_bytes,
                slot_bytes=self.arena.slot_bytes,
                host_slots=self.arena.num_slots,
                disk_slots=records,
                backend=backend,
                threads=threads,
                zerofill_fallback=False,
                o_direct=True,
                open_direct=False,
                min_free_bytes=0,
            ),
            self.arena.fd,
        )
        while not self.client.ready:
            if self.client.refused:
                sys.exit(self.client.refused)
            self.client.poll()
            time.sleep(0.001)
        self.hashes = np.random.default_rng(1).integers(0, 256, (records, 16), np.uint8)
        self.engine_s = 0.0  # what this process has spent in steps
        self._id = 0

    def run(self, write: bool, rng: np.random.Generator) -> float:
        """Bytes per second over all records once, in random order."""
        started = time.perf_counter()
        for _ in self.steps(write, rng):
            time.sleep(1e-3)  # oftener it would take the CPU from the I/O process, on two cores
        return self.records * self.arena.record_bytes / (time.perf_counter() - started)

    def steps(self, write: bool, rng: np.random.Generator) -> Iterator[None]:
        """The same; what an engine does for it in a step, in each."""
        order = rng.permutation(self.records).astype(np.int32)
        host = np.arange(self.records, dtype=np.int32) % self.arena.num_slots
        batches = [slice(at, at + BATCH) for at in range(0, self.records, BATCH)]
        most = max(1, self.arena.num_slots // BATCH)
        in_flight = failed = 0
        while batches or in_flight:
            busy_since = time.perf_counter()
            while batches and in_flight < most:
                part = batches.pop(0)
                slots = order[part]
                self._id += 1
                self.client.submit(
                    Batch(
                        self._id,
                        write,
                        host[part].tobytes(),
                        slots.tobytes(),
                        self.hashes[slots].tobytes(),
                        bytes(len(slots)),
                        b"",
                        60.0,
                    )
                )
                in_flight += 1
            for result in self.client.poll().results:
                in_flight -= 1
                failed += len(result.failed)
            self.engine_s += time.perf_counter() - busy_since
            yield
        if failed:
            sys.exit(f"{failed} records failed")

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.client.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def fio_memory(block: int, depth: int) -> str:
    """Where fio's buffers lie. Into scattered small pages a virtual disk may read half as fast."""
    page, free = reserved_huge_pages()
    return "mmaphuge" if page and free > block * depth / page + 1 else "malloc"


def fio(paths: list[Path], write: bool, block: int, total: int, depth: int) -> float:
    """Bytes per second of fio over so many bytes in random order."""
    command = [
        "fio",
        "--name=kvbm",
        "--filename=" + ":".join(map(str, paths)),
        "--rw=" + ("randwrite" if write else "randread"),
        f"--bs={block}",
        "--direct=1",
        "--ioengine=io_uring",
        f"--iodepth={depth}",
        f"--mem={fio_memory(block, depth)}",
        f"--size={sum(path.stat().st_size // block * block for path in paths)}",
        f"--io_size={total // block * block}",
        "--file_service_type=random",
        "--fallocate=none",
        "--output-format=json",
    ]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    job = json.loads(out[out.index("{") :])["jobs"][0]["write" if write else "read"]
    return job["bw_bytes"]


def plain(
    slots: NDArray[np.uint8], paths: list[Path], write: bool, block: int, total: int, depth: int
) -> float:
    """Bytes per second of bare system calls from threads of this process, to and from `slots`."""
    call = os.pwritev if write else os.preadv
    files = [os.open(path, os.O_RDWR | os.O_DIRECT) for path in paths]
    places = [
        (file, offset)
        for file, path in zip(files, paths, strict=True)
        for offset in range(0, path.stat().st_size - block + 1, block)
    ][: total // block]
    np.random.default_rng().shuffle(places)

    def work(first: int) -> None:
        page = mmap.mmap(-1, 4096)
        for i in range(first, len(places), depth):
            call(places[i][0], [page, slots[i % len(slots)]], places[i][1])

    started = time.perf_counter()
    with ThreadPoolExecutor(depth) as pool:
        list(pool.map(work, range(depth)))
    seconds = time.perf_counter() - started
    for file in files:
        os.close(file)
    return len(places) * slots.shape[1] / seconds


def apart(pid: int) -> tuple[set[int], set[int]]:
    """A core for the loop, and the others, to which the threads of process `pid` are moved."""
    first, *others = sorted(os.sched_getaffinity(0))
    rest = set(others) or {first}
    for thread in os.listdir(f"/proc/{pid}/task"):
        os.sched_setaffinity(int(thread), rest)
    return {first}, rest


def loop_rate(core: set[int], steps: Iterator[None] | None = None) -> float:
    """Iterations per second of a Python loop on `core`, in a second or while it makes steps, each STEP_S."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, core)
    count, now = 0, time.perf_counter()
    started = next_step = now
    over = False
    while not over:
        for _ in range(1000):
            count += 1
        now = time.perf_counter()
        if steps is None:
            over = now >= started + 1.0
        elif now >= next_step:
            next_step = now + STEP_S
            over = next(steps, "over") is not None
    os.sched_setaffinity(0, cores)
    return count / (time.perf_counter() - started)


def throughput(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    record = int(args.record_mib * 2**20)
    records = int(args.gib * 2**30) // record
    ours = Ours(folder, record, records, args.arena_records, args.threads, args.backend)
    rng = np.random.default_rng(2)
    block = stride_of(record)
    amount = block, records * block
    depth = {"write": writers(args.threads), "read": args.threads}
    paths = paths_of([folder])
    others = ("fio", "plain") if shutil.which("fio") else ("plain",)
    rates = {f"{who} {kind}": list[float]() for who in ("kvbm", *others) for kind in ("write", "read")}
    cpu: dict[str, list[float]] = {"write": [], "read": []}
    ours.run(True, rng)  # first writes convert the file system's extents, for both

    def measure(who: str, kind: str) -> None:
        write = kind == "write"
        if who == "kvbm":
            before = ours.cpu_seconds()
            rate = ours.run(write, rng)
            cpu[kind].append((ours.cpu_seconds() - before) / (records * record / 1e9))
        elif who == "fio":
            rate = fio(paths, write, *amount, depth[kind])
        else:
            rate = plain(ours.arena.slots, paths, write, *amount, depth[kind])
        rates[f"{who} {kind}"].append(rate)

    order = ["kvbm", *others]
    for _ in progress(range(args.rounds), "throughput"):
        for kind in ("read", "write"):
            for who in order:
                measure(who, kind)
        ours.run(True, rng)  # what others have overwritten
        order.append(order.pop(0))  # a drive may be faster after a rest
    loop: dict[str, list[float]] = {"alone": [], "beside fio": [], "with KVBM": []}
    shares: list[float] = []
    core, rest = apart(ours.client.pid or 0)
    for _ in progress(range(args.rounds), "a Python loop meanwhile"):
        loop["alone"].append(loop_rate(core))
        if "fio" in others:
            with ThreadPoolExecutor(1, initializer=lambda: os.sched_setaffinity(0, rest)) as pool:
                other = pool.submit(fio, paths, False, *amount, depth["read"])
                time.sleep(0.5)  # until it has begun
                loop["beside fio"].append(loop_rate(core))
                other.result()
        before, started = ours.engine_s, time.perf_counter()
        loop["with KVBM"].append(loop_rate(core, ours.steps(False, rng)))
        shares.append((ours.engine_s - before) / (time.perf_counter() - started))
    started = time.process_time()
    for data in ours.arena.records():  # more than any cache holds, as after a transfer
        digest(data)
    checksum_s = (time.process_time() - started) / (ours.arena.num_slots * record / 1e9)
    ours.client.close()
    median = {name: statistics.median(values) / 1e9 for name, values in rates.items()}
    return {
        "record bytes": record,
        "records": records,
        "records in host memory": ours.arena.num_slots,
        "depth": depth,
        "backend": args.backend,
        "memory of fio": fio_memory(block, args.threads),
        "GB/s": {name: [round(value / 1e9, 2) for value in values] for name, values in rates.items()},
        "median GB/s": {name: round(value, 2) for name, value in median.items()},
        **{
            f"part of {other}": {
                kind: round(median[f"kvbm {kind}"] / median[f"{other} {kind}"], 3) for kind in depth
            }
            for other in others
        },
        "CPU s per GB": {kind: round(statistics.median(values), 3) for kind, values in cpu.items()},
        "of these the checksum": round(checksum_s, 3),
        "part of its time that the loop spends on the disk": round(statistics.median(shares), 4),
        "python loop, part of its rate alone while the disk reads": {
            name: round(statistics.median(rates) / statistics.median(loop["alone"]), 4)
            for name, rates in loop.items()
            if rates
        },
    }


def restart(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds to open a store of small records: with its index, and from the headers alone."""
    count, record = args.restart, 4096
    memory = np.frombuffer(HostArena(1, record).slots.tobytes(), np.uint8)  # a place that is only read
    identity = Identity(NAMESPACE, record)
    ensure_room([folder], count, stride_of(record), 0)

    def store() -> DiskStore:
        return DiskStore([folder], identity, count, memory, slot_bytes=record)

    first = store()
    first.recover()
    arena = HostArena(64, record)
    keys = np.random.default_rng(3).integers(0, 256, (count, 16), np.uint8)
    started = time.perf_counter()

    def write(part: range) -> None:
        for slot in part:
            first.write(slot, Key(keys[slot].tobytes()), arena.slots[slot % 64])

    with ThreadPoolExecutor(8) as pool:
        parts = [range(at, min(at + 1000, count)) for at in range(0, count, 1000)]
        list(progress(pool.map(write, parts), "writing records", len(parts)))
    first.close()
    written_s = time.perf_counter() - started
    seconds = {}
    for name in ("with the index", "from headers"):
        if name == "from headers":
            (folder / "index.kvbm").unlink()
        started = time.perf_counter()
        again = store()
        found = len(again.recover())
        seconds[name] = round(time.perf_counter() - started, 2)
        if found != count:
            sys.exit(f"{found} of {count} records found {name}")
        again.close()
    return {"records": count, "written in s": round(written_s, 1), "opened in s": seconds}


def show(result: dict[str, Any]) -> None:
    print(f"{result['machine']}; {result['versions']}")
    if "opened in s" in result:
        print(f"{result['records']:,} records, written in {result['written in s']} s")
        for how, seconds in result["opened in s"].items():
            print(f"  opened {how:<20} {seconds:8.2f} s")
        return
    print(
        f"{result['records']:,} records of {result['record bytes'] / 2**20:g} MiB, "
        f"{result['records in host memory']:,} of them in host memory, backend {result['backend']}\n"
    )
    print(f"{'GB/s, median':<24}{'write':>8}{'read':>8}")
    median, depth = result["median GB/s"], result["depth"]
    for who, name in (("kvbm", "KVBM"), ("fio", "fio"), ("plain", "bare system calls")):
        if f"{who} read" in median:
            print(f"{name:<24}" + "".join(f"{median[f'{who} {kind}']:8.2f}" for kind in depth))
    cpu = result["CPU s per GB"]
    print(f"{'CPU seconds per GB':<24}" + "".join(f"{cpu[kind]:8.2f}" for kind in depth))
    print(f"{'of these the checksum':<24}{result['of these the checksum']:8.2f}")
    for beside, part in result["python loop, part of its rate alone while the disk reads"].items():
        if beside != "alone":
            print(f"a Python loop {beside} keeps {100 * part:.1f} % of its speed")
    share = result["part of its time that the loop spends on the disk"]
    print(f"with KVBM it spends {100 * share:.2f} % of its time on the disk")


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    parser = make_parser(__doc__, prog)
    parser.add_argument("--dir", type=Path, required=True, help="a directory on the drive in question")
    parser.add_argument("--record-mib", type=float, default=2.0)
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--arena-records", type=int, default=256, help="records of host memory used in turn")
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backend", default="posix")
    parser.add_argument("--restart", type=int, help="measure instead how long so many records take to open")
    args = parser.parse_args(argv)
    if not args.dir.is_dir():
        parser.error(f"--dir {args.dir}: there is no such directory")
    folder = Path(tempfile.mkdtemp(prefix="kvbm-benchmark-", dir=args.dir))
    try:
        measured = restart(args, folder) if args.restart else throughput(args, folder)
    finally:
        shutil.rmtree(folder)
    result = {
        "machine": f"{os.cpu_count()} cores, {platform.platform()}",
        "versions": f"Python {platform.python_version()}, numpy {np.__version__}, xxhash {xxhash.VERSION}",
        **measured,
    }
    with words(args.json):
        show(result)
    write_figures(result, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
