"""Builds fastconv: one ninja file for libfastconv.so, fastconv/_introspect and the emulated test library.

Environment variables of the build:
  FASTCONV_CUDA         auto (default: CUDA kernels if an nvcc is found), 0 (never), 1 (fail if none is found)
  TORCH_CUDA_ARCH_LIST  e.g. "8.0;9.0+PTX"; 9.0 means 9.0a. Default: 7.5 8.0 9.0a 10.0 and 8.0 as PTX
  CUDA_HOME, CXX, MAX_JOBS  as elsewhere
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD = Path("build/ninja")  # paths are relative to ROOT, where ninja runs: a copied tree stays built
DEFAULT_ARCHS = ["75", "80", "90a", "100", "80+PTX"]
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # torch 2.10 and everything after it

ISA_FLAGS = {"baseline": ""}
if platform.machine() == "x86_64":
    ISA_FLAGS["avx2"] = "-mavx2 -mfma -mf16c"
    ISA_FLAGS["avx512"] = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c"
    ISA_FLAGS["avx512_bf16"] = f"{ISA_FLAGS['avx512']} -mavx512bf16"
BFLOAT16_FILES = "_bfloat16.cpp"  # end the names of all there is for avx512_bf16, whose other kernels are AVX-512's

# What the emulated kernels are compiled with.
SANITIZERS = {
    "": "",
    "address": "-fsanitize=address,undefined -fno-sanitize-recover=all",
    "thread": "-fsanitize=thread",
}
# Files of tests/emulation that access memory as kernels do.
EMULATED_MODELS = ("faults.cpp", "faults_ptx.cpp", "ptx_copy.cpp", "ptx_matrix.cpp")
EMULATED_OPS = ("allocate.cpp", "device.cpp")  # files of csrc/ops that the emulation has its own of


def check_platform():
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        sys.exit(f"fastconv supports Linux on x86-64 and aarch64, not {sys.platform} on {platform.machine()}")


def nvcc_candidates():
    """Every place where an nvcc may be, best first."""
    if os.environ.get("CUDA_HOME"):
        yield Path(os.environ["CUDA_HOME"]) / "bin" / "nvcc"
    yield Path("/usr/local/cuda/bin/nvcc")
    if on_path := shutil.which("nvcc"):
        yield Path(on_path)
    for folder in map(Path, sys.path):  # pip's nvidia-cuda-nvcc
        yield folder / "nvidia" / "cu13" / "bin" / "nvcc"


def toolkit_root(nvcc):
    """The toolkit that an nvcc belongs to, or None. The file may be a shim, so it is asked."""
    try:
        dryrun = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True, timeout=60)
    except OSError:
        return None
    for line in (dryrun.stdout + dryrun.stderr).splitlines():
        if line.startswith("#$ TOP="):
            return (nvcc.parent / line.removeprefix("#$ TOP=")).resolve()
    return None


def find_cuda():
    """(toolkit root, reason): the root is None where CUDA kernels are not built, and the reason says why."""
    wanted = os.environ.get("FASTCONV_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"FASTCONV_CUDA is {wanted!r}: expected auto, 0 or 1")
    if wanted == "0":
        return None, "FASTCONV_CUDA=0"
    tried = []
    for nvcc in nvcc_candidates():
        if nvcc.exists():
            root = toolkit_root(nvcc)
            if root and (root / "include" / "cuda_runtime.h").exists() and cudart_folder(root):
                return root, ""
            tried.append(f"{nvcc} (its toolkit lacks headers or libcudart_static.a)")
    reason = "no usable nvcc in CUDA_HOME, /usr/local/cuda, PATH or pip" + "".join(f"; tried {t}" for t in tried)
    if wanted == "1":
        sys.exit(f"FASTCONV_CUDA=1, but there is {reason}")
    return None, reason


def cudart_folder(root):
    for folder in ("lib64", "lib", f"targets/{platform.machine()}-linux/lib", "targets/sbsa-linux/lib"):
        if (root / folder / "libcudart_static.a").exists():
            return root / folder
    return None


def architectures(nvcc):
    """nvcc's -gencode flags, for what TORCH_CUDA_ARCH_LIST asks and this nvcc knows."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(",", ";").replace(" ", ";")
    archs = [a.replace(".", "") for a in asked.split(";") if a] or DEFAULT_ARCHS
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    flags = []
    for arch in archs:
        number, ptx = arch.removesuffix("+PTX"), arch.endswith("+PTX")
        number = "90a" if number == "90" else number
        if f"sm_{number.rstrip('a')}" not in known:
            continue
        if ptx:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        if not ptx or archs is not DEFAULT_ARCHS:
            flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
    if not flags:
        sys.exit(f"this nvcc knows none of the architectures {', '.join(archs)}")
    return list(dict.fromkeys(flags))


class Ninja:
    """Collects rules and edges of build.ninja."""

    def __init__(self):
        self.lines = ["ninja_required_version = 1.5", f"builddir = {BUILD}"]

    def rule(self, name, command, deps=True):
        self.lines += [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
        if deps:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def edge(self, rule, out, sources, **variables):
        sources = " ".join(str(s) for s in sources)
        self.lines.append(f"build {out}: {rule} {sources}")
        self.lines += [f"  {key} = {value}" for key, value in variables.items()]
        return out


def write_ninja(cuda_root):
    """Writes build.ninja. Returns the paths of libfastconv.so and _introspect."""
    import pybind11
    import torch

    torch_root = Path(torch.__file__).parent
    cxx = os.environ.get("CXX", "g++")
    common = "-std=c++17 -O3 -fPIC -Wall -Wextra -fno-math-errno -fno-trapping-math -ffp-contract=fast"
    torch_flags = f"{STABLE_ABI} -isystem {torch_root}/include -fvisibility=hidden -Wno-maybe-uninitialized"
    n = Ninja()
    n.rule("cxx", f"{cxx} {common} $flags -MMD -MF $out.d -c $in -o $out")
    n.rule("link", f"{cxx} -shared $in $flags -o $out", deps=False)
    emulated_flags = "-x c++ -std=c++20 -O1 -g -fPIC -Wall -Wextra -Wno-unknown-pragmas"
    n.rule("emulated", f"{cxx} {emulated_flags} $flags -MMD -MF $out.d -c $in -o $out")

    def objects(folder, files, rule="cxx", **variables):
        return [n.edge(rule, BUILD / folder / f"{f.stem}.o", [f], **variables) for f in files]

    def sources(pattern):
        return sorted(f.relative_to(ROOT) for f in ROOT.glob(pattern))

    plans = objects(
        "plan", [f for f in sources("csrc/*.cpp") if f.name != "introspect.cpp"] + sources("csrc/plan/*.cpp")
    )
    ops_files = sources("csrc/ops/*.cpp")
    library = plans + objects("ops", ops_files, flags=f"{torch_flags} -DFASTCONV_NAMESPACE=fastconv")

    kernel_files = [f for f in sources("csrc/cpu/*.cpp") if f.name != "dispatch.cpp"]
    library += objects("cpu", [Path("csrc/cpu/dispatch.cpp")])
    for isa, flags in ISA_FLAGS.items():
        # GCC warns of its own AVX-512 headers, and that vectors are passed differently by other instruction sets.
        quiet = "-Wno-maybe-uninitialized -Wno-psabi"
        files = [f for f in kernel_files if f.name.endswith(BFLOAT16_FILES) == (isa == "avx512_bf16")]
        library += objects(f"cpu/{isa}", files, flags=f"-DFASTCONV_ISA={isa} {flags} {quiet}")

    cu_files = sources("csrc/cuda/*.cu")
    link_flags = f"-L{torch_root}/lib -Wl,--no-as-needed -ltorch -ltorch_cpu -lc10 -Wl,--exclude-libs,ALL"
    if cuda_root:
        nvcc = f"{cuda_root}/bin/nvcc"
        # The compiler's report of registers and spills stays beside each object, for the check that reads it.
        n.rule(
            "nvcc",
            f"{nvcc} -ccbin {cxx} -std=c++17 -O3 -Xcompiler=-fPIC,-Wall,-Wextra -Xptxas=-v,-warn-spills "
            f"{' '.join(architectures(nvcc))} -MMD -MF $out.d -c $in -o $out > $out.log 2>&1 || (cat $out.log; false)",
        )
        library += objects("cuda", cu_files, rule="nvcc")
        library += objects("cuda", [Path("csrc/cuda/launchers.cpp")])
        cudart = f"-L{cudart_folder(cuda_root)} -lcudart_static -ldl -lrt -lpthread"
        link_flags += f" {cudart}"
        golden = objects("golden", sources("tests/golden/*.cu"), rule="nvcc")
        n.edge("link", BUILD / "libfastconv_golden.so", golden, flags=f"{cudart} -Wl,--exclude-libs,ALL")
    else:
        library += objects("cuda", [Path("csrc/cuda/absent.cpp")])
    libfastconv = n.edge("link", BUILD / "libfastconv.so", library, flags=f"{link_flags} -Wl,-soname,libfastconv.so")

    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    include = f"-isystem {sysconfig.get_path('include')} -isystem {pybind11.get_include()} -fvisibility=hidden"
    introspect = n.edge(
        "cxx",
        BUILD / f"introspect{suffix}.o",
        [Path("csrc/introspect.cpp")],
        flags=f"{include} -DFASTCONV_WITH_CUDA={int(bool(cuda_root))}",
    )
    module = n.edge("link", BUILD / f"_introspect{suffix}", [introspect, libfastconv], flags="'-Wl,-rpath,$$ORIGIN'")

    # The emulated library, plain and under each sanitizer, which instruments the kernels and not the machine.
    emulation = "-DFASTCONV_EMULATION -Itests/emulation"
    ops_flags = f"{torch_flags} -DFASTCONV_NAMESPACE=fastconv_emulated"
    instrumented = cu_files + [f for f in sources("tests/emulation/*.cpp") if f.name in EMULATED_MODELS]
    instrumented += sources("tests/golden/*.cu")
    machine = [f for f in sources("tests/emulation/*.cpp") if f not in instrumented]
    machine.append(Path("tests/emulation/sanitizers/none.cpp"))
    shared = plans + objects("emulated", [Path("csrc/cuda/launchers.cpp"), Path("csrc/cpu/dispatch.cpp")])
    shared += [o for o in library if o.parent.parent.name == "cpu"]
    shared += objects("emulated/ops", [f for f in ops_files if f.name not in EMULATED_OPS], flags=ops_flags)
    shared += objects("emulated/machine", machine, rule="emulated", flags=f"{emulation} {ops_flags}")
    for sanitizer, flags in SANITIZERS.items():
        name = f"emulated_{sanitizer}" if sanitizer else "emulated"
        emulated = objects(name, instrumented, rule="emulated", flags=f"{emulation} {flags}")
        if sanitizer:
            emulated += objects(name, [Path(f"tests/emulation/sanitizers/{sanitizer}.cpp")], rule="emulated")
        flags = f"{link_flags} {flags} -Wl,-Bsymbolic"
        n.edge("link", BUILD / f"libfastconv_{name}.so", shared + emulated, flags=flags)
    n.lines.append(f"default {libfastconv} {module}")
    (ROOT / BUILD).mkdir(parents=True, exist_ok=True)
    (ROOT / BUILD / "build.ninja").write_text("\n".join(n.lines) + "\n")
    return [libfastconv, module]


def run_ninja(*targets):
    import ninja

    jobs = os.environ.get("MAX_JOBS", str(os.cpu_count()))
    command = [Path(ninja.BIN_DIR) / "ninja", "-C", ROOT, "-f", BUILD / "build.ninja", "-j", jobs, *targets]
    if subprocess.run(command).returncode:
        sys.exit("fastconv: the build failed, see above")


class Build(build_ext):
    """`build_ext` by ninja; with --emulated and --golden also the libraries that the tests use."""

    user_options = build_ext.user_options + [
        ("emulated", None, "also build libfastconv_emulated.so, the emulated CUDA kernels"),
        ("sanitizers=", None, "also build it under these: address,thread"),
        ("golden", None, "also build libfastconv_golden.so, which runs the wrappers of ptx.cuh on a GPU"),
    ]
    boolean_options = build_ext.boolean_options + ["emulated", "golden"]

    def initialize_options(self):
        super().initialize_options()
        self.emulated = self.golden = False
        self.sanitizers = ""

    def run(self):
        check_platform()
        cuda_root, reason = find_cuda()
        print(
            f"fastconv: CUDA kernels by {cuda_root}/bin/nvcc"
            if cuda_root
            else f"fastconv: building the CPU part only ({reason})",
            flush=True,
        )
        outputs = write_ninja(cuda_root)
        run_ninja()
        sanitizers = [s for s in self.sanitizers.split(",") if s]
        if unknown := [s for s in sanitizers if s not in SANITIZERS]:
            sys.exit(f"fastconv: --sanitizers are address and thread, not {', '.join(unknown)}")
        emulated = [""] if self.emulated else []
        for sanitizer in emulated + sanitizers:
            run_ninja(str(BUILD / f"libfastconv_{'_'.join(filter(None, ['emulated', sanitizer]))}.so"))
        if self.golden:
            if not cuda_root:
                sys.exit(f"--golden needs an nvcc: {reason}")
            run_ninja(str(BUILD / "libfastconv_golden.so"))
        in_place = self.inplace or getattr(self, "editable_mode", False)
        package = (ROOT if in_place else Path(self.build_lib)) / "fastconv"
        package.mkdir(parents=True, exist_ok=True)
        for output in outputs:
            target = package / output.name
            target.unlink(missing_ok=True)  # a process that has the old one mapped keeps it
            shutil.copy2(ROOT / output, target)


setup(ext_modules=[Extension("fastconv._introspect", ["csrc/introspect.cpp"])], cmdclass={"build_ext": Build})
