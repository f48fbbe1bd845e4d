"""What the first call of a new shape costs: the first forward and backward over the median of the next ones.

The layer's own shape is called before, so that kernels are loaded; the shapes then differ in H alone.
"""

import statistics
from dataclasses import replace

from measure import LIBRARIES, steps
from report import three_digits, times

TITLE = "first call of a new shape, forward and backward together"
HEADER = ("layer, layout", "fastconv first ms", "next ms", "ratio", "torch first ms", "next ms", "ratio")
CALLS = 6  # of each shape


def one_of_each_group(chosen):
    """The first layer of each group, of those that have pixels."""
    found = {}
    for layer in chosen:
        if layer.H:
            found.setdefault(layer.group, layer)
    return list(found.values())


def measure_first_calls(chosen, layout, dtype, device, milliseconds, shapes=8):
    """A row for each layer: the medians over the shapes of the first call's ms, the next ones', and their ratio."""
    rows = []
    for layer in chosen:
        readings = {library: [] for library in LIBRARIES}
        for i in range(shapes + 1):
            for library, call in steps(replace(layer, H=layer.H + i), device, dtype, layout).items():
                first, *later = (milliseconds(call) for _ in range(CALLS))
                if i:
                    readings[library].append((first, statistics.median(later)))
        row = {"layer": layer.name, "layout": layout.upper()}
        for library, pairs in readings.items():
            row[library] = {
                "first_ms": statistics.median(first for first, _ in pairs),
                "next_ms": statistics.median(later for _, later in pairs),
                "ratio": statistics.median(first / later for first, later in pairs),
            }
        rows.append(row)
    return rows


def lines(rows):
    def cells(found):
        return [three_digits(found["first_ms"]), three_digits(found["next_ms"]), times(found["ratio"])]

    return [
        [f"{row['layer']} {row['layout']}", *(cell for library in LIBRARIES for cell in cells(row[library]))]
        for row in rows
    ]
