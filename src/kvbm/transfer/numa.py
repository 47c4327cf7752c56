"""Where a device sits in the machine."""

import os
from pathlib import Path


def cpus_near(pci_address: str, root: Path = Path("/")) -> set[int]:
    """CPUs of the NUMA node of a PCI device ("0000:05:00.0") that this process may use.

    Empty where there is no such node, or none of its CPUs is allowed: then any place is as good.
    """
    try:
        node = int((root / f"sys/bus/pci/devices/{pci_address.lower()}/numa_node").read_text())
        listed = (root / f"sys/devices/system/node/node{node}/cpulist").read_text().strip()
        cpus: set[int] = set()
        for part in listed.split(","):
            first, _, last = part.partition("-")
            cpus.update(range(int(first), int(last or first) + 1))
    except (OSError, ValueError):
        return set()
    return cpus & os.sched_getaffinity(0)
