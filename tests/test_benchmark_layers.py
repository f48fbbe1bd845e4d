"""What `run.py layers` measures besides the times of the layers, at tiny sizes: cliffs, first calls, memory, threads,
the roofline picture, and the file that all of it is written to."""

import json
import re
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from conftest import ROOT

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
sys.path.append(str(ROOT / "benchmarks"))

import cliffs  # noqa: E402
import extras  # noqa: E402
import first_call  # noqa: E402
import layers  # noqa: E402
import machine  # noqa: E402
import measure  # noqa: E402
import memory  # noqa: E402
import overhead  # noqa: E402
import readme  # noqa: E402
import report  # noqa: E402
import roofline  # noqa: E402
import run_layers  # noqa: E402
import step_memory  # noqa: E402
import thread_scaling  # noqa: E402

BY_NAME = {layer.name: layer for layer in layers.LAYERS}
TINY = {
    "conv": replace(BY_NAME["resnet.3x3.28"], name="conv", batches=(1, 1), C=4, H=6, K=4),
    "depthwise": replace(BY_NAME["mobilenet.dw56"], name="depthwise", batches=(1, 1), C=4, H=6, K=4, groups=4),
    "pool": replace(BY_NAME["lenet.pool"], name="pool", batches=(2, 2), C=3, H=6),
    "norm": replace(BY_NAME["bn.512x28"], name="norm", batches=(2, 2), C=3, H=5),
    "matrix": replace(BY_NAME["bn.fc4096"], name="matrix", batches=(4, 4), C=5),
}
CLOCK = measure.timer("cpu")


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(layers, "LAYERS", tuple(TINY.values()))
    monkeypatch.setattr(roofline, "BY_NAME", TINY)
    monkeypatch.setattr(machine, "limits", lambda device, dtype: {"copy_gb_s": 10.0, "matmul_gflop_s": 100.0})


# Cliffs


def test_a_sweep_stays_in_its_family():
    found = cliffs.sweep(BY_NAME["mobilenet.dw56"], 4, 1)
    assert {axis: list(sizes) for axis, sizes in found.items()} == {"N": [3, 4, 5], "C": [127, 128, 129]}
    assert (found["C"][129].C, found["C"][129].K, found["C"][129].groups) == (129, 129, 129)
    assert found["N"][3].batch("cpu") == 3 and found["C"][127].batch("cuda") == 4
    found = cliffs.sweep(BY_NAME["resnext.28"], 1, 2)
    assert {axis: list(sizes) for axis, sizes in found.items()} == {
        "N": [1, 2, 3], "C": [192, 224, 256, 288, 320], "K": [192, 224, 256, 288, 320],
    }  # fmt: skip
    assert list(cliffs.sweep(BY_NAME["lenet.conv1"], 1, 1)["C"]) == [1, 2]
    assert set(cliffs.sweep(BY_NAME["lenet.pool"], 1, 1)) == set(cliffs.sweep(BY_NAME["bn.fc4096"], 1, 1)) == {"N", "C"}


def test_the_dearest_step():
    even = {"N": {1: (1.0, 10), 2: (2.0, 20), 3: (3.0, 30)}}
    assert cliffs.worst_step(even)[0] == pytest.approx(1.0)
    up = {"C": {127: (1.0, 127), 128: (1.0, 128), 129: (3.0, 129)}}
    assert cliffs.worst_step(even | up) == (pytest.approx(3 * 128 / 129), "C 128 → 129")
    down = {"C": {127: (2.0, 127), 128: (1.0, 128), 129: (1.0, 129)}}
    assert cliffs.worst_step(even | down) == (pytest.approx(2.0), "C 128 → 127")
    # Half the work for the same time is dearer a unit, but no cliff.
    assert cliffs.worst_step({"C": {1: (1.0, 1), 2: (1.0, 2)}})[0] == pytest.approx(1.0)


def test_a_cliff_is_found(monkeypatch):
    class Slow:
        @staticmethod
        def conv2d(x, *others):
            time.sleep(0.1 if x.shape[1] == 5 else 0.0)
            return torch.nn.functional.conv2d(x, *others)

    monkeypatch.setitem(measure.LIBRARIES, "fastconv", Slow)
    (row,) = cliffs.measure_cliffs([TINY["conv"]], "nchw", "float32", "cpu", CLOCK, 1.0, (5, 5), reach=1)
    assert row["fastconv"]["step"] == "C 4 → 5" and row["fastconv"]["ratio"] > cliffs.BOUND
    assert (row["layer"], row["layout"]) == ("conv", "NCHW")


# First calls


def test_one_layer_of_each_group_with_pixels():
    assert [layer.name for layer in first_call.one_of_each_group([TINY["matrix"], *TINY.values()])] == [
        "conv", "depthwise", "pool", "norm",
    ]  # fmt: skip


def test_a_slow_first_call_is_seen(monkeypatch):
    seen = set()

    class Compiles:
        @staticmethod
        def conv2d(x, *others):
            if x.shape not in seen:
                time.sleep(0.1 if seen else 0.6)  # the first of all loads the kernels: it does not count
                seen.add(x.shape)
            return torch.nn.functional.conv2d(x, *others)

    monkeypatch.setitem(measure.LIBRARIES, "fastconv", Compiles)
    (row,) = first_call.measure_first_calls([TINY["conv"]], "nchw", "float32", "cpu", CLOCK, shapes=1)
    assert len(seen) == 2 and row["fastconv"]["ratio"] > 2
    assert 300 > row["fastconv"]["first_ms"] >= 100 > row["fastconv"]["next_ms"]


# Memory


@pytest.mark.skipif(not memory.peak_is_readable(), reason="this system does not tell a process's peak")
def test_memory_is_what_a_call_takes():
    rows = memory.measure_memory([BY_NAME["resnet.pool"], BY_NAME["resnet.3x3.56"]], "nchw", "float32", "cpu")
    assert [(row["layer"], row["direction"]) for row in rows] == [
        (name, direction) for name in ("resnet.3x3.56", "resnet.pool") for direction in layers.PASSES
    ]
    x, y = (8 * 64 * side**2 for side in (112, 56))
    pool, pool_backward = rows[2:]
    assert pool["results_bytes"] == 4 * y and pool_backward["results_bytes"] == 4 * x
    near = pytest.approx(y, abs=2**20)  # one byte of argmax for each output
    assert pool["fastconv_bytes"] == near and pool["plan_bytes"] is None
    assert pool["torch_bytes"] >= 8 * y - 2**20  # int64
    for row in rows[:2]:
        assert row["fastconv_bytes"] <= row["plan_bytes"] + 2**20


def test_a_fused_step_keeps_less_than_torchs():
    """Of a BatchNorm and its ReLU the output is not kept; of its mean and variance, as much as by torch."""
    kept = {}
    for variant in step_memory.VARIANTS:
        model = step_memory.model_of(variant, "nchw", "float32", "cpu")
        kept[variant] = step_memory.kept_bytes(model, torch.randn(2, 3, 64, 64))
    assert kept["fused"] < 0.8 * kept["torch"]
    assert kept["fastconv"] <= kept["torch"]


@pytest.mark.skipif(not memory.peak_is_readable(), reason="this system does not tell a process's peak")
def test_memory_that_was_given_back_counts():
    """In a process of its own, as where it is measured: other tests leave blocks that malloc takes again."""
    program = """
import memory, torch
def call():
    torch.ones(64 * 2**20, dtype=torch.uint8)
    return torch.ones(1)
memory.map_every_block()
call()  # makes torch's threads
print(memory.peak_bytes(call, "cpu")[0])
"""
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT / "benchmarks", capture_output=True, text=True, check=True
    )
    assert int(run.stdout) == pytest.approx(64 * 2**20, abs=2**20)


def test_without_a_peak_there_are_no_rows(monkeypatch):
    monkeypatch.setattr(memory, "resident", lambda name: {}[name])
    assert memory.measure_memory([TINY["conv"]], "nchw", "float32", "cpu") == []


# Threads


def test_the_numbers_of_threads():
    assert thread_scaling.counts(1) == [1]
    assert thread_scaling.counts(2) == [1, 2]
    assert thread_scaling.counts(12) == [1, 2, 4, 8, 12]


def test_threads_are_set_and_set_back(monkeypatch):
    seen = []

    class Watched:
        @staticmethod
        def conv2d(*arguments):
            seen.append(torch.get_num_threads())
            return torch.nn.functional.conv2d(*arguments)

    monkeypatch.setitem(measure.LIBRARIES, "fastconv", Watched)
    before = torch.get_num_threads()
    rows = thread_scaling.measure_threads([TINY["conv"]], "nhwc", "float32", CLOCK, 0.1, (1, 2), largest=3)
    assert [(row["layer"], row["layout"], row["threads"]) for row in rows] == [("conv", "NHWC", n) for n in (1, 2, 3)]
    assert sorted(set(seen)) == [1, 2, 3] and torch.get_num_threads() == before
    assert [line[3] for line in thread_scaling.lines(rows)][0] == "1.00×"


# The roofline


def timed(layer, direction, ms):
    timing = {"median": ms, "low": ms, "high": ms, "samples": 1}
    return {"layer": layer, "group": BY_NAME[layer].group, "layout": "NCHW", "direction": direction, "batch": 1,
            "fastconv": timing, "torch": timing | {"median": 2 * ms}, "ratio": 2.0}  # fmt: skip


def test_points_of_the_roofline():
    rows = [timed("inception.1x1", "backward", 0.5), timed("lenet.pool", "forward", 1.0)]
    rows.append(rows[0] | {"ratio": None})
    (point,) = roofline.points({"settings": {"dtype": "float32"}, "rows": rows})
    flops = 4 * 28 * 28 * 128 * 256
    least = 4 * (2 * 256 * 28 * 28 + 2 * 128 * 256 + 128 * 28 * 28)
    assert point["intensity"] == pytest.approx(flops / least)
    assert point["fastconv"] == pytest.approx(flops / 0.5e6) and point["torch"] == pytest.approx(flops / 1e6)
    limits = {"copy_gb_s": 10.0, "matmul_gflop_s": 100.0}
    assert roofline.ceiling(4.0, limits) == 40 and roofline.ceiling(40.0, limits) == 100


# Options and the file


def test_quick_leaves_out_what_takes_long():
    def asked(*arguments):
        return extras.asked(run_layers.parse(arguments))

    assert asked() == list(extras.TABLES)
    assert asked("--quick") == ["overhead", "first_call", "memory"]
    assert asked("--quick", "--cliffs", "--no-first-call") == ["overhead", "memory", "cliffs"]


def test_a_table_that_fails_costs_no_other_result(tiny, tmp_path, monkeypatch, capsys):
    def fails(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory\nmore")

    monkeypatch.setattr(cliffs, "measure_cliffs", fails)
    monkeypatch.setattr(overhead, "measure_overhead", lambda *_: [{"case": "none"}])
    monkeypatch.setattr(overhead, "lines", lambda rows: [])
    monkeypatch.setattr(run_layers, "SECONDS", 0.01)
    left_out = ["--no-first-call", "--no-memory", "--no-step-memory", "--no-threads"]
    assert run_layers.main(["--filter", "pool", "--device", "cpu", *left_out, "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().out.endswith("cliffs: OutOfMemoryError: CUDA out of memory\n")
    result = json.loads((tmp_path / "cpu-float32.json").read_text())
    assert result["rows"] and result["overhead"] == [{"case": "none"}] and result["cliffs"] == []


def keys(value):
    """The names in a result, but those of groups and of the means over them."""
    if isinstance(value, dict):
        return {key for key in value if key.isidentifier()}.union(*map(keys, value.values()))
    return set().union(*map(keys, value)) if isinstance(value, list) else set()


def test_the_file_has_the_fields_that_the_docs_name(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "measure_memory", lambda chosen, *place: memory.measure_here(chosen, *place))
    monkeypatch.setattr(
        step_memory, "measure_step_memory", lambda *a: step_memory.measure_here(("torch",), *a, 2, (3, 32, 32))
    )
    monkeypatch.setattr(cliffs, "measure_cliffs", lambda *a, f=cliffs.measure_cliffs: f(*a, 0.01, (1, 2), 1))
    monkeypatch.setattr(thread_scaling, "measure_threads", lambda *a, f=thread_scaling.measure_threads: f(*a, 0.01))
    monkeypatch.setattr(overhead, "measure_overhead", lambda device, _, f=overhead.measure_overhead: f(device, 0.01))
    monkeypatch.setattr(run_layers, "SECONDS", 0.01)
    run_layers.main(["--device", "cpu", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "cpu-float32.json").read_text())
    assert all(result[name] for name in extras.TABLES)
    table = (ROOT / "docs" / "performance.md").read_text().split("## The file")[1].split("\n\n")[1]
    named = set(re.findall(r"`(\w+)`", table))
    on_a_gpu = {"capability", "multiprocessors", "memory_gib", "cudnn", "host"}
    groups = set(layers.GROUPS)
    assert keys(result) - groups == named - on_a_gpu
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cpu-float32-roofline.png", "cpu-float32.json", "cpu-float32.png",
    ]  # fmt: skip
    page = readme.markdown_extras(result)
    assert all(f"**{table.TITLE}**\n\n| " in page for table in extras.TABLES.values())
    assert page.count("\n| ") == sum(2 + len(result[name]) for name in extras.TABLES)
    assert readme.markdown_extras(result | dict.fromkeys(extras.TABLES, [])) == ""
    assert report.caption(result) in page
