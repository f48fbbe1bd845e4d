"""What `run.py layers` measures besides the layers' times: a table each, with an option that turns it on or off."""

import argparse
import subprocess

import cliffs
import first_call
import layers
import memory
import overhead
import step_memory
import thread_scaling

TABLES = {
    "overhead": overhead,
    "first_call": first_call,
    "memory": memory,
    "step_memory": step_memory,
    "threads": thread_scaling,
    "cliffs": cliffs,
}  # the key in the results file, and the module with its TITLE, HEADER and lines(rows)
HELP = {
    "overhead": "the cost of a call with hardly any arithmetic",
    "first_call": "the cost of a new shape's first call",
    "memory": "the peak memory of a call",
    "step_memory": "the peak memory of a training step; not with --quick unless asked for",
    "threads": "the speed by 1, 2, 4, … CPU threads; not with --quick unless asked for",
    "cliffs": "the worst step between neighbouring sizes; not with --quick unless asked for",
}
SLOW = ("step_memory", "threads", "cliffs")


def add_options(parser):
    for name, text in HELP.items():
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, action=argparse.BooleanOptionalAction, default=None, help=text)


def asked(options):
    """The names of the tables to measure."""
    given = {name: getattr(options, name) for name in TABLES}
    return [name for name, on in given.items() if (on if on is not None else not (options.quick and name in SLOW))]


def measure_extras(options, device, milliseconds):
    """Yields (name, rows, failure) for each table, one after the other: no rows if it is not asked for or failed, and
    "" if it did not fail. Images are NCHW unless --layout nhwc is given."""
    layout = "nhwc" if options.layout == "nhwc" else "nchw"
    place = (layout, options.dtype, device)
    selected, quick = options.layers, options.quick
    few = [layer for layer in selected if layer.name in layers.QUICK] or selected
    ways = {
        "overhead": lambda: overhead.measure_overhead(device, 0.6 if quick else 1.5),
        "first_call": lambda: first_call.measure_first_calls(
            first_call.one_of_each_group(few)[: 2 if quick else None], *place, milliseconds, shapes=5 if quick else 8
        ),
        "memory": lambda: memory.measure_memory(selected, *place),
        "step_memory": lambda: step_memory.measure_step_memory(*place),
        "threads": lambda: thread_scaling.measure_threads(few, *place[:2], milliseconds) if device == "cpu" else [],
        "cliffs": lambda: cliffs.measure_cliffs(selected, *place, milliseconds),
    }
    wanted = asked(options)
    for name in TABLES:
        rows, failure = [], ""
        try:
            rows = ways[name]() if name in wanted else []
        except (RuntimeError, subprocess.CalledProcessError) as error:  # torch.OutOfMemoryError is a RuntimeError
            failure = f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}"
        yield name, rows, failure
