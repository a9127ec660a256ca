"""CPU time of processes and of the machine, from /proc."""

from __future__ import annotations

import os
from pathlib import Path

TICK = os.sysconf("SC_CLK_TCK")


def machine() -> float:
    """Return the seconds that the cores have worked, without those that the host took away."""
    user, nice, system, _, _, interrupts, soft, *_ = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    )
    return (user + nice + system + interrupts + soft) / TICK


def tree(process: int) -> float:
    """Return the seconds of a process and its children, also of those that it has waited for."""
    parents: dict[int, int] = {}
    seconds: dict[int, float] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            parents[int(entry.name)] = int(fields[1])
            seconds[int(entry.name)] = sum(map(int, fields[11:15])) / TICK
    total, below = 0.0, [process]
    while below:
        one = below.pop()
        total += seconds.get(one, 0.0)
        below += [child for child, parent in parents.items() if parent == one]
    return total
