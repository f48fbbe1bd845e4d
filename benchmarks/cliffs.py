"""Looks for cliffs: sizes that cost much more a multiply-add (or a byte, in pooling and BatchNorm) than the next ones.

    python benchmarks/run.py layers --cliffs                                          # around every layer
    python benchmarks/cliffs.py [--filter resnet.3x3] [--reach 4] [--layout nhwc]     # wider, around a few

N, C and K are swept around each layer, C and K by whole groups; forward and backward are timed together. fastconv's
worst step should stay below 1.5×; cliffs.py exits with 1 beyond it.
"""

import argparse
import itertools
import sys
from dataclasses import replace
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import layers  # noqa: E402
import machine  # noqa: E402
from measure import LIBRARIES, steps, time_in_turn, timer  # noqa: E402
from report import console, plain_table, times  # noqa: E402

BOUND = 1.5
TITLE = "cliffs: the dearest step from a size to the next"
HEADER = ("layer, layout", "fastconv", "at", "torch", "at")


def with_images(layer, batch):
    return replace(layer, batches=(batch, batch))


def sweep(layer, batch, reach):
    """{axis: {size: layer}} of the sizes up to `reach` steps away that are there. A depthwise layer stays one."""
    steps = range(-reach, reach + 1)
    found = {"N": {batch + i: with_images(layer, batch + i) for i in steps if batch + i > 0}}
    layer = with_images(layer, batch)
    groups = getattr(layer, "groups", 1)
    if groups == layer.C > 1:
        channels = {layer.C + i: {"C": layer.C + i, "K": layer.K + i, "groups": groups + i} for i in steps}
    else:
        channels = {layer.C + i * groups: {"C": layer.C + i * groups} for i in steps}
        if hasattr(layer, "K"):
            filters = [layer.K + i * groups for i in steps]
            found["K"] = {k: replace(layer, K=k) for k in filters if k > 0}
    found["C"] = {c: replace(layer, **changed) for c, changed in channels.items() if c > 0}
    return found


def work(layer, batch, element):
    """What the ms are divided by: multiply-adds, or the least bytes where there are none."""
    directions = layers.PASSES
    if layer.unit == "GFLOP/s":
        return sum(layer.flops(direction, batch) for direction in directions) / 2
    return sum(layer.least_bytes(direction, batch, element) for direction in directions)


def worst_step(measured):
    """(the dearest step, from which size to which) of {axis: {size: (ms, work)}}. Up, a step is the ratio of costs, ms
    a unit of work; down, that of the ms themselves: less work may cost more a unit, but no more in all."""
    found = [(1.0, "–")]
    for axis, by_size in measured.items():
        for (size, (ms, units)), (larger, (larger_ms, larger_units)) in itertools.pairwise(sorted(by_size.items())):
            found.append(((larger_ms / larger_units) / (ms / units), f"{axis} {size} → {larger}"))
            found.append((ms / larger_ms, f"{axis} {larger} → {size}"))
    return max(found)


def measure_cliffs(chosen, layout, dtype, device, milliseconds, seconds=1.5, rounds=(3, 50), reach=2):
    """A row for each layer: both libraries' dearest step, and where."""
    element = machine.DTYPES[dtype].itemsize
    rows = []
    for layer in chosen:
        batch = layer.batch(device)
        measured = {library: {} for library in LIBRARIES}
        for axis, sizes in sweep(layer, batch, reach).items():
            calls = {}
            for size, neighbour in sizes.items():
                made = steps(neighbour, device, dtype, layout)
                calls |= {(library, size): call for library, call in made.items()}
            timings = time_in_turn(calls, milliseconds, seconds, rounds)
            for (library, size), timing in timings.items():
                units = work(sizes[size], sizes[size].batch(device), element)
                measured[library].setdefault(axis, {})[size] = timing.median, units
        row = {"layer": layer.name, "layout": layers.layouts(layer, layout)[0]}
        for library in LIBRARIES:
            ratio, where = worst_step(measured[library])
            row[library] = {"ratio": ratio, "step": where}
        rows.append(row)
    return rows


def lines(rows):
    return [
        [f"{row['layer']} {row['layout']}"]
        + [cell for library in LIBRARIES for cell in (times(row[library]["ratio"]), row[library]["step"])]
        for row in rows
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=machine.DTYPES, default="float32")
    parser.add_argument("--layout", choices=("nchw", "nhwc"), default="nchw")
    parser.add_argument("--filter", metavar="TEXT", default="", help="only layers whose name or group contains it")
    parser.add_argument("--reach", type=int, default=2, help="steps away from the layer's sizes; default: 2")
    options = parser.parse_args()
    device = machine.choose_device(options.device)
    machine.set_precision(options.dtype)
    chosen = layers.select(options.filter)
    out = console()
    out.print(machine.title(machine.describe(device)))
    rows = measure_cliffs(chosen, options.layout, options.dtype, device, timer(device), reach=options.reach)
    out.print(plain_table(TITLE, HEADER, lines(rows)))
    worst = max((row["fastconv"]["ratio"] for row in rows), default=1.0)
    out.print(f"fastconv's worst step: {worst:.2f}×, bound {BOUND}×")
    return 1 if worst > BOUND else 0


if __name__ == "__main__":
    sys.exit(main())
