"""Backends: the tests of an op run on the CPU kernels, on the CUDA kernels emulated on the host, and on a GPU.

A test that takes `backend` runs on all three; one that takes `native_backend` leaves out the emulation, for shapes that
would take it too long. `--fastconv-order` lets the emulated threads run in another order; `--fastconv-sanitizer` takes
kernels that were compiled with a sanitizer (`python setup.py build_ext --inplace --sanitizers address,thread`).
"""

import contextlib
import ctypes
from dataclasses import dataclass
from pathlib import Path

import pytest
import sanitizers
import torch

import fastconv
from fastconv import _derivatives, _fake, _ops, _vmap

ROOT = Path(__file__).resolve().parent.parent
PASSED = pytest.StashKey[bool]()
ORDERS = ("forward", "reverse", "shuffled")


def pytest_addoption(parser):
    parser.addoption("--fastconv-order", choices=ORDERS, default="forward", help="of the emulated threads")
    parser.addoption("--fastconv-sanitizer", choices=tuple(sanitizers.RUNTIMES), help="of the emulated kernels")
    parser.addoption(
        "--full", action="store_true", help="also what takes minutes or many GB; ten times the random calls"
    )


def pytest_configure(config):
    if sanitizer := config.getoption("--fastconv-sanitizer"):
        sanitizers.begin_anew(config, sanitizer)
    config.addinivalue_line("markers", "launches_nothing: no kernel runs, since there is nothing to compute")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.when == "call":
        item.stash[PASSED] = report.passed
    return report


@dataclass(frozen=True)
class Backend:
    name: str
    device: str

    @property
    def algorithms(self):
        return fastconv.algorithms("cpu" if self.name == "cpu" else "cuda")

    def put(self, tensor):
        """The tensor on this backend's device, with the same strides."""
        if tensor is None or self.device == "cpu":
            return tensor
        moved = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self.device)
        return moved.copy_(tensor)


def emulated_library_path(sanitizer=None):
    """The emulated library, plain or under a sanitizer; the test is skipped if it is not built."""
    path = ROOT / "build" / "ninja" / f"libfastconv_emulated{f'_{sanitizer}' if sanitizer else ''}.so"
    if not path.exists():
        option = f"--sanitizers {sanitizer}" if sanitizer else "--emulated"
        pytest.skip(f"no emulated kernels: build them with `python setup.py build_ext --inplace {option}`")
    return path


@pytest.fixture(scope="session")
def emulated_library(request):
    """The emulated library, loaded, with its ops' fake kernels, vmap rules and derivatives."""
    path = emulated_library_path(request.config.getoption("--fastconv-sanitizer"))
    torch.ops.load_library(str(path))
    for module in (_fake, _vmap, _derivatives):
        module.register("fastconv_emulated")
    library = ctypes.CDLL(str(path))
    library.fastconv_emulation_switches.restype = ctypes.c_uint64
    library.fastconv_emulation_set_order(ORDERS.index(request.config.getoption("--fastconv-order")), ctypes.c_uint(1))
    return library


@contextlib.contextmanager
def _emulation(library, node):
    _ops.use_namespace("fastconv_emulated")
    before = library.fastconv_emulation_switches()
    try:
        yield Backend("emulated", "cpu")
    finally:
        _ops.use_namespace("fastconv")
    report = sanitizers.new_report()
    assert not report, report
    if node.stash.get(PASSED, False) and node.get_closest_marker("launches_nothing") is None:
        assert library.fastconv_emulation_switches() > before, "this test launched no emulated kernel"


@contextlib.contextmanager
def _open_backend(request):
    if request.param == "emulated":
        with _emulation(request.getfixturevalue("emulated_library"), request.node) as backend:
            yield backend
    elif request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        if not fastconv.planning._introspection().built_with_cuda:
            pytest.skip("fastconv was built without CUDA kernels")
        torch.backends.cudnn.conv.fp32_precision = "ieee"  # the tests of tf32 ask for it
        yield Backend("cuda", "cuda")
    else:
        yield Backend("cpu", "cpu")


@pytest.fixture(params=["cpu", "emulated", "cuda"])
def backend(request):
    with _open_backend(request) as backend:
        yield backend


@pytest.fixture(params=["cpu", "cuda"])
def native_backend(request):
    with _open_backend(request) as backend:
        yield backend


@pytest.fixture(autouse=True)
def fp32_precision():
    """A function that sets torch.backends.cudnn.conv.fp32_precision; what a test has set is undone after it."""
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    yield lambda precision: setattr(conv, "fp32_precision", precision)
    conv.fp32_precision = before


@pytest.fixture(autouse=True)
def _same_start_for_every_test():
    torch.manual_seed(0)
    # More threads would only wait for each other over small tensors. That they give the same bits is a test of each op.
    torch.set_num_threads(1)


@pytest.fixture
def full(request):
    """Whether --full asks for what takes long."""
    return request.config.getoption("--full")


@pytest.fixture
def threads():
    """A function that sets the number of CPU threads for the rest of the test."""
    return torch.set_num_threads


@pytest.fixture
def isas():
    """The instruction sets this machine can run; the one in use is set back after the test."""
    introspect = fastconv.planning._introspection()
    before = introspect.isa()
    yield introspect.isas()
    introspect.use_isa(before)
