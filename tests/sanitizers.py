"""`--fastconv-sanitizer`: the emulated kernels under AddressSanitizer or ThreadSanitizer.

A sanitizer must be in a process from its start, so pytest begins anew with it preloaded. AddressSanitizer and
UndefinedBehaviorSanitizer end the process at the first error; ThreadSanitizer goes on, and a test during which it
reports something fails with that report.
"""

import ctypes
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent
RUNTIMES = {"address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}
ADDR_NO_RANDOMIZE = 0x0040000  # of personality(2)


def environment(sanitizer, log=None):
    """The environment in which a process runs under this sanitizer."""
    compiler = os.environ.get("CXX", "g++")
    paths = [
        subprocess.check_output([compiler, f"-print-file-name={r}"], text=True).strip() for r in RUNTIMES[sanitizer]
    ]
    if missing := [path for path in paths if not Path(path).is_absolute()]:
        raise pytest.UsageError(f"{compiler} has no {', '.join(missing)}")
    options = {
        # Python and torch free little at their end.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        # The shared memory of every block has the same addresses.
        "TSAN_OPTIONS": "suppress_equal_addresses=0",
    }
    if log:
        options["TSAN_OPTIONS"] += f" log_path={log}"
    return os.environ | options | {"LD_PRELOAD": " ".join(paths)}


def without_random_addresses():
    """ThreadSanitizer of older compilers does not know all the places where Linux may now load a library."""
    ctypes.CDLL(None).personality(ADDR_NO_RANDOMIZE)


def begin_anew(config, sanitizer):
    """Replaces this process by one under the sanitizer, unless this is it."""
    runtime = RUNTIMES[sanitizer][0].split(".")[0]
    if runtime in Path("/proc/self/maps").read_text():
        os.environ.pop("LD_PRELOAD", None)  # child processes need none of it
        return
    log = str(Path(tempfile.mkdtemp(prefix="fastconv-")) / "report")
    config.pluginmanager.getplugin("capturemanager").stop_global_capturing()
    if sanitizer == "thread":
        without_random_addresses()
    # What a sanitizer writes before it ends the process must not be captured.
    command = [sys.executable, "-m", "pytest", "--capture=sys", *config.invocation_params.args]
    os.execve(sys.executable, command, environment(sanitizer, log))


def new_report():
    """What ThreadSanitizer has reported since the last call."""
    options = dict(option.split("=", 1) for option in os.environ.get("TSAN_OPTIONS", "").split())
    path = Path(f"{options['log_path']}.{os.getpid()}") if "log_path" in options else None
    if path is None or not path.exists():
        return ""
    with path.open() as file:
        file.seek(new_report.read)
        text = file.read()
        new_report.read = file.tell()
    return text


new_report.read = 0
