"""Reads what nvcc and ptxas said while building the CUDA kernels, and fails on a warning or a register spill.

The build leaves one log beside each object: build/ninja/cuda/<file>.o.log. kernel_table.py shows what they say of the
kernels.
"""

import re
import sys
from pathlib import Path

LOGS = Path(__file__).resolve().parent.parent / "build" / "ninja" / "cuda"
ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
SPILL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")


def read(log):
    """The complaints of one log, and its kernels as (name, architecture, registers, stack bytes, spilled bytes)."""
    complaints, kernels, entry, stack, stores, loads = [], [], None, 0, 0, 0
    for line in log.read_text().splitlines():
        if match := ENTRY.search(line):
            entry = match.groups()
        elif match := SPILL.search(line):
            stack, stores, loads = map(int, match.groups())
            if stores or loads:
                complaints.append(f"{log.stem}: {' '.join(entry)}: {line.strip()}")
        elif (match := USED.search(line)) and entry:
            kernels.append((*entry, int(match.group(1)), stack, stores + loads))
        elif re.search(r"\bwarning\b|\(C75\d\d\)", line, re.IGNORECASE):
            complaints.append(f"{log.stem}: {line.strip()}")
    return complaints, kernels


def main():
    logs = sorted(LOGS.glob("*.o.log"))
    if not logs:
        sys.exit(f"no compiler reports in {LOGS}: the CUDA kernels were not built")
    complaints, kernels = [], []
    for log in logs:
        found, compiled = read(log)
        complaints += found
        kernels += compiled
    print(*complaints, sep="\n")
    print(f"{len(kernels)} kernels in {len(logs)} files compiled, {len(complaints)} complaints")
    sys.exit(bool(complaints) or not kernels)


if __name__ == "__main__":
    main()
