"""The image of `kvbm simulate`, by matplotlib, which is not one of our dependencies."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from kvbm.errors import KvbmError, UsageError

if TYPE_CHECKING:
    from kvbm.cli.simulate import Case, Outcome

_FORMATS = (".svg", ".png", ".pdf")


def check(path: Path) -> None:
    """KvbmError if no image can be drawn there."""
    if path.suffix not in _FORMATS:
        raise UsageError(f"--plot {path}: the name has to end in {', '.join(_FORMATS)}.")
    if not path.parent.is_dir():
        raise UsageError(f"--plot {path}: there is no directory {path.parent}; make it, or name another.")
    if find_spec("matplotlib") is None:
        raise KvbmError("--plot needs matplotlib: pip install matplotlib, or leave --plot out.")


def draw(outcome: "Outcome", path: Path) -> None:
    """A curve for each policy, and for each size of the other tier. KvbmError if it can't be written."""
    from matplotlib.figure import Figure

    # The tier that was asked for in more sizes is the axis.
    hosts = {case.host_blocks for case in outcome.cases}
    disks = {case.tiers.disk_blocks for case in outcome.cases}
    across = "disk" if len(disks) > len(hosts) else "host"
    unit = outcome.block_bytes / 1e9 if outcome.block_bytes else 1

    def sizes(case: "Case") -> tuple[int, int]:
        own, other = case.host_blocks, case.tiers.disk_blocks
        return (other, own) if across == "disk" else (own, other)

    curves: dict[str, list[tuple[float, float]]] = {}
    for case in outcome.cases:
        own, other = sizes(case)
        name = case.tiers.host_policy
        if len(hosts) > 1 and len(disks) > 1:
            name += f", {'host' if across == 'disk' else 'disk'} {outcome.size(other)}"
        curves.setdefault(name, []).append((own * unit, 100 * case.result.rate(case.result.hits)))
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, points in curves.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    axes.axhline(100 * outcome.best, color="grey", linestyle="--", label="infinite cache")
    places = {x for points in curves.values() for x, _ in points}
    if 0 not in places:
        axes.set_xscale("log")
    elif len(places) > 1:  # a logarithm has no zero
        axes.set_xscale("symlog", linthresh=min(places - {0}))
        axes.set_xlim(left=0)
    axes.set_xlabel(f"size of the {across} tier, {'GB' if outcome.block_bytes else 'blocks'}")
    axes.set_ylabel("hit rate, % of prompt tokens")
    axes.set_ylim(bottom=0)
    axes.set_title(outcome.trace.name)
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path)
    except OSError as error:
        raise KvbmError(
            f"{path} can't be written: {error.strerror}. Name another file with --plot."
        ) from None
