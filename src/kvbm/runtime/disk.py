"""The disk tier as the settings want it: the leader's half and each rank's half."""

import logging
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from kvbm.config import Config
from kvbm.errors import CapacityError, ConfigError
from kvbm.logic.admission import FrequencyFilter, WriteBudget
from kvbm.logic.disk import DiskLimits, DiskTier
from kvbm.logic.estimate import LoadEstimate
from kvbm.logic.groups import KvGroups
from kvbm.logic.hashing import Hashes
from kvbm.logic.history import Fate
from kvbm.logic.index import Slots
from kvbm.logic.policies import load_policy
from kvbm.logic.pool import BlockPool
from kvbm.storage.client import StorageClient
from kvbm.storage.containers import ensure_room, lies_in_memory, rank_folder, stride_of
from kvbm.storage.messages import Options
from kvbm.storage.split import Split
from kvbm.transfer.arena import HostArena, slot_bytes

logger = logging.getLogger(__name__)

# Without a host cache blocks pass through one of this size: the most that one request can have from disk.
_STAGING_BYTES = 1e9
_MIN_STAGING_BLOCKS = 16
# One operation: small enough that a prompt's first blocks are there while others are read.
_BATCH_BLOCKS = 32
_FILTER_BLOCKS = 1_000_000


def num_host_slots(config: Config, records: Sequence[int]) -> int:
    """Blocks of the host tier: as configured, or what a disk tier alone needs.

    records: bytes of a block's records, one a rank that keeps it.
    """
    host = config.host
    size = host_record_bytes(records)
    if host.num_blocks or host.cache_gb:
        return host.num_blocks or int(host.cache_gb * 1e9 // size)
    staging = max(_MIN_STAGING_BLOCKS, int(_STAGING_BYTES // size))
    return min(staging, max(_MIN_STAGING_BLOCKS, num_disk_slots(config, records)))


def num_disk_slots(config: Config, records: Sequence[int]) -> int:
    """Blocks of the disk tier, headers included in its size."""
    return config.disk.num_blocks or int(config.disk.cache_gb * 1e9 // disk_record_bytes(records))


def require_host_slots(config: Config, records: Sequence[int]) -> int:
    """As `num_host_slots`; CapacityError if the configured size holds none."""
    slots = num_host_slots(config, records)
    if slots < 1:
        raise CapacityError(
            f"A host tier of {config.host.cache_gb} GB is less than one block of "
            f"{host_record_bytes(records) / 1e9:.6f} GB: raise host.cache_gb "
            f"(DYN_KVBM_CPU_CACHE_GB), or unset it to run without KVBM."
        )
    return slots


def require_disk_slots(config: Config, records: Sequence[int]) -> int:
    """As `num_disk_slots`, 0 without a disk tier; CapacityError if the configured size holds none."""
    slots = num_disk_slots(config, records)
    if config.has_disk and slots < 1:
        raise CapacityError(
            f"A disk tier of {config.disk.cache_gb} GB is less than one block of "
            f"{disk_record_bytes(records) / 1e9:.6f} GB: raise disk.cache_gb "
            f"(DYN_KVBM_DISK_CACHE_GB), or unset it."
        )
    return slots


def host_record_bytes(records: Sequence[int]) -> int:
    """What a block takes in host memory, on all ranks together."""
    return sum(map(slot_bytes, records))


def disk_record_bytes(records: Sequence[int]) -> int:
    """What a block takes on disk, on all ranks together."""
    return sum(stride_of(slot_bytes(size)) for size in records)


def make_disk_tier(
    config: Config,
    host: BlockPool,
    *,
    capacity: int,
    record_bytes: int,
    ranks: int,
    ids: Iterator[int],
    drop: Callable[[Slots, Fate], None],
    estimate: LoadEstimate | None,
    groups: KvGroups | None = None,
    missed: Callable[[Hashes, Fate], None] | None = None,
) -> DiskTier:
    """The leader's half. record_bytes: see `disk_record_bytes`."""
    disk = config.disk
    unfiltered = disk.disable_filter
    if unfiltered is None:
        unfiltered = not (config.host.num_blocks or config.host.cache_gb)
    remembered = min(_FILTER_BLOCKS, max(65536, 2 * (capacity + host.capacity)))
    return DiskTier(
        host,
        BlockPool(capacity, load_policy(disk.policy, "disk.policy"), tier="disk", usable=0),
        ranks=ranks,
        ids=ids,
        drop=drop,
        groups=groups,
        missed=missed,
        limits=DiskLimits(
            max_batch_blocks=min(_BATCH_BLOCKS, config.transfer.max_batch_blocks),
            # A write keeps its host block from eviction: never all of them.
            max_queued_writes=min(disk.max_queued_blocks, max(1, host.capacity // 2)),
            max_fetched_blocks=max(1, host.capacity // 2),
            timeout_s=disk.timeout_s,
        ),
        admission=None if unfiltered else FrequencyFilter(remembered),
        budget=WriteBudget(int(disk.write_gb_per_day * 1e9 // record_bytes))
        if disk.write_gb_per_day
        else None,
        estimate=estimate if disk.skip_slow_loads else None,
    )


def start_storage(
    config: Config,
    arena: HostArena,
    *,
    num_slots: int,
    namespace: bytes,
    rank: int,
    ranks: int,
    replica: int = 0,
    split: Split | None = None,
) -> StorageClient:
    """A rank's half: its I/O process. namespace: of this rank's records, 16 bytes.

    split: then the namespace is that of any number of ranks, and what others have stored is taken over.

    replica: number of the engine among those of one deployment (data parallelism), for its own folder.
    CapacityError or ConfigError where the settings ask for what this machine does not have.
    """
    disk = config.disk
    if disk.backend != "posix" and find_spec("nixl_cu12") is None and find_spec("nixl_cu13") is None:
        raise ConfigError(
            f"disk.backend = {disk.backend!r} needs NIXL, which is not installed: pip install nixl, or set "
            f"KVBM_DISK_BACKEND=posix."
        )
    folders = [
        rank_folder(Path(folder) / f"kvbm-{replica}", rank, ranks)
        for folder in disk.dir.split(":")
        if folder.strip()
    ]
    min_free = int(disk.min_free_gb * 1e9)
    ensure_room(folders, num_slots, stride_of(arena.slot_bytes), min_free)
    for folder in filter(lies_in_memory, folders):
        logger.warning(
            "KVBM: the disk cache lies in memory: %s is no drive (DYN_KVBM_DISK_CACHE_DIR)", folder
        )
    options = Options(
        folders=[str(folder) for folder in folders],
        namespace=namespace,
        rank=rank,
        ranks=ranks,
        record_bytes=arena.record_bytes,
        slot_bytes=arena.slot_bytes,
        host_slots=arena.num_slots,
        disk_slots=num_slots,
        backend=disk.backend,
        threads=disk.threads,
        zerofill_fallback=disk.zerofill_fallback,
        o_direct=not disk.disable_o_direct,
        open_direct=disk.allocator == "open-direct",
        min_free_bytes=min_free,
        split=split,
    )
    return StorageClient(options, arena.fd)
