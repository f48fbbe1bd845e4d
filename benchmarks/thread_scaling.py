"""How a CPU's threads are used: forward and backward of a layer by 1, 2, 4, … and all of them."""

from dataclasses import asdict

import layers
import torch
from measure import LIBRARIES, steps, time_in_turn
from report import milliseconds as shown
from report import times

TITLE = "threads: forward and backward together, and the speed over that of one"
HEADER = ("layer, layout", "threads", "fastconv ms (IQR)", "speed", "torch ms (IQR)", "speed")


def counts(largest):
    """1, 2, 4, … and the largest."""
    return sorted({largest, *(2**i for i in range(largest.bit_length()))} - {0}) if largest > 0 else []


def measure_threads(chosen, layout, dtype, milliseconds, seconds=1.0, rounds=(3, 50), largest=None):
    """A row for each layer and number of threads: the libraries' Timings."""
    before = torch.get_num_threads()
    rows = []
    try:
        for layer in chosen:
            calls = steps(layer, "cpu", dtype, layout)
            for threads in counts(largest or before):
                torch.set_num_threads(threads)
                timings = time_in_turn(calls, milliseconds, seconds, rounds)
                row = {"layer": layer.name, "layout": layers.layouts(layer, layout)[0], "threads": threads}
                rows.append(row | {library: asdict(timings[library]) for library in LIBRARIES})
    finally:
        torch.set_num_threads(before)
    return rows


def lines(rows):
    alone = {row["layer"]: row for row in rows if row["threads"] == 1}
    found = []
    for row in rows:
        cells = [f"{row['layer']} {row['layout']}", str(row["threads"])]
        for library in LIBRARIES:
            speed = alone[row["layer"]][library]["median"] / row[library]["median"]
            cells += [shown(row[library]), times(speed)]
        found.append(cells)
    return found
