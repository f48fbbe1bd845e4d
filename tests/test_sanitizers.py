"""The sanitizers see the faults of emulation/faults.cpp in the emulated kernels, and nothing in those without."""

import re
import subprocess
import sys

import pytest
import sanitizers
from conftest import ROOT, emulated_library_path

ERRORS = {
    "shared_overrun": "AddressSanitizer: use-after-poison",
    "read_past_the_end": "AddressSanitizer: heap-buffer-overflow",
    "signed_overflow": "runtime error: signed integer overflow",
}
RACES = (
    "race_in_order",
    "race_in_warp",
    "race_between_masks",
    "race_between_meetings",
    "race_after_reading",
    "race_between_blocks",
    "race_with_atomics",
)
RIGHT = ("ordered_by_barrier", "ordered_by_warp", "ordered_by_fences", "spin", "halves", "sum", "reduce")


def run_cases(sanitizer, *names):
    """The exit status, and what was written to stderr."""
    library = emulated_library_path(sanitizer)
    command = [sys.executable, ROOT / "tests" / "emulation" / "run_cases.py", library, *names]
    fixed_addresses = sanitizers.without_random_addresses if sanitizer == "thread" else None
    environment = sanitizers.environment(sanitizer)
    done = subprocess.run(command, env=environment, preexec_fn=fixed_addresses, stderr=subprocess.PIPE, text=True)
    return done.returncode, done.stderr


@pytest.mark.parametrize("name", ERRORS)
def test_errors_end_the_process(name):
    status, text = run_cases("address", name)
    assert status != 0 and ERRORS[name] in text
    assert re.search(rf"#0 \S+ in {name} tests/emulation/faults.cpp:\d+", text), text


def test_right_kernels_pass_the_address_sanitizer():
    assert run_cases("address", *RIGHT) == (0, "".join(f"case {name}\n" for name in RIGHT))


@pytest.fixture(scope="module")
def race_reports():
    """The reports of each case."""
    _, text = run_cases("thread", *RACES, *RIGHT)
    reports = re.split(r"case (\w+)\n", text.split("ThreadSanitizer: reported")[0])[1:]
    return dict(zip(reports[::2], reports[1::2], strict=True))


@pytest.mark.parametrize("name", RACES)
def test_races_are_reported(race_reports, name):
    report = race_reports[name]
    assert "SUMMARY: ThreadSanitizer: data race tests/emulation/faults.cpp:" in report
    assert re.search(rf"#0 {name} tests/emulation/faults.cpp:\d+", report), report
    racing = re.findall(rf"Thread T\d+ 'thread \((\d+), 0, 0\), block \((\d), 0, 0\) of {name}'", report)
    (thread, block), (other_thread, other_block) = racing[:2]
    assert (block == other_block) == (name != "race_between_blocks")
    assert (thread == other_thread) == (name == "race_between_blocks")


@pytest.mark.parametrize("name", RIGHT)
def test_ordered_accesses_are_no_races(race_reports, name):
    assert not race_reports[name]
