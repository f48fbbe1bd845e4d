"""run.py models: what is selected, checked, timed, divided and correlated."""

import json
import math
import time

import pytest
import torch
from torch import nn
from torch.profiler import record_function

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

import machine  # noqa: E402
import measure  # noqa: E402
import model_memory  # noqa: E402
import models  # noqa: E402
import networks  # noqa: E402
import operations  # noqa: E402
import readme  # noqa: E402
import run  # noqa: E402
import run_models  # noqa: E402

import fastconv  # noqa: E402


class Small(nn.Sequential):
    """A network with a layer of each kind."""

    def __init__(self, classes=5):
        super().__init__(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.LocalResponseNorm(3), nn.Dropout(),
            nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes),
        )  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(networks.NETWORKS, "Small", networks.Network(Small, (3, 14, 14)))
    return "Small"


def measured(name, mode, compiled=False, layout="NCHW"):
    return models.measure(name, mode, "cpu", layout, 3, measure.timer("cpu"), 0.01, (2, 3), compiled)


# What is selected


def test_selection():
    assert run_models.parse([]).names == list(networks.NETWORKS)
    assert run_models.parse([]).trained == [name for name in networks.NETWORKS if name in models.TRAINED]
    assert run_models.parse(["--quick"]).names == list(models.QUICK)
    assert run_models.parse(["--filter", "resnet-1"]).names == ["ResNet-18", "ResNet-101", "ResNet-152"]
    assert run_models.parse(["--filter", "vgg-16,LeNet-5"]).names == ["LeNet-5", "VGG-16"]
    assert run_models.parse(["--filter", "nin", "--train", "all"]).trained == ["NIN"]
    assert run_models.parse(["--quick", "--train", "none"]).trained == []
    assert set(models.QUICK) | set(models.TRAINED) <= set(networks.NETWORKS)
    assert set(models.TRAINED_QUICK) <= set(models.QUICK)
    with pytest.raises(SystemExit):
        run_models.parse(["--filter", "no such network"])


def test_batches():
    assert models.batch("LeNet-5", "cpu", quick=True) < models.batch("LeNet-5", "cpu") < models.batch("LeNet-5", "cuda")
    assert models.batch("VGG-16", "cpu") == 1


# What is computed


def test_variants_share_parameters_and_have_their_own_statistics(small):
    case = models.Case(small, models.TRAINING, "cpu", "NCHW", 2)
    ours, theirs = case.models[models.OURS], case.models[models.EAGER]
    assert (
        [id(p) for p in ours.parameters()] == [id(p) for p in theirs.parameters()] == [id(p) for p in case.parameters]
    )
    assert type(ours[0]) is fastconv.Conv2d and type(theirs[0]) is nn.Conv2d
    assert ours[1].running_mean is not theirs[1].running_mean
    assert not ours[5].training and ours[1].training  # dropout is off
    again = models.Case(small, models.TRAINING, "cpu", "NCHW", 2)
    assert torch.equal(case.x, again.x) and torch.equal(case.parameters[0], again.parameters[0])
    assert models.Case(small, models.TRAINING, "cpu", "NHWC", 2).x.is_contiguous(memory_format=torch.channels_last)


def test_a_step_computes_the_same_every_time(small):
    case = models.Case(small, models.TRAINING, "cpu", "NCHW", 2)
    before = [p.detach().clone() for p in case.parameters]
    step = case.call(models.OURS)
    step()
    first = [p.grad.clone() for p in case.parameters]
    step()
    assert all(map(torch.equal, first, [p.grad for p in case.parameters])) and any(g.any() for g in first)
    assert all(map(torch.equal, before, case.parameters))


def test_outputs_depend_on_the_images_in_evaluation():
    case = models.Case("MobileNet", models.INFERENCE, "cpu", "NCHW", 2)
    y = case.call(models.EAGER)()
    assert (y[0] - y[1]).norm() > 0.1 * y.norm()
    assert not y.requires_grad


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("mode", models.MODES)
def test_a_row(small, mode, layout):
    row = measured(small, mode, layout=layout)
    assert row["ok"] and not row["failure"] and (row["layer"], row["batch"], row["layout"]) == (small, 3, layout)
    assert row["multiply_adds"] == 8 * 27 * 12 * 12 + 8 * 72 * 4 * 4 + 8 * 5
    assert row["parameters"] == 8 * 28 + 16 + 8 * 73 + 5 * 9
    assert row["ratio"] == pytest.approx(row["torch"]["median"] / row["fastconv"]["median"])
    assert len(row["bounds"]) == (1 if mode == models.INFERENCE else 2)
    for errors in row["check"].values():
        assert max(errors) < 1e-5 and row["bounds"][0] < 1e-5
    assert bool(row["split"]) == (mode == models.TRAINING)
    json.dumps(row)


@pytest.mark.parametrize("wrong", ["bias", "scale", "shape"])
def test_a_wrong_variant_is_reported_and_not_timed(small, monkeypatch, wrong):
    def convert(model):
        class Broken(nn.Conv2d):
            def _conv_forward(self, x, weight, bias):
                if wrong == "bias":
                    return super()._conv_forward(x, weight, None)
                return super()._conv_forward(x, weight, bias) * (1 + 1e-4)

        model[0].bias.data.fill_(0.1)
        model[0].__class__ = Broken
        return nn.Sequential(model, nn.Unflatten(1, (5, 1))) if wrong == "shape" else model

    monkeypatch.setattr(fastconv, "convert", convert)
    row = measured(small, models.INFERENCE)
    assert not row["ok"] and row["fastconv"] is None and row["ratio"] is None and row["torch"]
    assert row["check"]["fastconv"][0] > row["bounds"][0]
    assert run_models.verdict(row).startswith("WRONG fastconv")


def test_wrong_gradients_are_reported(small, monkeypatch):
    class Broken(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(x, 0.9 * weight + 0.1 * weight.detach(), bias)

    def convert(model):
        model[6].__class__ = Broken
        return model

    monkeypatch.setattr(fastconv, "convert", convert)
    row = measured(small, models.TRAINING)
    outputs, gradients = row["check"]["fastconv"]
    assert not row["ok"] and outputs <= row["bounds"][0] and gradients > row["bounds"][1] and row["fastconv"] is None


def test_an_error_is_a_row(small, monkeypatch):
    def too_large(*_):
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(models, "check", too_large)
    row = measured(small, models.TRAINING)
    assert row["failure"] == "RuntimeError: out of memory" == run_models.verdict(row) and not row["ok"]


def test_what_does_not_compile_is_left_out(small, monkeypatch):
    def compile(model):
        def refuse(x):
            raise OSError("no compiler")

        return refuse

    monkeypatch.setattr(torch, "compile", compile)
    row = measured(small, models.INFERENCE, compiled=True)
    assert row["ok"] and row["torch.compile"] is None and row["notes"] == ["Small: no torch.compile: OSError"]
    monkeypatch.setattr(torch, "compile", lambda model: model)
    row = measured(small, models.INFERENCE, compiled=True)
    assert row["ok"] and row["torch.compile"]["samples"] >= 2 and row["notes"] == []


@pytest.mark.parametrize("mode", models.MODES)
def test_fused_layers_are_a_variant_where_they_exist(small, monkeypatch, mode):
    folds = []

    def fuse(model, fold=False):
        assert type(model[0]) is fastconv.Conv2d and model[1].training == (mode == models.TRAINING)
        folds.append(fold)
        return model

    monkeypatch.setattr(fastconv, "fuse", fuse, raising=False)
    row = measured(small, mode)
    assert row["ok"] and row["fused"] and folds == [mode == models.INFERENCE]


def test_errors_are_over_the_norm():
    exact = [torch.tensor([3.0, 0.0]).double(), torch.tensor([[4.0]]).double()]
    assert models.relative_error([torch.tensor([3.0, 0.5]), torch.tensor([[4.0]])], exact) == pytest.approx(0.1)
    assert models.relative_error([torch.zeros(3), torch.zeros(1, 1)], exact) == math.inf
    assert math.isnan(models.relative_error([torch.tensor([3.0, math.nan]), torch.zeros(1, 1)], exact))


# How a step is divided


def test_parts_by_name():
    names = {
        "aten::convolution_backward": models.CONV, "fastconv::conv2d_wgrad": models.CONV,
        "aten::max_pool2d_with_indices": models.POOL, "fastconv::avg_pool2d_forward": models.POOL,
        "aten::native_batch_norm": models.BATCH_NORM, "fastconv::batch_norm_train": models.BATCH_NORM,
        "aten::avg_pool3d": models.REST, "aten::addmm": None, "aten::threshold_backward": None,
    }  # fmt: skip
    assert {name: models.part(name) for name in names} == names


@pytest.mark.parametrize("variant", [models.OURS, models.EAGER])
def test_a_step_is_divided_into_its_parts(small, variant, capfd):
    case = models.Case(small, models.TRAINING, "cpu", "NCHW", 4)
    found = models.split(case.call(variant), "cpu")
    assert list(found) == list(models.PARTS) and all(ms > 0 for ms in found.values())
    assert capfd.readouterr().err == ""
    convolution = nn.Conv2d(16, 16, 3).requires_grad_() if variant == models.EAGER else fastconv.Conv2d(16, 16, 3)
    x = torch.randn(8, 16, 30, 30)
    alone = models.split(lambda: convolution(x).sum().backward(), "cpu")
    assert alone[models.POOL] == alone[models.BATCH_NORM] == 0 and alone[models.CONV] > alone[models.REST]


def test_a_function_within_another_is_counted_once():
    took = []

    def call():
        start = time.perf_counter()
        with record_function("conv"), record_function("conv within"):
            time.sleep(0.02)
        took.append(1e3 * (time.perf_counter() - start))

    assert 20 <= models.split(call, "cpu")[models.CONV] < 1.5 * took[-1]


def test_peak_memory_holds_the_gradients():
    found = model_memory.measure_memory("LeNet-5", "cpu", "NCHW", 4)
    if not found:
        pytest.skip("this system does not tell a process's peak")
    gradients = 4 * 1_256_080
    assert set(found) >= {models.OURS, models.EAGER}
    assert all(gradients < peak < 4 * gradients for peak in found.values())


# Operations and time


def rows_of(times):
    def timing(ms):
        return {"median": ms, "low": ms, "high": ms, "samples": 3}

    return [
        {"layer": f"n{i}", "direction": "inference", "batch": 2, "multiply_adds": 10**i}
        | {variant: timing(2 * ms) if variant == "torch" else None for variant in models.VARIANTS}
        for i, ms in enumerate(times, 6)
    ]


def test_correlation():
    found = operations.points(rows_of([1.0, 10.0, 100.0]), "torch")
    assert found == [("n6", 10**6, 1.0), ("n7", 10**7, 10.0), ("n8", 10**8, 100.0)]
    r = operations.correlate(found)
    assert r["networks"] == 3 and [r[key] for key in ("linear", "log", "rank", "spread")] == pytest.approx([1] * 4)
    r = operations.correlate([("a", 1, 1.0), ("b", 10, 100.0), ("c", 100, 10.0)])
    assert r["rank"] == r["log"] == pytest.approx(0.5) and r["spread"] == pytest.approx(100.0)
    assert operations.correlate(found[:2]) is None
    assert operations.points(rows_of([1.0]), "fastconv") == []
    assert operations.ranks([3.0, 1.0, 3.0]) == [1.5, 0.0, 1.5]


def test_the_plot(tmp_path):
    rows = rows_of([1.0, 30.0, 100.0])
    result = {"rows": rows, "correlation": {"torch": operations.correlate(operations.points(rows, "torch"))},
              "title": "a machine", "date": "2026-01-02"}  # fmt: skip
    assert operations.draw(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert not operations.draw(result | {"rows": rows[:2]}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


# A run


def test_a_run(tmp_path, monkeypatch, capsys, small):
    kept = [small, "Smaller", "LeNet-5"]
    monkeypatch.setitem(networks.NETWORKS, "Smaller", networks.Network(Small, (3, 8, 8)))
    monkeypatch.setattr(run_models, "NETWORKS", dict.fromkeys(kept))
    monkeypatch.setattr(models, "TRAINED", (small,))
    monkeypatch.setattr(run_models, "SECONDS", 0.01)
    monkeypatch.setattr(run_models, "ROUNDS", (2, 2))
    monkeypatch.setattr(model_memory, "measure_memory", lambda *_: {"fastconv": 3 * 2**20, "torch": 5 * 2**20})
    arguments = ["models", "--no-compile", "--device", "cpu", "--out", str(tmp_path)]
    assert run.main(arguments) == 0
    out = capsys.readouterr().out
    result = json.loads((tmp_path / "models-cpu.json").read_text())
    assert [(row["layer"], row["direction"]) for row in result["rows"]] == [
        (small, "inference"), (small, "training"), ("Smaller", "inference"), ("LeNet-5", "inference")
    ]  # fmt: skip
    assert set(result["correlation"]) >= {"fastconv", "torch"} and "of the ranks" in out
    assert (tmp_path / "models-cpu.png").exists()
    assert f"{small} training ·" in out and "ms by what computes" in out and "MiB at its peak" in out
    assert max(map(len, out.splitlines()[3:-1])) <= 140
    page = readme.markdown_models(tmp_path / "models-cpu.json")
    assert "**networks, NCHW**" in page and page.count(f"\n| {small} | training | ") == 1
    assert f"\n| {small} | 64 | 3 | 5 |" in page
    assert readme.markdown_models(tmp_path / "none.json") == "Whole networks: not measured."


def test_a_wrong_result_is_the_exit_code(tmp_path, monkeypatch, capsys, small):
    monkeypatch.setattr(models, "check", lambda case: ({v: [1.0] for v in case.models}, [0.5]))
    monkeypatch.setattr(machine, "describe", lambda device: {"device": device})
    monkeypatch.setattr(machine, "title", lambda described: "a machine")
    monkeypatch.setattr(run_models, "NETWORKS", {small: None})
    assert run_models.main(["--train", "none", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "WRONG fastconv, torch" in capsys.readouterr().out
