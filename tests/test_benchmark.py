"""The benchmark and the example: the frozen list, the statistics, what is written, and one quick run."""

import gzip
import json
import math
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "examples")]

import fashion_mnist  # noqa: E402
import floors  # noqa: E402
import layers  # noqa: E402
import machine  # noqa: E402
import measure  # noqa: E402
import readme  # noqa: E402
import report  # noqa: E402
import run  # noqa: E402
import run_layers  # noqa: E402

BY_NAME = {layer.name: layer for layer in layers.LAYERS}


def row(layer, ours, theirs, group="dense", layout="NCHW", direction="forward"):
    def timing(ms):
        return {"median": ms, "low": 0.9 * ms, "high": 1.1 * ms, "samples": 9}

    return {
        "layer": layer, "group": group, "layout": layout, "direction": direction, "batch": 4, "unit": "GB/s",
        "check": {"tensor": "y", "error": 1e-7, "bound": 1e-6, "reference": "float64"}, "failure": "", "ok": True,
        "fastconv": timing(ours), "torch": timing(theirs), "ratio": theirs / ours, "rate": 1.0, "of_limit": 0.5,
    }  # fmt: skip


# The list


def test_list_is_the_frozen_one():
    groups = Counter(layer.group for layer in layers.LAYERS)
    assert groups == {"dense": 22, "1×1": 6, "stem": 4, "depthwise/grouped": 7, "pool": 4, "BN": 5}
    assert len(BY_NAME) == 48
    convolutions = [layer for layer in layers.LAYERS if isinstance(layer, layers.Conv)]
    assert Counter(layer.batches for layer in convolutions) == {(32, 1024): 2, (4, 256): 28, (1, 64): 9}
    assert {layer.group for name, layer in BY_NAME.items() if name in layers.QUICK} == set(layers.GROUPS)


def test_multiply_adds_are_the_lectures():
    def count(*names):
        return sum(BY_NAME[name].multiply_adds(1) for name in names)

    assert count("lenet.conv1") == 28 * 28 * 20 * 25
    assert count("inception.1x1", "inception.3x3", "inception.5x5") == 854_196_224
    fully_connected = 6 * 6 * 256 * 4096 + 4096 * 4096 + 4096 * 1000
    assert count(*(f"alexnet.conv{i}" for i in range(1, 6))) == 1_135_256_096 - fully_connected
    assert count("resnet.stem") == 112 * 112 * 64 * 3 * 49
    assert count("mobilenet.dw56s2") == 28 * 28 * 128 * 9
    assert count("resnext.28") == 28 * 28 * 256 * 8 * 9
    assert count("resnet.project56") == 28 * 28 * 512 * 256
    assert BY_NAME["vgg.conv9, 10"].parameter_sizes()[0] == (512, 512, 3, 3)


@pytest.mark.parametrize("layer", layers.LAYERS, ids=lambda layer: layer.name)
def test_sizes_are_torch_s(layer):
    def meta(sizes):
        return [torch.empty(size, device="meta") for size in sizes]

    (x,) = meta([layer.x_size(2)])
    assert layer(F, x, *meta(layer.parameter_sizes()), *meta(layer.buffer_sizes())).shape == layer.y_size(2)


def test_bytes_and_flops():
    conv, pool, norm = BY_NAME["mobilenet.dw56"], BY_NAME["lenet.pool"], BY_NAME["bn.fc4096"]
    x, w = 128 * 56 * 56, 128 * 9
    assert conv.least_bytes("forward", 1, 4) == 4 * (2 * x + w)
    assert conv.least_bytes("backward", 1, 4) == 4 * (3 * x + 2 * w)
    assert conv.flops("backward", 1) == 2 * conv.flops("forward", 1) == 4 * x * 9
    assert pool.least_bytes("forward", 1, 4) == 20 * (28 * 28 * 4 + 14 * 14 * 5)
    assert norm.least_bytes("backward", 256, 2) == 3 * 2 * 256 * 4096


def test_selection():
    assert [layer.name for layer in layers.select("lenet", quick=True)] == ["lenet.conv1", "lenet.conv2", "lenet.pool"]
    assert len(layers.select("1x1")) == 6  # by the group's name; "inception.1x1" is in it
    assert layers.layouts(BY_NAME["bn.fc4096"], "both") == ["NC"]
    assert layers.layouts(BY_NAME["vgg.pool"], "nhwc") == ["NHWC"]
    with pytest.raises(SystemExit):
        run_layers.parse(["--filter", "no such layer"])


def test_a_command_is_layers_unless_another_is_named(monkeypatch):
    called = []
    for module in run.COMMANDS.values():
        monkeypatch.setattr(f"{module}.main", lambda arguments, module=module: called.append((module, arguments)) or 3)
    for arguments in ([], ["--quick"], ["layers", "--quick"], ["models", "--filter", "x"], ["compare", "a", "b"]):
        assert run.main(arguments) == 3
    assert called == [
        ("run_layers", []), ("run_layers", ["--quick"]), ("run_layers", ["--quick"]),
        ("run_models", ["--filter", "x"]), ("compare", ["a", "b"]),
    ]  # fmt: skip


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit):
        run.main(["--help"])
    before_usage = capsys.readouterr().out.split("usage")[0]
    assert all(f"run.py {command}" in before_usage.replace("[", "").replace("]", "") for command in run.COMMANDS)


# The figures


def test_statistics():
    timing = measure.Timing.of([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (timing.median, timing.low, timing.high, timing.samples) == (3.0, 2.0, 4.0, 5)
    assert report.geomean([0.5, 2.0]) == pytest.approx(1.0)
    assert report.geomean([]) is None


def test_summary_and_headline():
    rows = [
        row("a", 1.0, 2.0),
        row("a", 4.0, 2.0, layout="NHWC"),
        row("b", 2.0, 1.0, direction="backward"),
        row("p", 1.0, 3.0, group="pool"),
    ]
    rows.append(rows[0] | {"layer": "wrong", "ratio": None, "ok": False})
    summary = report.summarize(rows)
    assert list(summary) == ["dense", "pool"]
    assert summary["dense"]["NCHW forward"] == pytest.approx(2.0)
    assert summary["dense"]["all"] == pytest.approx((2.0 * 0.5 * 0.5) ** (1 / 3))
    assert summary["dense"]["better forward"] == pytest.approx(2.0)  # 2 ms in either layout against 1 ms
    assert summary["dense"]["worst"]["ratio"] == 0.5
    assert report.headline(summary) == ("dense", summary["dense"]["all"])


def test_calls_alternate():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    times = measure.time_in_turn(calls, measure.timer("cpu"), 60, (0, 8))
    assert [timing.samples for timing in times.values()] == [8, 8]
    rounds = [tuple(order[i : i + 2]) for i in range(2, len(order), 2)]  # after a warm-up of both
    assert set(rounds) == {("a", "b"), ("b", "a")}


def test_check_sees_a_missing_term_and_nan():
    x = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    exact = (x.double() ** 2).sum(1)

    def checked(result):
        return measure.check([result], [exact], [("y", x.shape[1])], "float64", tf32=False)

    assert checked((x**2).sum(1)).ok
    assert not checked((x[:, 1:] ** 2).sum(1)).ok
    assert not checked(torch.full((64,), math.nan)).ok
    assert not checked(torch.zeros(63)).ok


# The device


def test_a_gpu_that_torch_cannot_use_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(machine, "gpu_present", lambda: True)
    with pytest.raises(SystemExit, match="GPU that torch cannot use: .* without CUDA.* --device cpu"):
        machine.choose_device("auto")
    assert machine.choose_device("cpu") == "cpu"


# What is written


def test_readme_markers(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("a\n<!-- benchmark:cpu -->\nold\n<!-- /benchmark:cpu -->\nb\n<!-- benchmark:cpu rows -->\n")
    report.write_between(page, "cpu", r"new \1")
    report.write_between(page, "cpu", r"newer \1")
    assert page.read_text().startswith("a\n<!-- benchmark:cpu -->\nnewer \\1\n<!-- /benchmark:cpu -->\nb\n")
    with pytest.raises(ValueError, match="benchmark:cuda"):
        report.write_between(page, "cuda", "")


def test_readme_tables(tmp_path):
    rows = [row("a", 1.0, 2.0), row("b", 1.0, 0.5, layout="NHWC", direction="backward")]
    result = {
        "date": "2026-01-02T03:04:05", "title": "a machine", "summary": report.summarize(rows), "rows": rows,
        "settings": {"dtype": "float32", "quick": False, "filter": ""},
        "limits": {"copy_gb_s": 10.0, "matmul_gflop_s": 100.0},
    }  # fmt: skip
    report.write_json(tmp_path / "cpu-float32.json", result)
    report.write_json(tmp_path / "cpu-bfloat16.json", result | {"settings": {**result["settings"], "quick": True}})
    assert readme.results(tmp_path, "cpu") == [result]
    assert readme.results(tmp_path, "cuda") == []
    summary = report.markdown_summary(result)
    assert summary.startswith("2026-01-02, float32: a machine.")
    assert "| dense | 1.00× | 2.00× | – | – | 0.50× | 2.00× | 0.50× | 0.50× b NHWC bwd |" in summary
    short = report.markdown_short([result | {"title": "a CPU, 2 threads · torch 2"}])
    assert short.splitlines()[0] == f"|  | {' | '.join(layers.GROUPS)} |"
    assert short.splitlines()[2:] == ["| a CPU, 2 threads, float32 | 1.00× | – | – | – | – | – |"]
    assert report.markdown_rows(result).count("\n| ") == 2 + len(rows)


def test_floors_are_the_slower_of_operations_and_bytes():
    conv, pool = (next(x for x in layers.LAYERS if x.name == name) for name in ("resnet.3x3.28", "resnet.pool"))
    operations = 2 * 256 * 128 * 28**2 * 128 * 9
    assert floors.floor_us(conv, "forward", torch.bfloat16) == pytest.approx(operations / 790e6)
    assert floors.floor_us(conv, "backward", torch.float32) == pytest.approx(2 * operations / 67e6)
    least = 256 * 64 * (4 * 112**2 + 5 * 56**2)
    assert floors.floor_us(pool, "forward", torch.float32) == pytest.approx(least / 4.3e6)
    us, algos = floors.predicted(conv, "backward", torch.float32)
    assert algos == "implicit_gemm" and us > floors.floor_us(conv, "backward", torch.float32)


def test_quick_run(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), "--quick", "--filter", "lenet", "--device", "cpu"]
    ended = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.splitlines()[0].count("·") == 2  # device, torch, fastconv
    assert max(map(len, ended.stdout.splitlines()[:-1])) <= report.WIDTH
    result = json.loads((tmp_path / "cpu-float32.json").read_text())
    assert (tmp_path / "cpu-float32.png").read_bytes().startswith(b"\x89PNG")
    assert len(result["rows"]) == 3 * 2 * 2  # layers, layouts, directions
    for measured in result["rows"]:
        check = measured["check"]
        assert measured["ok"] and check["error"] <= check["bound"] and check["reference"] == "float64"
        assert measured["ratio"] == pytest.approx(measured["torch"]["median"] / measured["fastconv"]["median"])


def test_a_wrong_result_is_reported_and_not_timed(tmp_path, monkeypatch, capsys):
    def leaves_out_the_bias(x, weight, bias, *parameters):
        return F.conv2d(x, weight, 0 * bias, *parameters)

    monkeypatch.setitem(measure.LIBRARIES, "fastconv", SimpleNamespace(conv2d=leaves_out_the_bias))
    monkeypatch.setattr(machine, "limits", lambda device, dtype: {"copy_gb_s": 1.0, "matmul_gflop_s": 1.0})
    arguments = ["--quick", "--filter", "lenet.conv1", "--layout", "nchw", "--device", "cpu", "--out", str(tmp_path)]
    assert run.main(arguments) == 1
    assert "WRONG y" in capsys.readouterr().out
    rows = json.loads((tmp_path / "cpu-float32.json").read_text())["rows"]
    assert [row["ok"] for row in rows] == [False, False]
    assert rows[0]["ratio"] is None


# The example


def idx(values):
    return bytes([0, 0, 8, values.dim()]) + struct.pack(f">{values.dim()}I", *values.shape) + bytes(values.flatten())


def test_idx_files(tmp_path):
    images = torch.arange(12, dtype=torch.uint8).view(2, 2, 3)
    (tmp_path / "plain").write_bytes(idx(images))
    (tmp_path / "zipped.gz").write_bytes(gzip.compress(idx(images)))
    assert torch.equal(fashion_mnist.read_idx(tmp_path / "plain"), images)
    assert torch.equal(fashion_mnist.read_idx(tmp_path / "zipped.gz"), images)
    (tmp_path / "short").write_bytes(idx(images)[:-1])
    with pytest.raises(ValueError, match="11 values where its header says 2 × 2 × 3"):
        fashion_mnist.read_idx(tmp_path / "short")
    (tmp_path / "text").write_bytes(b"hello")
    with pytest.raises(ValueError, match="not an IDX file"):
        fashion_mnist.read_idx(tmp_path / "text")
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        fashion_mnist.load(tmp_path)
