"""`kvbm simulate`: the hit rates that other tier sizes and policies would have had."""

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kvbm.cli.output import print_json, print_table, size
from kvbm.cli.simulate_plot import check, draw
from kvbm.errors import TraceError, UsageError
from kvbm.settings import DiskConfig, HostConfig

# They bring numpy, for which the other commands should not have to wait.
if TYPE_CHECKING:
    from kvbm.logic.simulation import Ceiling, Request, Result, Tiers
    from kvbm.observe.trace import Trace

# Where no size of the host tier is asked for: parts of what an infinite cache would hold.
_PARTS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
# What a disk tier gets that has no host cache above it, as in `runtime.disk.num_host_slots`.
_STAGING_BYTES = 1e9
_MIN_STAGING_BLOCKS = 16

_DESCRIPTION = """\
Replays the requests of a trace against tiers of other sizes and policies, and shows the share of the prompts'
tokens that each would have had. TRACE is a file recorded with DYN_KVBM_ENABLE_RECORD=1, or one in the format
of Mooncake's public traces. docs/simulate.md says what the model leaves out.
"""
_EXAMPLES = """\
examples:
  kvbm simulate /tmp/kvbm-trace.jsonl
  kvbm simulate /tmp/kvbm-trace.jsonl --host-gb 10,40,160 --policy lru,segmented-lru --plot hits.svg
  kvbm simulate mooncake.jsonl --block-mib 64 --host-gb 100 --disk-gb 0,1000,4000
"""


class Case(NamedTuple):
    """One arrangement of tiers and what came of it. staging: the host tier only serves the disk."""

    tiers: "Tiers"
    staging: bool
    result: "Result"

    @property
    def host_blocks(self) -> int:
        return 0 if self.staging else self.tiers.host_blocks


class Outcome(NamedTuple):
    """All that there is to show. block_bytes: None if unknown."""

    trace: Path
    requests: "list[Request]"
    block_size: int
    block_bytes: int | None
    ceiling: "Ceiling"
    cases: list[Case]

    def size(self, blocks: int) -> str:
        if not blocks:
            return "none"
        return size(blocks * self.block_bytes) if self.block_bytes else f"{blocks:,} blocks"

    @property
    def best(self) -> float:
        """Hit rate of an infinite cache."""
        return self.cases[0].result.rate(self.ceiling.hits)


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "simulate",
        help="the hit rates that other sizes and policies would have had",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("trace", metavar="TRACE", help="a file of JSON lines")
    for tier in ("host", "disk"):
        sizes = parser.add_mutually_exclusive_group()
        sizes.add_argument(
            f"--{tier}-gb", type=_list_of(_amount), metavar="N,...", help=f"sizes of the {tier} tier in GB"
        )
        sizes.add_argument(
            f"--{tier}-blocks", type=_list_of(_count), metavar="N,...", help="the same in blocks"
        )
    parser.add_argument(
        "--device-blocks",
        type=_count,
        default=0,
        metavar="N",
        help="blocks that the engine keeps in device memory by itself (default 0)",
    )
    memory = parser.add_mutually_exclusive_group()
    memory.add_argument(
        "--block-bytes",
        type=_positive,
        metavar="N",
        help="what a block takes on all ranks together; sizes in GB need it where the trace does not say",
    )
    memory.add_argument("--block-mib", type=_amount, metavar="N", help="the same in MiB")
    parser.add_argument(
        "--block-size",
        type=_positive,
        metavar="TOKENS",
        help="tokens in a block, where the trace does not say (default 512, Mooncake's)",
    )
    parser.add_argument(
        "--policy",
        type=_list_of(str),
        default=[HostConfig().policy],
        metavar="NAME,...",
        help=f"eviction of the host tier: lru, segmented-lru or module:Class (default {HostConfig().policy})",
    )
    parser.add_argument(
        "--disk-policy",
        default=DiskConfig().policy,
        metavar="NAME",
        help=f"eviction of the disk tier (default {DiskConfig().policy})",
    )
    parser.add_argument(
        "--no-filter",
        action="store_true",
        help="write every block to disk, not only those seen twice; the default where there is no host tier",
    )
    parser.add_argument("--limit", type=_positive, metavar="N", help="only the first N requests")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw an image: .svg, .png or .pdf")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from kvbm.logic.policies import load_policy
    from kvbm.logic.simulation import ceiling
    from kvbm.observe.trace import read_trace

    for name in args.policy:
        load_policy(name, "--policy")
    load_policy(args.disk_policy, "--disk-policy")
    if args.plot is not None:
        check(args.plot)
    trace = read_trace(args.trace, args.block_size)
    requests = sorted(itertools.islice(trace, args.limit), key=lambda request: request.time_s)
    if not any(request.input_tokens for request in requests):
        raise TraceError(f"{trace.path} holds no requests: record some first, or name another file.")
    block_bytes = _block_bytes(args, trace)
    top = ceiling(requests, trace.block_size)
    host_sizes = _sizes(args.host_gb, args.host_blocks, block_bytes)
    if host_sizes is None:
        host_sizes = sorted({max(1, round(part * top.blocks)) for part in _PARTS})
    disk_sizes = _sizes(args.disk_gb, args.disk_blocks, block_bytes) or [0]
    plans = [
        _arrange(args, policy, host, disk, block_bytes)
        for policy, disk, host in itertools.product(args.policy, disk_sizes, host_sizes)
    ]
    cases = _replay(plans, requests, trace.block_size, 2 * top.blocks + _MIN_STAGING_BLOCKS)
    outcome = Outcome(trace.path, requests, trace.block_size, block_bytes, top, cases)
    if args.json:
        print_json(_as_json(outcome))
    else:
        _print(outcome)
    if args.plot is not None:
        draw(outcome, args.plot)
    return 0


# ---- what is asked ----


def _block_bytes(args: argparse.Namespace, trace: "Trace") -> int | None:
    asked = args.block_bytes or (int(args.block_mib * (1 << 20)) if args.block_mib else None)
    block_bytes = asked or trace.block_bytes
    if block_bytes is None and (args.host_gb is not None or args.disk_gb is not None):
        raise UsageError(
            f"{trace.path} does not say what a block takes: add --block-bytes or --block-mib, or give sizes "
            f"in blocks. Llama-3.1-8B in bf16, for example, takes 128 KiB a token: a block of "
            f"{trace.block_size} tokens {trace.block_size / 8:g} MiB."
        )
    return block_bytes


def _sizes(
    gigabytes: list[float] | None, blocks: list[int] | None, block_bytes: int | None
) -> list[int] | None:
    """In blocks; None where nothing was asked for."""
    if gigabytes is not None and block_bytes:
        return [int(amount * 1e9 // block_bytes) for amount in gigabytes]
    return blocks


def _arrange(
    args: argparse.Namespace, policy: str, host: int, disk: int, block_bytes: int | None
) -> tuple["Tiers", bool]:
    """The tiers that an engine of these sizes has, and whether the host tier only serves the disk."""
    from kvbm.logic.simulation import Tiers

    staging = disk > 0 and not host
    if staging:
        if block_bytes is None:
            raise UsageError(
                "Without a host tier, blocks pass through 1 GB of memory on their way to disk: say with "
                "--block-bytes or --block-mib how many those are, or give the host tier a size."
            )
        host = min(
            max(_MIN_STAGING_BLOCKS, int(_STAGING_BYTES // block_bytes)), max(_MIN_STAGING_BLOCKS, disk)
        )
    tiers = Tiers(
        device_blocks=args.device_blocks,
        host_blocks=host,
        host_policy=policy,
        disk_blocks=disk,
        disk_policy=args.disk_policy,
        disk_filter=not (args.no_filter or staging),
    )
    return tiers, staging


def _list_of(parse: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: [parse(part.strip()) for part in text.split(",")]


def _amount(text: str) -> float:
    return _number(text, float, 0, "a number >= 0")


def _count(text: str) -> int:
    return _number(text, int, 0, "an integer >= 0")


def _positive(text: str) -> int:
    return _number(text, int, 1, "an integer >= 1")


def _number(text: str, type_: Callable[[str], Any], least: int, what: str) -> Any:
    try:
        number = type_(text)
    except ValueError:
        number = -1
    if not least <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return number


# ---- the work ----


def _replay(
    plans: Sequence[tuple["Tiers", bool]], requests: "list[Request]", block_size: int, most: int
) -> list[Case]:
    """most: blocks of a tier beyond which nothing changes: it never evicts, nor meets one of its bounds."""
    from kvbm.logic.simulation import Simulation

    cases = []
    with _progress(len(plans) * len(requests)) as bar:
        for tiers, staging in plans:
            simulation = Simulation(
                replace(
                    tiers,
                    device_blocks=min(tiers.device_blocks, most),
                    host_blocks=min(tiers.host_blocks, most),
                    disk_blocks=min(tiers.disk_blocks, most),
                ),
                block_size,
            )
            for request in requests:
                simulation.replay(request)
                bar.update()
            cases.append(Case(tiers, staging, simulation.result))
    return cases


class _NoBar:
    def __enter__(self) -> "_NoBar":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self) -> None:
        pass


def _progress(total: int) -> Any:
    """A bar of tqdm's, where somebody sees it and tqdm is there."""
    if not sys.stderr.isatty():
        return _NoBar()
    try:
        return import_module("tqdm").tqdm(total=total, unit=" requests", leave=False, delay=1)
    except ModuleNotFoundError:
        return _NoBar()


# ---- what is shown ----


def _as_json(outcome: Outcome) -> dict[str, Any]:
    return {
        "trace": str(outcome.trace),
        "requests": len(outcome.requests),
        "block_size": outcome.block_size,
        "block_bytes": outcome.block_bytes,
        "infinite_cache": {
            "hit_rate": outcome.best,
            "hits": outcome.ceiling.hits,
            "blocks": outcome.ceiling.blocks,
        },
        "results": [
            {
                **asdict(case.tiers),
                "staging": case.staging,
                "hit_rate": case.result.rate(case.result.hits),
                **asdict(case.result),
                "misses": case.result.misses,
                "missed_tokens": case.result.missed_tokens,
            }
            for case in outcome.cases
        ],
    }


def _print(outcome: Outcome) -> None:
    requests, first = outcome.requests, outcome.cases[0].result
    minutes = (requests[-1].time_s - requests[0].time_s) / 60
    print(
        f"{outcome.trace}: {len(requests):,} requests in {minutes:,.1f} minutes, "
        f"{first.input_tokens:,} tokens of prompts in blocks of {outcome.block_size}.\n"
        f"A cache of infinite size would hold {outcome.ceiling.blocks:,} blocks at the end and have had "
        f"{outcome.best:.1%} of the tokens.\n"
    )
    _print_table(outcome)
    if outcome.best > 0:
        _print_bars(outcome)


def _labels(outcome: Outcome) -> list[tuple[str, ...]]:
    """Of each case: host size, disk size if there are any, policy."""
    with_disk = any(case.tiers.disk_blocks for case in outcome.cases)
    hosts = _right([outcome.size(case.host_blocks) for case in outcome.cases])
    disks = _right([outcome.size(case.tiers.disk_blocks) for case in outcome.cases])
    return [
        (host, disk, case.tiers.host_policy) if with_disk else (host, case.tiers.host_policy)
        for host, disk, case in zip(hosts, disks, outcome.cases, strict=True)
    ]


def _right(texts: list[str]) -> list[str]:
    width = max(map(len, texts))
    return [text.rjust(width) for text in texts]


def _print_table(outcome: Outcome) -> None:
    with_disk = any(case.tiers.disk_blocks for case in outcome.cases)
    with_device = any(case.tiers.device_blocks for case in outcome.cases)
    header = ["host", *(["disk"] if with_disk else []), "policy", "hit rate"]
    header += ["of device"] if with_device else []
    header += ["of host", *(["of disk"] if with_disk else []), "evicted blocks"]
    header += ["written to disk"] if with_disk else []
    rows = []
    for case, label in zip(outcome.cases, _labels(outcome), strict=True):
        result = case.result
        row: list[Any] = [*label, _percent(result.rate(result.hits))]
        row += [_percent(result.rate(result.device_hits))] if with_device else []
        row.append(_percent(result.rate(result.host_hits)))
        row += [_percent(result.rate(result.disk_hits))] if with_disk else []
        row.append(result.host_evictions)
        row += [result.disk_writes] if with_disk else []
        rows.append(row)
    print_table(header, rows)


def _percent(rate: float) -> str:
    return f"{rate:.1%}"


def _print_bars(outcome: Outcome) -> None:
    width = 50
    tiers = {"#": "device", "=": "host", "+": "disk"}
    shares = [
        [case.result.rate(hits) / outcome.best for hits in _hits_by_tier(case.result)]
        for case in outcome.cases
    ]
    seen = [f"{mark} {name}" for i, (mark, name) in enumerate(tiers.items()) if any(s[i] for s in shares)]
    print(f"\nHit rate ({', '.join(seen) or 'none'}); full width: the infinite cache, {outcome.best:.1%}")
    label_width = max(len("  ".join(label)) for label in _labels(outcome))
    for case, label, parts in zip(outcome.cases, _labels(outcome), shares, strict=True):
        ends = [round(end * width) for end in itertools.accumulate(parts, initial=0.0)]
        bar = "".join(
            mark * (end - start) for mark, (start, end) in zip(tiers, itertools.pairwise(ends), strict=True)
        )
        rate = _percent(case.result.rate(case.result.hits))
        print(f"{'  '.join(label):<{label_width}} |{bar:<{width}}| {rate:>6}")


def _hits_by_tier(result: "Result") -> tuple[int, int, int]:
    return result.device_hits, result.host_hits, result.disk_hits
