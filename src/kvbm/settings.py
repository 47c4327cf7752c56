"""The settings, section by section: what each is called, allows, does by default, and means."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

# A key's type says what is allowed, its `_key` all the rest.
_Priority = Annotated[int, Meta(description="an integer from 0 to 100", ge=0, le=100)]
_Flag = Annotated[bool, Meta(description="true or false")]
_Count = Annotated[int, Meta(description="an integer >= 1", ge=1)]
_Seconds = Annotated[float, Meta(description="a number > 0", gt=0)]
_Gigabytes = Annotated[float, Meta(description="a number >= 0", ge=0)]
_OptionalFlag = Annotated[Annotated[bool, Meta()] | None, Meta(description="true, false or none")]
_CopyMethod = Annotated[
    Literal["auto", "dma", "kernel", "staged"], Meta(description="auto, dma, kernel or staged")
]
_OptionalCount = Annotated[Annotated[int, Meta(ge=0)] | None, Meta(description="an integer >= 0, or none")]
_Policy = Annotated[
    str,
    Meta(
        description="lru, segmented-lru or module:Class",
        pattern=r"^(lru|segmented-lru|[A-Za-z_][\w.]*:[A-Za-z_]\w*)$",
    ),
]
_Folders = Annotated[str, Meta(description="directories, joined by `:`", pattern=r"[^:\s]")]
_Allocator = Annotated[Literal["default", "open-direct"], Meta(description="default or open-direct")]
_DiskBackend = Annotated[
    Literal["posix", "nixl-posix", "nixl-gds-mt"], Meta(description="posix, nixl-posix or nixl-gds-mt")
]
_Port = Annotated[int, Meta(description="an integer from 0 to 65535", ge=0, le=65535)]
_Text = Annotated[str, Meta(description="text")]
_OptionalText = Annotated[Annotated[str, Meta()] | None, Meta(description="text, or none")]
_EventsMode = Annotated[Literal["dedup", "passthrough"], Meta(description="dedup or passthrough")]
_OnLoadFailure = Annotated[Literal["recompute", "engine"], Meta(description="recompute or engine")]


def _key(env: str, doc: str) -> Meta:
    return Meta(description=doc, extra={"env": env})


class HostConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The tier in host memory (G2)."""

    cache_gb: Annotated[
        _Gigabytes,
        _key(
            "DYN_KVBM_CPU_CACHE_GB",
            "Size of the host cache in GB (1e9 bytes), the sum over all ranks. 0: no host cache.",
        ),
    ] = 0.0
    num_blocks: Annotated[
        _OptionalCount,
        _key(
            "DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS",
            "Exact number of blocks in the host cache. 0 or none: `host.cache_gb` decides.",
        ),
    ] = None
    policy: Annotated[
        _Policy,
        _key(
            "KVBM_HOST_POLICY", "Which block leaves a full host cache; `module:Class` names one of your own."
        ),
    ] = "lru"
    checksum: Annotated[
        _OptionalFlag,
        _key(
            "KVBM_HOST_CHECKSUM",
            "Verify the checksum of a host record before it is loaded. none: where the engine runs on CPUs, "
            "but not on GPUs, whose bus is faster than that.",
        ),
    ] = None
    offload_min_priority: Annotated[
        _Priority,
        _key(
            "DYN_KVBM_HOST_OFFLOAD_PREFIX_MIN_PRIORITY",
            "A request's blocks are offloaded up to the first whose retention priority is lower. Only "
            "TensorRT-LLM gives blocks priorities; 35 is its default.",
        ),
    ] = 0


class DiskConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The tier on local disks (G3)."""

    cache_gb: Annotated[
        _Gigabytes,
        _key(
            "DYN_KVBM_DISK_CACHE_GB",
            "Size of the disk cache in GB (1e9 bytes), the sum over all ranks and directories. 0: no disk "
            "cache. Without a host cache, blocks pass through a small one of at most 1 GB.",
        ),
    ] = 0.0
    num_blocks: Annotated[
        _OptionalCount,
        _key(
            "DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS",
            "Exact number of blocks in the disk cache. 0 or none: `disk.cache_gb` decides.",
        ),
    ] = None
    dir: Annotated[
        _Folders,
        _key(
            "DYN_KVBM_DISK_CACHE_DIR",
            "Where the files are kept, in a folder `kvbm-N` for data-parallel rank N. Several directories, "
            "on drives of their own, share the blocks equally.",
        ),
    ] = "/tmp"
    disable_filter: Annotated[
        _OptionalFlag,
        _key(
            "DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER",
            "Write every block to disk, not only those seen at least twice. none: with the filter, but "
            "without where there is no host cache.",
        ),
    ] = None
    write_gb_per_day: Annotated[
        _Gigabytes,
        _key(
            "KVBM_DISK_WRITE_GB_PER_DAY",
            "Most GB written in any 24 hours, the sum over all ranks, counted from the engine's start. 0: no "
            "limit.",
        ),
    ] = 0.0
    min_free_gb: Annotated[
        _Gigabytes,
        _key("KVBM_DISK_MIN_FREE_GB", "GB that each drive keeps free beside the cache."),
    ] = 1.0
    zerofill_fallback: Annotated[
        _Flag,
        _key(
            "DYN_KVBM_DISK_ZEROFILL_FALLBACK",
            "Where the file system has no fallocate, fill the files with zeros at start; otherwise they are "
            "sparse there, and room may lack later.",
        ),
    ] = False
    disable_o_direct: Annotated[
        _Flag,
        _key(
            "DYN_KVBM_DISK_DISABLE_O_DIRECT",
            "Read and write through the page cache. Done in any case where O_DIRECT is not to be had.",
        ),
    ] = False
    allocator: Annotated[
        _Allocator,
        _key(
            "DYN_KVBM_DISK_ALLOCATOR_TYPE",
            "open-direct: ask for O_DIRECT when a file is opened; default: afterwards, which some file "
            "systems ignore.",
        ),
    ] = "default"
    policy: Annotated[
        _Policy,
        _key(
            "KVBM_DISK_POLICY", "Which block leaves a full disk cache; `module:Class` names one of your own."
        ),
    ] = "segmented-lru"
    backend: Annotated[
        _DiskBackend,
        _key(
            "KVBM_DISK_BACKEND",
            "What reads and writes: calls of the kernel (posix), or a plugin of NIXL, which has to be "
            "installed (1.5.0 or later).",
        ),
    ] = "posix"
    threads: Annotated[
        _Count,
        _key("KVBM_DISK_THREADS", "Records that a rank reads at once; of 8 at most 6 are written at once."),
    ] = 8
    max_queued_blocks: Annotated[
        _Count,
        _key(
            "KVBM_DISK_MAX_QUEUED_BLOCKS",
            "Most blocks that wait to be written; those beyond it are dropped, never delayed.",
        ),
    ] = 1024
    timeout_s: Annotated[
        _Seconds,
        _key("KVBM_DISK_TIMEOUT_S", "Seconds that one operation may take; after them a load is a miss."),
    ] = 10.0
    exchange: Annotated[
        _Flag,
        _key(
            "KVBM_DISK_EXCHANGE",
            "Keep records in a form that does not depend on the engine, so that vLLM and SGLang find each "
            "other's of the same model. Where that can't be, an engine's records stay its own.",
        ),
    ] = False
    skip_slow_loads: Annotated[
        _Flag,
        _key(
            "KVBM_DISK_SKIP_SLOW_LOADS",
            "Read only what is had sooner from disk than by computing it again, as measured.",
        ),
    ] = True


class TransferConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How blocks move between tiers."""

    max_concurrent: Annotated[
        _Count,
        _key(
            "DYN_KVBM_MAX_CONCURRENT_TRANSFERS",
            "Most operations that a worker executes at once in each direction; half the CPU cores are the "
            "limit in any case.",
        ),
    ] = 4
    max_batch_blocks: Annotated[
        _Count, _key("DYN_KVBM_MAX_TRANSFER_BATCH_SIZE", "Most blocks that one offload operation copies.")
    ] = 128
    copy_method: Annotated[
        _CopyMethod,
        _key(
            "KVBM_TRANSFER_COPY_METHOD",
            "How a GPU's blocks are copied: by its copy engines piece by piece (dma), by a kernel over "
            "pinned memory (kernel), or packed in device memory and then copied (staged). auto: what is "
            "best on this device, measured at the first start and kept in ~/.cache/kvbm.",
        ),
    ] = "auto"
    max_queued_blocks: Annotated[
        _Count,
        _key(
            "KVBM_TRANSFER_MAX_QUEUED_BLOCKS",
            "Most blocks that wait to be offloaded; those beyond it are dropped, never delayed.",
        ),
    ] = 4096
    timeout_s: Annotated[
        _Seconds,
        _key("KVBM_TRANSFER_TIMEOUT_S", "Seconds that one operation may take; after them a load is a miss."),
    ] = 30.0


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How KVBM lives with the engine."""

    init_timeout_s: Annotated[
        _Seconds,
        _key(
            "DYN_KVBM_LEADER_WORKER_INIT_TIMEOUT_SECS",
            "Seconds that the leader waits at start-up until every worker is ready.",
        ),
    ] = 1800.0
    allow_untested: Annotated[
        _Flag,
        _key("KVBM_ALLOW_UNTESTED_ENGINE", "Start with an engine version outside the supported range."),
    ] = False
    load_failure_policy: Annotated[
        _OnLoadFailure,
        _key(
            "KVBM_LOAD_FAILURE_POLICY",
            "When a block fails to load. recompute: KVBM sets vLLM's `kv_load_failure_policy` to "
            "recompute; engine: the engine's own setting stays.",
        ),
    ] = "recompute"


class ObserveConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What users can see of the cache, and how."""

    metrics: Annotated[
        _Flag,
        _key(
            "DYN_KVBM_METRICS",
            "Serve Prometheus metrics, a page for people, explanations of misses, and administration.",
        ),
    ] = False
    port: Annotated[
        _Port,
        _key(
            "DYN_KVBM_METRICS_PORT",
            "Port of that server; where it is taken, the next free one, which is logged. 0: any.",
        ),
    ] = 6880
    host: Annotated[
        _Text,
        _key(
            "KVBM_METRICS_HOST",
            "Address that it listens on. `/metrics` answers everybody; all else this machine only, or who "
            "has the token.",
        ),
    ] = "0.0.0.0"
    admin_token: Annotated[
        _OptionalText,
        _key(
            "KVBM_ADMIN_TOKEN", "What a client from another machine has to send as `Authorization: Bearer`."
        ),
    ] = None
    max_requests: Annotated[
        _Count,
        _key(
            "DYN_KVBM_CACHE_STATS_MAX_REQUESTS",
            "The last finished requests: hit rates are theirs, and they can be explained.",
        ),
    ] = 1000
    log_interval_s: Annotated[
        _Seconds,
        _key("DYN_KVBM_CACHE_STATS_LOG_INTERVAL_SECS", "Seconds between two log lines with the hit rates."),
    ] = 5.0
    log_json: Annotated[
        _Flag, _key("DYN_LOGGING_JSONL", "Log lines of KVBM as JSON, one object a line, on standard error.")
    ] = False
    history_blocks: Annotated[
        _Count,
        _key(
            "KVBM_OBSERVE_HISTORY_BLOCKS",
            "Blocks that left a tier, or did not get into it, of which the reason is remembered.",
        ),
    ] = 262144
    record: Annotated[
        _Flag,
        _key(
            "DYN_KVBM_ENABLE_RECORD",
            "Record hashes and lengths of all requests (no text, no tokens) for `kvbm simulate`.",
        ),
    ] = False
    record_file: Annotated[
        _Text,
        _key("KVBM_RECORD_FILE", "File of that record, JSON lines; a second engine appends its number."),
    ] = "/tmp/kvbm-trace.jsonl"
    record_max_mb: Annotated[_Gigabytes, _key("KVBM_RECORD_MAX_MB", "The record ends at so many MB.")] = 256.0
    events: Annotated[
        _Flag,
        _key(
            "DYN_KVBM_KV_EVENTS_ENABLE_CONSOLIDATOR",
            "Where the engine publishes KV events, publish those of KVBM's tiers in the same stream.",
        ),
    ] = True
    events_mode: Annotated[
        _EventsMode,
        _key(
            "DYN_KVBM_KV_EVENTS_CONSOLIDATOR_MODE",
            "dedup: a block is stored when the first tier has it and removed when the last loses it; "
            "passthrough: every tier speaks for itself.",
        ),
    ] = "dedup"
