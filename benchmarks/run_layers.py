"""Measures fastconv against torch (cuDNN or oneDNN) over the layers of benchmarks/layers.py.

    python benchmarks/run.py layers              # the device at hand, float32, both layouts; `layers` may be left out
    python benchmarks/run.py --quick             # a selection of layers, three minutes at most
    python benchmarks/run.py --filter resnet --dtype bfloat16 --layout nhwc

Every result is checked before it is timed; if one is wrong, its row says so and the exit code is 1.
docs/performance.md says how things are measured.
"""

import argparse
import datetime
import sys
from pathlib import Path

import extras
import layers
import machine
import torch
from chart import draw
from measure import measure, timer
from report import as_dicts, console, group_table, headline, plain_table, summarize, summary_table, write_json
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from roofline import draw_roofline

ROOT = Path(__file__).resolve().parents[1]
SECONDS, ROUNDS = 1.5, (7, 200)  # for each direction of a layer in a layout
QUICK_SECONDS, QUICK_ROUNDS = 0.6, (3, 100)


def parse(arguments):
    parser = argparse.ArgumentParser(prog="run.py layers", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: the GPU, if any")
    parser.add_argument("--dtype", choices=machine.DTYPES, default="float32", help="default: float32")
    parser.add_argument("--layout", choices=("nchw", "nhwc", "both"), default="both", help="default: both")
    parser.add_argument("--filter", metavar="TEXT", default="", help="only layers whose name or group contains it")
    parser.add_argument("--quick", action="store_true", help=f"only {len(layers.QUICK)} layers, fewer repetitions")
    parser.add_argument("--out", metavar="DIR", type=Path, default=ROOT / "benchmarks" / "out",
                        help="folder for the JSON and the chart; default: benchmarks/out")  # fmt: skip
    extras.add_options(parser)
    options = parser.parse_args(arguments)
    options.layers = layers.select(options.filter, options.quick)
    if not options.layers:
        names = ", ".join(layer.name for layer in layers.select(quick=options.quick))
        parser.error(f"no layer's name or group contains {options.filter!r}. There are {names}")
    if options.dtype == "tf32" and options.device == "cpu":
        parser.error("tf32 is for GPUs")
    return options


def main(arguments):
    """Runs the benchmark of layers. Returns the exit code: 1 if something was wrong or failed."""
    options = parse(arguments)
    device = machine.choose_device(options.device)
    if options.dtype == "tf32" and device == "cpu":
        sys.exit("--dtype tf32 is for GPUs")
    machine.set_precision(options.dtype)
    torch.backends.cudnn.benchmark = True

    out = console()
    described = machine.describe(device)
    out.print(machine.title(described))
    limits = machine.limits(device, options.dtype)
    quick = ", quick" * options.quick
    out.print(
        f"{options.dtype}, {len(options.layers)} of the {len(layers.LAYERS)} layers{quick}; limits measured here: "
        f"copy {limits['copy_gb_s']:.1f} GB/s, matmul {limits['matmul_gflop_s']:.0f} GFLOP/s\n"
        f"ratio: torch's time / fastconv's, above 1 fastconv is faster; medians (and interquartile ranges)"
    )
    milliseconds = timer(device)
    rows = run(options, device, limits, milliseconds, out)
    more, failures = {}, []
    for name, found, failure in extras.measure_extras(options, device, milliseconds):
        more[name] = found
        if failure:
            failures.append(failure)
        if found:
            table = extras.TABLES[name]
            out.print()
            out.print(plain_table(table.TITLE, table.HEADER, table.lines(found)))

    summary = summarize(rows)
    result = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "title": machine.title(described),
        "machine": described,
        "settings": {"device": device, "dtype": options.dtype, "layout": options.layout, "quick": options.quick,
                     "filter": options.filter},
        "limits": limits,
        "summary": summary,
        "rows": rows,
        **more,
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    files = [options.out / f"{device}-{options.dtype}{suffix}" for suffix in (".json", ".png", "-roofline.png")]
    write_json(files[0], result)
    draw(result, files[1])
    if not draw_roofline(result, files[2]):
        del files[2]
    if summary:
        out.print()
        out.print(summary_table(summary))
        group, mean = headline(summary)
        out.print(f"\nlowest group: {group} at {mean:.2f}× of torch's speed", style="bold")
    out.print(f"written: {', '.join([str(files[0]), *(file.name for file in files[1:])])}", soft_wrap=True)
    wrong = [row for row in rows if not row["ok"]]
    if wrong:
        out.print(f"{len(wrong)} of {len(rows)} rows are WRONG or failed", style="bold red")
    for failure in failures:
        out.print(failure, style="bold red", soft_wrap=True)
    return 1 if wrong or failures else 0


def run(options, device, limits, milliseconds, out):
    """Measures the layers group by group and prints a table for each. Returns the rows as dictionaries."""
    seconds, rounds = (QUICK_SECONDS, QUICK_ROUNDS) if options.quick else (SECONDS, ROUNDS)
    rows = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as progress:
        cases = [(layer, layout) for layer in options.layers for layout in layers.layouts(layer, options.layout)]
        task = progress.add_task("", total=len(cases))
        for group in layers.GROUPS:
            found = []
            for layer, layout in cases:
                if layer.group == group:
                    progress.update(task, description=f"{layer.name} {layout}")
                    found += as_dicts(
                        measure(layer, layout, options.dtype, device, limits, milliseconds, seconds, rounds)
                    )
                    progress.advance(task)
            if found:
                out.print()
                out.print(group_table(group, found))
            rows += found
    return rows
