"""gpu_check.py, by the parts of it that need no GPU, and the table that is made of its files."""

import json
import subprocess
import sys
import time

import exercise_kernels
import gpu_check
import pytest
import torch
from conftest import ROOT

import fastconv

sys.path.append(str(ROOT / "benchmarks"))

TESTS = """
import pytest, time
@pytest.mark.parametrize("n", range(3))
def test_right(n): pass
def test_wrong(): assert 1 + 1 == 3, "what was said"
@pytest.fixture
def broken(): raise RuntimeError("a fixture")
def test_error(broken): pass
@pytest.mark.skip(reason="no such thing here")
def test_skipped(): pass
def test_slow(request):
    request.path.with_name("begun").touch()
    time.sleep(600)
"""


@pytest.fixture
def suite(tmp_path):
    path = tmp_path / "test_suite.py"
    path.write_text(TESTS)
    return path


# The stages


def test_tests_are_counted(suite):
    found = gpu_check.pytest(60, suite, "-k", "not slow")
    assert found["status"] == "failed" and found["counts"] == {"passed": 3, "failed": 2, "skipped": 1}
    wrong, error = found["failures"]
    assert wrong["name"].endswith("test_suite::test_wrong") and "what was said" in wrong["text"]
    assert error["name"].endswith("test_suite::test_error") and "a fixture" in error["text"]
    found = gpu_check.pytest(60, suite, "-k", "right")
    assert found["status"] == "passed" and found["counts"] == {"passed": 3, "failed": 0, "skipped": 0}


def test_a_stage_in_which_nothing_ran_has_not_passed(suite):
    found = gpu_check.pytest(60, suite, "-k", "skipped")
    assert found["status"] == "failed" and "no such thing here" in found["text"]
    found = gpu_check.pytest(60, suite, "-k", "nothing_of_this_name")
    assert found["status"] == "failed" and "deselected" in found["text"]


@pytest.fixture
def limit(tmp_path, monkeypatch):
    """A limit that a process reaches once it has made the file "begun", however long this machine needs for that."""

    class Process(subprocess.Popen):
        def communicate(self, input=None, timeout=None):
            if timeout != 3:
                return super().communicate(input, timeout)
            while self.poll() is None and not (tmp_path / "begun").exists():
                time.sleep(0.05)
            return super().communicate(input, 0.5)

    monkeypatch.setattr(subprocess, "Popen", Process)
    return 3


def test_tests_past_the_limit_are_stopped_and_those_before_counted(suite, limit, monkeypatch):
    monkeypatch.setattr(gpu_check, "LAST_WORDS", 300)
    found = gpu_check.pytest(limit, suite)
    assert found["status"] == "timed out" and found["counts"]["passed"] == 3 and found["counts"]["failed"] >= 2


def test_a_process_that_ignores_the_interrupt_is_ended(tmp_path, limit, monkeypatch):
    monkeypatch.setattr(gpu_check, "LAST_WORDS", 1)
    code = f"""
import pathlib, signal, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
print("begun", flush=True)
pathlib.Path({str(tmp_path / "begun")!r}).touch()
time.sleep(600)
"""
    assert gpu_check.run([sys.executable, "-c", code], limit) == ("begun\n", None)


def test_kernels_get_a_verdict_each():
    found, kernels = gpu_check.kernels(300, "cpu", "max_pool2d")
    assert found["status"] == "passed"
    assert set(kernels) == {"max_pool2d forward", "max_pool2d backward"}
    for by_dtype in kernels.values():
        assert set(by_dtype) == {"float32", "float64", "float16", "bfloat16"}
        assert all(result == {"checks": 10, "wrong": []} for result in by_dtype.values())


def test_convolutions_are_named_after_their_kernels(monkeypatch):
    few = [case for case in exercise_kernels.CONV2D_CASES if case.name in ("all at once", "depthwise")]
    monkeypatch.setattr(exercise_kernels, "CONV2D_CASES", few)
    results = exercise_kernels.exercise("cpu", "conv2d")
    for algo in ("direct", "im2col", "depthwise"):
        for direction in ("fprop", "dgrad", "wgrad"):
            assert results[f"conv2d {direction}: conv2d_{algo}_{direction}"]["float32"]["checks"] > 0
    assert not [text for by_dtype in results.values() for result in by_dtype.values() for text in result["wrong"]]


def test_a_wrong_kernel_is_found(monkeypatch):
    right = fastconv.batch_norm
    monkeypatch.setattr(
        fastconv, "batch_norm", lambda x, *args: right(x * (1 + 1e-3 * (x.dtype is torch.float32)), *args)
    )
    results = exercise_kernels.exercise("cpu", "batch_norm")["batch_norm training forward"]
    assert results["float32"]["wrong"] and not results["float64"]["wrong"]


SANITIZER = """#!/bin/sh
echo "$@" > "$(dirname "$0")/arguments"
echo "========= COMPUTE-SANITIZER"
{}
"""
OUT_OF_BOUNDS = """echo "========= Invalid __global__ read of size 4 bytes"
echo "=========     at void fastconv::cuda::gemm_kernel<float, (int)64>(fastconv::cuda::Gemm)+0x1230"
echo "========= ERROR SUMMARY: 1 error"
exit 86"""
REPORTS = {  # a tool's output, and what comes of it
    "clean": ('echo "========= ERROR SUMMARY: 0 errors"', "passed", [], ""),
    "no races": ('echo "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"', "passed", [], ""),
    "an error": (OUT_OF_BOUNDS, "failed", ["gemm_kernel"], "Invalid __global__ read"),
    "refused": ('echo "========= Error: Device not supported"; exit 1', "failed", [], "Device not supported"),
    "no summary": ("exit 0", "failed", [], "COMPUTE-SANITIZER"),
}


@pytest.mark.parametrize("report", REPORTS)
def test_reports_of_compute_sanitizer(report, tmp_path, monkeypatch):
    output, status, kernels, text = REPORTS[report]
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(SANITIZER.format(output))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = gpu_check.sanitize("racecheck", 60, "cpu", "max_pool2d")
    assert (found["status"], found["kernels"]) == (status, kernels) and text in found["text"]
    arguments = (tmp_path / "arguments").read_text()
    assert arguments.startswith("--tool racecheck --kernel-name kns=fastconv --error-exitcode 86 ")
    assert arguments.endswith("exercise_kernels.py --device cpu --filter max_pool2d\n")


def test_without_compute_sanitizer(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert gpu_check.sanitize("memcheck", 60)["text"] == "no compute-sanitizer on PATH"


# The file


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU, for everything but the stages."""
    described = {
        "date": "2026-11-21", "commit": "0123456789", "gpu": "NVIDIA H100 80GB HBM3", "capability": "9.0",
        "driver": "580.159.04", "torch": "2.11.0+cu130", "python": "3.12.3",
    }  # fmt: skip
    monkeypatch.setattr(gpu_check, "describe", lambda commit: described | ({"commit": commit} if commit else {}))
    return described


def stage(name, status, **details):
    def run(limit):
        return {"status": status, "text": "", **details}

    run.__name__ = name
    return run


def test_the_file_is_added_to_by_later_stages_of_the_same_commit(gpu, tmp_path, monkeypatch):
    kernels = stage("kernels", "passed")
    monkeypatch.setattr(gpu_check, "kernels", lambda limit: (kernels(limit), {"gemm": {"float32": {"wrong": []}}}))
    gpu_check.kernels.__name__ = "kernels"
    counts = {"passed": 1200, "failed": 1, "skipped": 3}
    assert gpu_check.check([gpu_check.kernels], 1, None, tmp_path)
    assert not gpu_check.check([stage("tests", "failed", counts=counts)], 1, None, tmp_path)
    (path,) = tmp_path.iterdir()
    assert path.name == "gpu-check-h100-80gb-hbm3-2026-11-21.json"
    written = json.loads(path.read_text())
    assert written["gpu"] == gpu["gpu"] and written["kernels"] == {"gemm": {"float32": {"wrong": []}}}
    assert {name: found["status"] for name, found in written["stages"].items()} == {
        "kernels": "passed",
        "tests": "failed",
    }
    gpu_check.check([stage("golden", "passed")], 1, "another", tmp_path)
    written = json.loads(path.read_text())
    assert list(written["stages"]) == ["golden"] and not written["kernels"]


def test_the_table(gpu, tmp_path):
    import gpu_checks

    assert gpu_checks.markdown_checks(gpu_checks.read(tmp_path)) == "None yet."
    right, wrong = {"checks": 9, "wrong": []}, {"checks": 9, "wrong": ["dx: the largest error is 1, the bound 0.1"]}
    first = gpu | {
        "stages": {"tests": {"status": "failed", "counts": {"passed": 9, "failed": 1, "skipped": 0}}},
        "kernels": {"gemm": {"float32": right}, "pool": {"float32": right, "float16": wrong}},
    }
    second = gpu | {
        "date": "2026-11-22",
        "stages": {"memcheck": {"status": "passed"}},
        "kernels": {"pool": {"float16": right}},
    }
    third = second | {"gpu": "NVIDIA H200", "kernels": {"gemm": {"float32": wrong}}}
    for check in (third, second, first):
        gpu_check.file_of(check, tmp_path).write_text(json.dumps(check))
    at = "0123456, driver 580.159.04, torch 2.11.0+cu130"
    assert gpu_checks.markdown_checks(gpu_checks.read(tmp_path)).splitlines() == [
        "| check | tests | memcheck |",
        "| --- | ---: | ---: |",
        f"| NVIDIA H100 80GB HBM3, 2026-11-21, {at} | failed: 9 passed, 1 failed | – |",
        f"| NVIDIA H100 80GB HBM3, 2026-11-22, {at} | – | passed |",
        f"| NVIDIA H200, 2026-11-22, {at} | – | passed |",
        "",
        "| kernel | NVIDIA H100 80GB HBM3 | NVIDIA H200 |",
        "| --- | ---: | ---: |",
        "| gemm | right (2026-11-21) | WRONG: float32 (2026-11-22) |",
        "| pool | right (2026-11-22) | – |",
    ]


def test_the_docs_have_the_table_of_the_files():
    import gpu_checks

    table = gpu_checks.markdown_checks(gpu_checks.read(ROOT / "benchmarks" / "results"))
    page = (ROOT / "docs" / "performance.md").read_text()
    assert f"<!-- benchmark:gpu-check -->\n{table}\n<!-- /benchmark:gpu-check -->" in page


# The command


def command(*arguments):
    return subprocess.run([sys.executable, ROOT / "tests" / "gpu_check.py", *arguments], capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_it_says_that_there_is_no_gpu(tmp_path):
    done = command("--out", str(tmp_path))
    assert done.returncode == 1 and not list(tmp_path.iterdir())
    assert done.stderr.startswith("gpu-check: no GPU here: ") and len(done.stderr.splitlines()) == 1


def test_unknown_stages_are_refused():
    done = command("--stages", "tests,everything")
    assert done.returncode == 2 and "no stage is called everything: there are build, kernels, golden" in done.stderr
