"""Measures whole networks, fastconv against torch, in inference and in training.

    python benchmarks/run.py models                        # inference of all networks, training of some
    python benchmarks/run.py models --quick                # three small ones, small batches
    python benchmarks/run.py models --filter resnet,vgg --layout nhwc
    python benchmarks/run.py models --train all --no-compile

Every variant is checked before it is timed; if one is wrong, its row says so and the exit code is 1. For networks that
are trained, tables follow of how a step's time is divided and of its peak memory, and at the end whether the number of
operations predicts the time of an inference.
"""

import argparse
import datetime
from pathlib import Path

import machine
import model_memory
import models
import operations
import torch
from measure import timer
from models import COMPILED, EAGER, FUSED, NETWORKS, OURS, PARTS, TRAINING, VARIANTS
from report import console, geomean, milliseconds, plain_table, three_digits, times, write_json

ROOT = Path(__file__).resolve().parents[1]
SECONDS, ROUNDS = 4.0, (3, 100)  # for a network in a mode
QUICK_SECONDS, QUICK_ROUNDS = 1.5, (3, 30)


def parse(arguments):
    parser = argparse.ArgumentParser(prog="run.py models", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: the GPU, if any")
    parser.add_argument("--layout", choices=("nchw", "nhwc"), default="nchw", help="default: nchw")
    parser.add_argument("--filter", metavar="TEXT,…", default="", help="only networks whose name contains one of these")
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(models.QUICK)}, in small batches")
    parser.add_argument("--train", choices=("some", "all", "none"), default="some",
                        help=f"default: some, which are {', '.join(models.TRAINED)}")  # fmt: skip
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None,
                        help="also torch.compile, which takes a minute for each; default: where networks are trained, "
                             "not with --quick")  # fmt: skip
    parser.add_argument("--out", metavar="DIR", type=Path, default=ROOT / "benchmarks" / "out",
                        help="folder for the JSON and the plot; default: benchmarks/out")  # fmt: skip
    options = parser.parse_args(arguments)
    names = models.QUICK if options.quick else tuple(NETWORKS)
    wanted = options.filter.lower().split(",")
    options.names = [name for name in names if any(text in name.lower() for text in wanted)]
    if not options.names:
        parser.error(f"no network's name contains {options.filter!r}. There are {', '.join(names)}")
    some = models.TRAINED_QUICK if options.quick else models.TRAINED
    trained = {"some": some, "all": names, "none": ()}[options.train]
    options.trained = [name for name in options.names if name in trained]
    return options


def main(arguments):
    """Runs the benchmark of networks. Returns the exit code: 1 if a result was wrong or could not be computed."""
    options = parse(arguments)
    device = machine.choose_device(options.device)
    machine.set_precision("float32")
    torch.backends.cudnn.benchmark = True
    out = console()
    described = machine.describe(device)
    out.print(machine.title(described))
    out.print(
        f"float32, {options.layout.upper()}, {len(options.names)} networks, {len(options.trained)} of them trained\n"
        "ratio: torch's time / fastconv's, above 1 fastconv is faster; medians (and interquartile ranges)"
    )
    rows = run(options, device, out)
    inferences = {variant: operations.points(rows, variant) for variant in VARIANTS}
    correlation = {variant: operations.correlate(found) for variant, found in inferences.items()}
    result = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "title": machine.title(described),
        "machine": described,
        "settings": {"device": device, "dtype": "float32", "layout": options.layout, "quick": options.quick,
                     "filter": options.filter},
        "rows": rows,
        "correlation": {variant: found for variant, found in correlation.items() if found},
    }  # fmt: skip
    report(result, out)
    options.out.mkdir(parents=True, exist_ok=True)
    files = [options.out / f"models-{device}{suffix}" for suffix in (".json", ".png")]
    write_json(files[0], result)
    if not operations.draw(result, files[1]):
        del files[1]
    out.print(f"written: {', '.join([str(files[0]), *(file.name for file in files[1:])])}", soft_wrap=True)
    wrong = [row for row in rows if not row["ok"]]
    if wrong:
        out.print(f"{len(wrong)} of {len(rows)} rows are WRONG or failed", style="bold red")
    return 1 if wrong else 0


def run(options, device, out):
    """Measures the networks one by one and prints a line for each row. Returns the rows."""
    seconds, rounds = (QUICK_SECONDS, QUICK_ROUNDS) if options.quick else (SECONDS, ROUNDS)
    clock, layout, rows = timer(device), options.layout.upper(), []
    for name in options.names:
        images = models.batch(name, device, options.quick)
        for mode in models.MODES:
            if mode == TRAINING and name not in options.trained:
                continue
            compiled = options.compile if options.compile is not None else not options.quick and name in options.trained
            row = models.measure(name, mode, device, layout, images, clock, seconds, rounds, compiled)
            row["peak_bytes"] = {}
            if mode == TRAINING and row["ok"]:
                row["peak_bytes"] = model_memory.measure_memory(name, device, layout, images)
            rows.append(row)
            out.print(line(row), style=None if row["ok"] else "bold red", soft_wrap=True)
            for note in row["notes"]:
                out.print(f"  {note}", soft_wrap=True)
    return rows


def verdict(row):
    """The check's column: the largest of the errors, or what went wrong."""
    if row["failure"]:
        return row["failure"]
    wrong = {v: (e, b) for v, errors in row["check"].items() for e, b in zip(errors, row["bounds"], strict=True)
             if not e <= b}  # fmt: skip
    if wrong:
        return f"WRONG {', '.join(wrong)}: {', '.join(f'{e:.0e} > {b:.0e}' for e, b in wrong.values())}"
    return f"ok {max(error for errors in row['check'].values() for error in errors):.0e}"


def line(row):
    """A row while it runs: its name, the medians, the ratio and the check."""
    medians = [f"{v} {three_digits(row[v]['median'])} ms" for v in VARIANTS if row[v]]
    parts = [f"{row['layer']} {row['direction']}", *medians, times(row["ratio"]), verdict(row)]
    return " · ".join(parts)


def timing_table(rows):
    """Header and lines: the times of the variants that there are, fastconv's rate, and the check."""
    variants = [variant for variant in VARIANTS if any(row[variant] for row in rows)]
    lines = []
    for row in rows:
        rate = three_digits(1e3 * row["batch"] / row[OURS]["median"]) if row[OURS] else "–"
        timings = [milliseconds(row[variant]) for variant in variants]
        lines.append(
            [row["layer"], row["direction"], str(row["batch"]), *timings, rate, times(row["ratio"]), verdict(row)]
        )
    timed = [f"{variant}\nms (IQR)" for variant in variants]
    return ("network", "pass", "N", *timed, "images/s", "ratio", "check"), lines


def split_table(rows):
    """A line for each variant of each training step: ms of its parts."""
    lines = [
        [row["layer"], variant, *(three_digits(ms[part]) for part in PARTS)]
        for row in rows
        for variant, ms in row["split"].items()
    ]
    return ("network", "", *PARTS), lines


def memory_table(rows):
    rows = [row for row in rows if row["peak_bytes"]]
    variants = [variant for variant in VARIANTS if any(variant in row["peak_bytes"] for row in rows)]
    lines = [
        [row["layer"], str(row["batch"]), *(f"{row['peak_bytes'][v] / 2**20:.0f}" for v in variants)] for row in rows
    ]
    return ("network", "N", *variants), lines


def report(result, out):
    """Prints the tables."""
    rows = result["rows"]
    tables = [
        ("networks", timing_table(rows)),
        ("a training step, ms by what computes", split_table(rows)),
        ("a training step, MiB at its peak beyond the parameters", memory_table(rows)),
    ]
    for title, (header, lines) in tables:
        if lines:
            out.print(f"\n{title}", style="bold")
            out.print(plain_table(None, header, lines))
    for mode in models.MODES:
        for variant in (OURS, FUSED, COMPILED):
            pairs = [row[EAGER]["median"] / row[variant]["median"] for row in rows
                     if row["direction"] == mode and row[EAGER] and row[variant]]  # fmt: skip
            if pairs:
                out.print(f"{mode}: {variant} {geomean(pairs):.2f}× of torch's speed, geometric mean of {len(pairs)}")
    if result["correlation"]:
        out.print("\noperations against the time of an inference, correlation:", style="bold")
    for variant, r in result["correlation"].items():
        out.print(
            f"  {variant}: r = {r['linear']:.3f}, of the logarithms {r['log']:.3f}, of the ranks {r['rank']:.3f} "
            f"({r['networks']} networks); the time for an operation differs by up to {r['spread']:.1f}×",
            soft_wrap=True,
        )
