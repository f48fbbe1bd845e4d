"""A pytest plugin: instead of running the collected tests, runs them for each mutant, until the first that fails.

All tests run once without a mutant, and note which mutants would have decided something else in them. Only those tests
can kill a mutant; they are tried in an order that begins with tests that take little time and have killed others. Every
try is a fork of this process, which has imported and collected everything. It ends by a failed test, by a crash or by
running out of time; else the mutant survives it.
"""

import ctypes
import itertools
import json
import mmap
import os
import signal
import struct
import sys
import time
import traceback
from pathlib import Path

from _pytest.runner import runtestprotocol
from conftest import emulated_library_path

FAILED, BROKEN = 42, 43  # exit statuses of a try: a test failed; this plugin did
MUTANTS = 1 << 16


def pytest_addoption(parser):
    parser.addoption("--mutants", help="their numbers, separated by commas")
    parser.addoption("--orders", help="of the emulated threads, separated by commas: each is tried")
    parser.addoption("--tests", help="a JSON file, written if it is not there: what the tests are without a mutant")
    parser.addoption("--results", help="a file to append a line of JSON for each mutant to")
    parser.addoption("--time-factor", type=float, help="of what a test takes without a mutant: the longest it may take")
    parser.addoption("--seconds", type=float, help="of the tests that a mutant is tried with, without it and sanitizer")
    parser.addoption("--workers", type=int, help="mutants that are tried at the same time")


class Tries:
    def __init__(self, session):
        self.option = session.config.option
        self.items = {item.nodeid: item for item in session.items}
        library = ctypes.CDLL(str(emulated_library_path(self.option.fastconv_sanitizer)))
        self.mutant = ctypes.c_int.in_dll(library, "fastconv_mutant")
        self.differed = (ctypes.c_char * MUTANTS).in_dll(library, "fastconv_differed")
        self.running = mmap.mmap(-1, 4)  # the number of the test that a fork runs
        self.seconds, self.mutants = {}, {}  # by test: how long it takes, which mutants matter to it
        self.kills = {}  # by test
        self.passes = {}  # without a mutant, by test and order

    def fork(self, run):
        """The exit status of a fork that does run(); it is negative if a signal ended it."""
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            try:
                os._exit(run())
            except BaseException:
                traceback.print_exc()
                os._exit(BROKEN)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def outcomes(self, names):
        """Runs tests: (name, whether it passed) of each."""
        items = [self.items[name] for name in names]
        for i, (item, following) in enumerate(itertools.pairwise([*items, None])):
            self.running[:] = struct.pack("i", i)
            reports = runtestprotocol(item, nextitem=following, log=False)
            yield item.nodeid, not any(report.failed for report in reports)

    def first_run(self, path):
        """Writes {test: [its seconds, the mutants that would have decided something else]}."""

        def run():
            seen, start = {}, time.process_time()
            for name, passed in self.outcomes(self.items):
                if not passed:
                    print(f"fails without a mutant: {name}")
                    return FAILED
                differed = self.differed.raw
                ctypes.memset(self.differed, 0, MUTANTS)
                seen[name] = [time.process_time() - start, [i for i in range(MUTANTS) if differed[i] != 0]]
                start = time.process_time()
            path.write_text(json.dumps(seen))
            return 0

        return self.fork(run)

    def killer(self, number, names, order):
        """The first test that fails, and how, or None."""

        def run():
            self.mutant.value, self.option.fastconv_order = number, order
            limits = (2 + self.option.time_factor * self.seconds[name] for name in names)
            outcomes = self.outcomes(names)
            for limit in limits:
                signal.setitimer(signal.ITIMER_PROF, limit)  # of the processor's time
                signal.alarm(60 + int(10 * limit))
                if not next(outcomes)[1]:
                    return FAILED
            return 0

        status = self.fork(run)
        if status == BROKEN:
            raise RuntimeError(f"mutant {number}")
        if status == 0:
            return None
        how = " (ran out of time)" if -status in (signal.SIGPROF, signal.SIGALRM) else " (crashed)"
        return names[struct.unpack("i", self.running[:])[0]], "" if status == FAILED else how

    def fate(self, number):
        """What kills a mutant, or "", and how many tests can."""
        names = [name for name, mutants in self.mutants.items() if number in mutants]
        names.sort(key=lambda name: self.seconds[name] / (1 + self.kills.get(name, 0)))
        sanitizer = self.option.fastconv_sanitizer
        count = len(names)
        total = itertools.accumulate(self.seconds[name] for name in names)
        names = [name for name, seconds in zip(names, total, strict=True) if seconds < self.option.seconds]
        for order in self.option.orders.split(","):
            while killed := self.killer(number, names, order):
                name, how = killed
                if (name, order) not in self.passes:
                    self.passes[name, order] = self.killer(0, [name], order) is None
                if self.passes[name, order]:
                    self.kills[name] = self.kills.get(name, 0) + 1
                    return f"{name}{how} [{order}{f', {sanitizer} sanitizer' if sanitizer else ''}]", count
                print(f"{name} fails without a mutant [{order}]")
                names.remove(name)
        return "", count


def pytest_runtestloop(session):
    tries = Tries(session)
    option = session.config.option
    path = Path(option.tests)
    if not path.exists() and tries.first_run(path) != 0:
        raise session.Failed("a test fails without a mutant")
    for name, (seconds, mutants) in json.loads(path.read_text()).items():
        if name in tries.items:
            tries.seconds[name], tries.mutants[name] = seconds, set(mutants)

    # Workers take the mutants' numbers out of a pipe.
    numbers, source = os.pipe()
    os.write(source, b"".join(struct.pack("i", int(n)) for n in option.mutants.split(",")))
    os.close(source)
    workers = []
    for _ in range(option.workers):
        workers.append(os.fork())
        if workers[-1] == 0:
            status = BROKEN
            try:
                tries.running = mmap.mmap(-1, 4)
                while number := os.read(numbers, 4):
                    (number,) = struct.unpack("i", number)
                    killer, count = tries.fate(number)
                    with open(option.results, "a") as results:
                        results.write(json.dumps([number, killer, count]) + "\n")
                status = 0
            finally:
                os._exit(status)
    if any([os.waitpid(worker, 0)[1] for worker in workers]):
        raise session.Failed("a worker ended early")
    return True
