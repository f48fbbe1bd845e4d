"""The built library: what it links, and that every instruction set it was built for gives right results."""

import ctypes
import os
import re
import shutil
import subprocess
import sys

import check_ptxas
import check_sass
import kernel_table
import pytest
import test_avg_pool2d
import test_batch_norm
import test_conv2d
import test_max_pool2d
import torch
from conftest import ROOT, Backend
from layouts import lay_out

import fastconv

OBJECTS = ROOT / "build" / "ninja"
ISA_OBJECTS = sorted(OBJECTS.glob("cpu/*/*.o"))
CPU = Backend("cpu", "cpu")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def output_of(*command):
    if shutil.which(command[0]) is None:
        pytest.skip(f"no {command[0]}")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_library_needs_neither_python_nor_the_cuda_driver():
    needed = [line for line in output_of("readelf", "-d", str(fastconv._ops.LIBRARY)).splitlines() if "NEEDED" in line]
    libraries = " ".join(needed)
    assert "libtorch.so" in libraries and "libtorch_cpu.so" in libraries
    for other in ("python", "libcuda.", "libcudart", "libc10_cuda", "libtorch_cuda"):
        assert other not in libraries


def test_the_stream_symbol_is_weak():
    symbols = output_of("nm", "-D", str(fastconv._ops.LIBRARY)).splitlines()
    assert [s.split()[-2] for s in symbols if s.endswith("aoti_torch_get_current_cuda_stream")] == ["w"]


def test_a_cuda_torch_resolves_the_stream_symbol():
    resolved = ctypes.CDLL(str(fastconv._ops.LIBRARY)).fastconv_stream_symbol_resolved
    resolved.restype = ctypes.c_bool
    if torch.version.cuda is None:
        assert not resolved()
        pytest.skip("this torch was built without CUDA, and the symbol is null as it should be")
    assert resolved()


@pytest.mark.skipif(not ISA_OBJECTS, reason="no objects of a build")
def test_kernel_objects_define_no_symbol_that_the_linker_may_merge():
    """A weak definition compiled for AVX-512 could replace the baseline's and run where there is no AVX-512."""
    for path in ISA_OBJECTS:
        # W, V: weak; u: unique. Lower case w and v are undefined references.
        weak = [line for line in output_of("nm", "-C", str(path)).splitlines() if line[17:18] in ("W", "V", "u")]
        assert not weak, f"{path.parent.name}/{path.name}: {weak[:3]}"


def test_this_machine_runs_its_best_instruction_set():
    introspect = fastconv.planning._introspection()
    assert introspect.isas()[0] == "baseline" and introspect.isa() == introspect.isas()[-1]
    with pytest.raises(ValueError, match="this machine has no mmx"):
        introspect.use_isa("mmx")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512_bf16"])
def test_every_instruction_set_gives_right_results(isas, isa, dtype):
    if isa not in isas:
        pytest.skip(f"this machine has no {isa}")
    fastconv._introspect.use_isa(isa)
    depthwise, dense = test_conv2d.CASES[12], (test_conv2d.CASES[5], test_conv2d.CASES[16])
    for layout in ("contiguous", "channels_last"):
        for algo in fastconv.algorithms():
            cases = {"depthwise": (depthwise,), "winograd": test_conv2d.MEDIUM_CASES[:1]}
            cases["grouped"] = (depthwise, test_conv2d.CASES[5], test_conv2d.CASES[11])
            for case in cases.get(algo, (depthwise, *dense)):
                test_conv2d.check(CPU, case, dtype, layout, algo)
        for size in ((3, 35, 7, 9), (2, 3, 21, 17)):
            x = lay_out(test_max_pool2d.FILLS["NaN and infinities"](size).to(dtype), layout)
            test_max_pool2d.check_values(CPU, x, (3, 2, 1, 1, False))
            test_max_pool2d.check_gradient(CPU, x.nan_to_num(), (3, 2, 1, 1, False))
            for case in test_avg_pool2d.SAMPLE:
                test_avg_pool2d.check(CPU, case, lay_out(torch.randn(case.x).to(dtype), layout))
            test_batch_norm.check(CPU, (torch.randn(size) + 2).to(dtype), layout)
            test_batch_norm.check(CPU, torch.randn(size).to(dtype), layout, training=False)
    if dtype.itemsize == 2:
        test_conv2d.check_every_value(CPU, dtype)


@pytest.mark.skipif(not ISA_OBJECTS, reason="no objects of a build")
def test_the_baseline_runs_on_a_processor_without_avx(isas, tmp_path):
    """The kernels under an emulated Nehalem, where an AVX instruction is illegal, give the bits that they give here."""
    if shutil.which("qemu-x86_64") is None:
        pytest.skip("no qemu-x86_64 (apt install qemu-user)")
    driver = str(tmp_path / "isa_driver")
    objects = [*OBJECTS.glob("plan/*.o"), OBJECTS / "cpu" / "dispatch.o", *ISA_OBJECTS]
    output_of(os.environ.get("CXX", "g++"), "-std=c++17", str(ROOT / "tests/isa_driver.cpp"), *objects, "-o", driver)
    native = output_of(driver, "baseline")
    assert len(native.splitlines()) > 200
    assert output_of("qemu-x86_64", "-cpu", "Nehalem", driver, "baseline") == native
    if "avx2" in isas:  # and a kernel of another instruction set would have been noticed
        assert output_of(driver, "avx2") != native


def test_a_tensor_core_kernel_without_such_instructions_is_noticed():
    sass = """
        arch = sm_80
            Function : conv2d_mma_kernel
            /*0000*/  LDGSTS.E.BYPASS.128 [R2], [R4.64] ;
            /*0010*/  @!P0 HMMA.16816.F32 R48, R52, R58, R48 ;
    """
    assert not list(check_sass.complaints(check_sass.count(sass)))
    (complaint,) = check_sass.complaints(check_sass.count(sass.replace("HMMA", "FFMA")))
    assert complaint == "sm_80: conv2d_mma_kernel has no mma instruction"


def test_an_implicit_gemm_without_asynchronous_copies_is_noticed():
    sass = """
        arch = sm_90a
            Function : conv2d_implicit_gemm_kernelIfLi64E
            /*0000*/  LDGSTS.E [R2], [R4.64] ;
    """
    assert not list(check_sass.complaints(check_sass.count(sass)))
    (complaint,) = check_sass.complaints(check_sass.count(sass.replace("LDGSTS", "LDG")))
    assert complaint == "sm_90a: conv2d_implicit_gemm_kernelIfLi64E has no cp.async instruction"


PTXAS = """ptxas info    : Compiling entry function '_Z1kv' for 'sm_80'
ptxas info    : Function properties for _Z1kv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 360 bytes cmem[0]
"""


@pytest.mark.parametrize(
    ("clean", "planted", "complaint"),
    [
        ("0 bytes spill stores, 0 bytes", "8 bytes spill stores, 4 bytes", "_Z1kv sm_80: 0 bytes stack frame, 8 bytes"),
        ("ptxas info    : Used", "ptxas info    : (C7510) Potential Performance Loss\nptxas info    : Used", "(C7510)"),
        ("ptxas info    : Used", "ptxas warning : Registers are spilled\nptxas info    : Used", "are spilled"),
        ("ptxas info    : Function", "x.cu(3): warning #177-D: unused\nptxas info    : Function", "#177-D"),
    ],
)
def test_what_ptxas_complains_of_fails_the_check(tmp_path, monkeypatch, capsys, clean, planted, complaint):
    log = tmp_path / "kernel.o.log"
    monkeypatch.setattr(check_ptxas, "LOGS", tmp_path)
    log.write_text(PTXAS)
    assert check_ptxas.read(log) == ([], [("_Z1kv", "sm_80", 40, 0, 0)])
    with pytest.raises(SystemExit) as ended:
        check_ptxas.main()
    assert not ended.value.code
    log.write_text(PTXAS.replace(clean, planted))
    with pytest.raises(SystemExit) as ended:
        check_ptxas.main()
    assert ended.value.code == 1 and complaint in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared_bytes", "blocks"),
    [
        ("sm_90", 256, 128, 20 << 10, 2),  # registers: 65536 / (256 · 128)
        ("sm_90", 64, 32, 57 << 10, 3),  # shared memory: 228 KiB / 58 KiB
        ("sm_80", 1024, 32, 0, 2),  # threads
        ("sm_80", 32, 16, 0, 32),  # blocks
        ("sm_75", 64, 65, 0, 14),  # registers: 65536 / (2 · 9 · 256)
    ],
)
def test_theoretical_occupancy(arch, threads, registers, shared_bytes, blocks):
    limits = kernel_table.MULTIPROCESSORS[arch]
    assert limits.blocks_of(threads, registers, shared_bytes) == blocks
    assert limits.occupancy(threads, registers, shared_bytes) == blocks * threads / limits.threads


def test_the_tests_that_the_readme_names_exist():
    table = (ROOT / "README.md").read_text().split("| supported | test |")[1].split("\n\n")[0]
    named = set(re.findall(r"`(test_\w+(?:\.py)?)`", table))
    sources = {path.name: path.read_text() for path in (ROOT / "tests").glob("test_*.py")}
    defined = set(sources) | {name for text in sources.values() for name in re.findall(r"def (test_\w+)", text)}
    assert len(named) > 20 and named <= defined, named - defined


def test_import_without_introspection():
    code = (
        "import sys; sys.modules['fastconv._introspect'] = None\n"
        "import fastconv, torch\n"
        "fastconv.conv2d(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 2, 2))\n"
        "assert not hasattr(torch.ops.fastconv_emulated, 'conv2d_fprop')\n"
        "try: fastconv.algorithms()\n"
        "except ImportError as error: assert 'built for one version of Python' in str(error)\n"
        "else: sys.exit('no error')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
