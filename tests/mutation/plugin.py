"""A pytest plugin: instead of running the collected tests, runs them once for each mutant, until the first that fails.

Every run is a fork of this process, which has imported and collected everything. It ends by a failed test, by a crash
or by running out of time; else the mutant survives. The tests that run are those of the ops that a mutant is in.
"""

import ctypes
import json
import mmap
import os
import signal
import time
from pathlib import Path

from _pytest.runner import runtestprotocol
from conftest import emulated_library_path

OPS = ("avg_pool2d", "batch_norm", "conv2d_mma", "conv2d", "max_pool2d")
FAILED = 42  # exit status of a run in which a test failed


def pytest_addoption(parser):
    parser.addoption("--mutants", help="JSON: a list of [number, [op …]]")
    parser.addoption("--orders", help="of the emulated threads, separated by commas: each is tried")
    parser.addoption("--results", help="where the results are written as JSON: {number: what killed it, or null}")
    parser.addoption("--time-limit", type=float, help="of a test, in seconds")


def items_for(session, ops):
    """The tests of other ops are left out, those of these come first."""
    others = {f"test_{op}.py" for op in OPS if op not in ops}
    first = {f"test_{op}.py" for op in ops}
    return sorted((i for i in session.items if i.path.name not in others), key=lambda item: item.path.name not in first)


def runs_of(items, ops, orders):
    """(tests, order) of each run: all tests in the first order, the ops' own in the others."""
    own = [i for i in items if i.path.name in {f"test_{op}.py" for op in ops}]
    return [(items if order == orders[0] else own, order) for order in orders]


def run_items(items, progress):
    """In the fork."""
    for item, following in zip(items, [*items[1:], None], strict=True):
        progress[:] = f"{item.path.name}::{item.name}".encode().ljust(len(progress), b"\0")[: len(progress)]
        if any(report.failed for report in runtestprotocol(item, nextitem=following, log=False)):
            return FAILED
    return 0


def killer_of(pid, progress, limit):
    """Waits for the fork: what ended it, or None if all tests passed."""
    test, since = b"", time.monotonic()
    while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
        if test != bytes(progress):
            test, since = bytes(progress), time.monotonic()
        if time.monotonic() > since + limit:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            break
        time.sleep(0.01)
    test = bytes(progress).rstrip(b"\0").decode()
    if ended[0] == 0:
        return f"{test} (ran out of time)"
    status = os.waitstatus_to_exitcode(ended[1])
    return None if status == 0 else test if status == FAILED else f"{test} (crashed)"


def pytest_runtestloop(session):
    option = session.config.option
    library = ctypes.CDLL(str(emulated_library_path(option.fastconv_sanitizer)))
    mutant = ctypes.c_int.in_dll(library, "fastconv_mutant")
    note = f", {option.fastconv_sanitizer} sanitizer" if option.fastconv_sanitizer else ""
    progress = mmap.mmap(-1, 1024)

    def run(number, ops):
        for items, order in runs_of(items_for(session, ops), ops, option.orders.split(",")):
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    mutant.value, option.fastconv_order = number, order
                    status = run_items(items, progress)
                finally:
                    os._exit(status)
            if killer := killer_of(pid, progress, option.time_limit):
                return f"{killer} [{order}{note}]"
        return None

    if killer := run(0, OPS):
        raise session.Failed(f"without a mutation: {killer}")
    results = {}
    for number, ops in json.loads(Path(option.mutants).read_text()):
        results[number] = run(number, ops)
        Path(option.results).write_text(json.dumps(results, indent=1))
    return True
