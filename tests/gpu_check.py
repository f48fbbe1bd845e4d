"""Checks fastconv on the GPU of this machine, with libraries that were built elsewhere, and writes what came of it.

    python setup.py build_ext --inplace --golden     # where there is an nvcc; then copy the tree
    python tests/gpu_check.py [--stages kernels,tests] [--out benchmarks/results]

Nothing is compiled here but fastconv/_introspect, where this Python has none. The result is one JSON file a GPU, commit
and day; stages that are run later are added to it. `python benchmarks/readme.py` makes the table in docs/performance.md
from these files. The exit code is 1 if a stage failed.
"""

import argparse
import ctypes
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "fastconv" / "libfastconv.so"
GOLDEN_LIBRARY = ROOT / "build" / "ninja" / "libfastconv_golden.so"
TEXT = 4000  # characters kept of a failure
LAST_WORDS = 20  # seconds that a stage past its limit has to write its report


def run(command, limit, **environment):
    """(output, exit code or None if it ran past `limit` seconds)."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        return process.communicate(timeout=limit)[0], process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
    try:
        return process.communicate(timeout=LAST_WORDS)[0], None
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()[0], None


def verdict(code, right, **details):
    """A stage's result: passed where the exit code is 0 and `right`."""
    status = "timed out" if code is None else "passed" if code == 0 and right else "failed"
    return {"status": status, **details}


def tail(output):
    return output.strip()[-TEXT:]


# The stages: each takes its limit in seconds and returns its result


def build(limit):
    """Compiles fastconv/_introspect for this Python, if it has none."""
    code = "import fastconv._introspect"
    output, exit_code = run([sys.executable, "-c", code], limit)
    if exit_code == 0:
        return verdict(0, True, text="was there")
    import torch

    module = ROOT / "fastconv" / f"_introspect{sysconfig.get_config_var('EXT_SUFFIX')}"
    headers = (sysconfig.get_path("include"), Path(torch.__file__).parent / "include")  # torch brings pybind11's
    command = [os.environ.get("CXX", "g++"), "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-shared"]
    command += [option for folder in headers for option in ("-isystem", folder)]
    command += ["-DFASTCONV_WITH_CUDA=1", ROOT / "csrc" / "introspect.cpp", LIBRARY]
    output, exit_code = run([*command, "-Wl,-rpath,$ORIGIN", "-o", module], limit)
    if exit_code == 0:
        output, exit_code = run([sys.executable, "-c", code], limit)
    return verdict(exit_code, True, text=tail(output) or "compiled")


def kernels(limit, device="cuda", only=""):
    """Every kernel over small shapes, for a verdict on each."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "kernels.json"
        command = [sys.executable, ROOT / "tests" / "exercise_kernels.py", "--device", device, "--filter", only]
        output, code = run([*command, "--json", report], limit)
        found = json.loads(report.read_text()) if report.exists() else {}
    return verdict(code, found, text="" if code == 0 else tail(output)), found


def pytest(limit, *arguments):
    """Tests, and how many passed, failed and were skipped; those until then, if the limit was reached."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *arguments]
        output, code = run(command, limit)
        cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    if code is None:
        cases = cases[:-1]  # the last was interrupted, and the report has it among the passed
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures, reasons = [], set()
    for case in cases:
        bad = case.find("failure") if case.find("failure") is not None else case.find("error")
        skipped = case.find("skipped")
        if bad is not None:
            text = (bad.text or bad.get("message") or "")[-TEXT:]
            failures.append({"name": f"{case.get('classname')}::{case.get('name')}", "text": text})
        elif skipped is not None:
            reasons.add(skipped.get("message"))
        counts["failed" if bad is not None else "skipped" if skipped is not None else "passed"] += 1
    text = ""
    if not counts["passed"]:
        text = f"no test passed; skipped: {'; '.join(sorted(map(str, reasons)))[:TEXT]}" if reasons else tail(output)
    return verdict(code, counts["passed"], counts=counts, failures=failures, text=text)


def tests(limit):
    return pytest(limit, "tests", "-k", "cuda", "--ignore=tests/test_ptx.py")


def golden(limit):
    if not GOLDEN_LIBRARY.exists():
        return verdict(1, False, text=f"{GOLDEN_LIBRARY.relative_to(ROOT)} is missing: build it with --golden")
    return pytest(limit, "tests/test_ptx.py", "-k", "cuda")


def sanitize(tool, limit, device="cuda", only=""):
    """The exercise under a tool of compute-sanitizer, which looks at fastconv's kernels alone."""
    if shutil.which("compute-sanitizer") is None:
        return verdict(1, False, text="no compute-sanitizer on PATH")
    command = ["compute-sanitizer", "--tool", tool, "--kernel-name", "kns=fastconv", "--error-exitcode", "86"]
    command += ["--report-api-errors", "no"] if tool == "memcheck" else []
    exercise = [sys.executable, ROOT / "tests" / "exercise_kernels.py", "--device", device, "--filter", only]
    # Each tensor is an allocation of its own, so that an access past its end is seen.
    output, code = run([*command, *exercise], limit, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    lines = [line for line in output.splitlines() if line.startswith("=========")]
    summaries = [line for line in lines if re.search(r"SUMMARY: 0 (errors|hazards)", line)]
    named = sorted(set(re.findall(r"\b(\w+_kernel)\b", "\n".join(lines))))
    text = "" if code == 0 and summaries else "\n".join(lines)[:TEXT] or tail(output)
    return verdict(code, summaries, kernels=named, text=text)


def memcheck(limit):
    return sanitize("memcheck", limit)


def racecheck(limit):
    return sanitize("racecheck", limit)


def synccheck(limit):
    return sanitize("synccheck", limit)


def benchmark(limit):
    """The quick benchmark, which checks every result before it times it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "benchmarks" / "run.py", "--quick", "--device", "cuda", "--out", folder]
        output, code = run(command, limit)
        reports = [json.loads(path.read_text()) for path in Path(folder).glob("cuda-*.json")]
    rows = [row for report in reports for row in report["rows"]]
    wrong = [f"{row['layer']} {row['layout']} {row['direction']}: {row['failure']}" for row in rows if not row["ok"]]
    counts = {"right": len(rows) - len(wrong), "wrong": len(wrong)}
    summary = reports[0]["summary"] if reports else {}
    return verdict(code, rows, counts=counts, wrong=wrong, summary=summary, text="" if rows else tail(output))


STAGES = {  # and their limits in seconds
    build: 120,
    kernels: 180,
    golden: 60,
    tests: 540,
    memcheck: 400,
    racecheck: 500,
    synccheck: 400,
    benchmark: 300,
}
NAMES = {stage.__name__: stage for stage in STAGES}


# The file


def output_of(*command):
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def describe(commit):
    """What was checked, and where."""
    import torch

    device = torch.cuda.get_device_properties(0)
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit or output_of("git", "rev-parse", "HEAD"),
        "gpu": device.name,
        "capability": f"{device.major}.{device.minor}",
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }


def file_of(check, folder):
    gpu = re.sub(r"[^a-z0-9]+", "-", check["gpu"].lower().removeprefix("nvidia ")).strip("-")
    return folder / f"gpu-check-{gpu}-{check['date']}.json"


def earlier(path, check):
    """What the file has of the same commit: stages and kernels, empty if it is another's or not there."""
    if path.exists():
        found = json.loads(path.read_text())
        if found["commit"] == check["commit"]:
            return found["stages"], found["kernels"]
    return {}, {}


def check(stages, limit, commit, folder):
    """Runs the stages, writing the file after each. Returns whether all passed."""
    result = describe(commit)
    folder.mkdir(parents=True, exist_ok=True)
    path = file_of(result, folder)
    result["stages"], result["kernels"] = earlier(path, result)
    passed = True
    for stage in stages:
        name, begin = stage.__name__, time.monotonic()
        found = stage(limit or STAGES[stage])
        if stage is kernels:
            found, result["kernels"] = found
        result["stages"][name] = found | {"seconds": round(time.monotonic() - begin, 1)}
        path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        print(f"{name}: {found['status']}, {result['stages'][name]['seconds']} s", found.get("counts", ""), flush=True)
        for failure in found.get("failures", ())[:20]:
            print(f"  {failure['name']}")
        if found["status"] != "passed":
            print(found["text"], flush=True)
            passed = False
    print(f"written: {path}")
    return passed


def has_cuda_kernels(library):
    launchers = ctypes.CDLL(str(library))["_ZN8fastconv4cuda9launchersEv"]  # fastconv::cuda::launchers()
    launchers.restype = ctypes.c_void_p
    return launchers() is not None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", metavar="LIST", default=",".join(NAMES), help=f"of {', '.join(NAMES)}")
    parser.add_argument("--limit", metavar="SECONDS", type=int, help="for each stage, instead of its own")
    parser.add_argument("--commit", help="where the tree came without its .git")
    parser.add_argument("--out", metavar="DIR", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    if unknown := set(options.stages.split(",")) - set(NAMES):
        parser.error(f"no stage is called {', '.join(sorted(unknown))}: there are {', '.join(NAMES)}")
    try:
        import torch
    except ImportError:
        sys.exit("gpu-check: this Python has no torch")
    if not torch.cuda.is_available():
        sys.path.append(str(ROOT / "benchmarks"))
        import machine

        sys.exit(f"gpu-check: no GPU here: {machine.why_no_cuda()}")
    if not LIBRARY.exists() or not has_cuda_kernels(LIBRARY):
        what = "has no CUDA kernels" if LIBRARY.exists() else "is missing"
        sys.exit(f"gpu-check: {LIBRARY.relative_to(ROOT)} {what}: build it where there is an nvcc, and copy the tree")
    stages = [NAMES[name] for name in options.stages.split(",")]
    sys.exit(not check(stages, options.limit, options.commit, options.out))


if __name__ == "__main__":
    main()
