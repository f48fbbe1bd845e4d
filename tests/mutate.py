"""Breaks the CUDA kernels in many small ways, and shows which the emulated tests do not notice.

    python tests/mutate.py [FILE[:LINE] …]      of csrc/cuda; default: all

Builds a copy of the tree in build/mutate/tree whose emulated library holds every mutant (see mutation/rewrite.py) and
runs, for each, the emulated tests that can notice it (see mutation/plugin.py). Prints, and writes to
build/mutate/table.txt, what was mutated where and which test failed. Fails if a mutant survives in a line without a
comment "// redundant: reason", at its end or before it.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "mutate"
TREE = WORK / "tree"
sys.path.insert(0, str(ROOT / "tests" / "mutation"))
import rewrite  # noqa: E402

NUMBERS = 1000  # of mutants, at most, that a file has
SECONDS = 5  # of the tests that a mutant is tried with before others are


def write(path, text):
    """Leaves a file alone, and its time, if it has this text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def copy_tree():
    """What git knows or would, and what was built of it, so that only what is mutated is compiled again."""
    if not TREE.exists():
        shutil.copytree(ROOT / "build" / "ninja", TREE / "build" / "ninja")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    )
    names = [name for name in listed.stdout.decode().splitlines() if (ROOT / name).exists()]
    for path in (p for folder in ("csrc", "fastconv", "tests") for p in (TREE / folder).rglob("*.*")):
        if path.suffix != ".so" and str(path.relative_to(TREE)) not in names:
            path.unlink()
    for name in names:
        target = TREE / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name.startswith("csrc/cuda/"):
            continue  # mutate() writes these
        if not target.exists() or target.read_bytes() != (ROOT / name).read_bytes():
            shutil.copy2(ROOT / name, target)


def mutate():
    """Writes the mutated kernels to the copy. Returns the mutants."""
    mutants = []
    for i, path in enumerate(sorted((ROOT / "csrc" / "cuda").iterdir())):
        text = path.read_text()
        if path.suffix in (".cu", ".cuh"):
            text, found = rewrite.rewrite(path, NUMBERS * i + 1)
            assert len(found) < NUMBERS, path
            mutants += found
        write(TREE / "csrc" / "cuda" / path.name, text)
    for name in ("mutants.h", "mutants.cpp"):
        write(TREE / "tests" / "emulation" / name, (ROOT / "tests" / "mutation" / name).read_text())
    return mutants


def build(*options):
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace", *options]
    subprocess.run(command, cwd=TREE, env={**os.environ, "FASTCONV_CUDA": "0"}, check=True)


def digest():
    """Of all that decides how the tests run without a mutant."""
    files = [p for folder in ("tests", "fastconv") for p in sorted((TREE / folder).rglob("*.py"))]
    contents = (p.read_bytes() for p in [*files, TREE / "build" / "ninja" / "libfastconv_emulated.so"])
    return hashlib.sha256(b"".join(hashlib.sha256(c).digest() for c in contents)).hexdigest()[:16]


def run_tests(mutants, orders, workers, sanitizer=None, seconds=SECONDS):
    """{number: (what killed the mutant or "", how many tests could)}"""
    results = WORK / "results.txt"
    results.write_text("")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "plugin", "-p", "no:faulthandler", "tests", "-k", "emulated"]
    options = {
        "--rootdir": TREE,
        "--mutants": ",".join(str(m.number) for m in mutants),
        "--orders": orders,
        "--tests": WORK / f"tests-{digest()}.json",
        "--results": results,
        "--time-factor": 400 if sanitizer else 40,
        "--seconds": seconds,
        "--workers": workers,
    }
    if sanitizer:
        options["--fastconv-sanitizer"] = sanitizer
    path = os.pathsep.join([str(TREE), str(TREE / "tests" / "mutation"), str(TREE / "tests")])
    arguments = [str(x) for option in options.items() for x in option]
    subprocess.run([*command, *arguments], cwd=TREE, env={**os.environ, "PYTHONPATH": path}, check=True)
    return {number: (killer, count) for number, killer, count in map(json.loads, results.read_text().splitlines())}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("places", nargs="*", metavar="FILE[:LINE]")
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    parser.add_argument("--orders", default="forward,reverse,shuffled", help="of the threads (%(default)s)")
    parser.add_argument("--sanitizers", default="address,thread", help="tried on survivors (%(default)s)")
    parser.add_argument("--redundant", action="store_true", help="try annotated mutants with all tests too; takes long")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="at the same time (%(default)s)")
    arguments = parser.parse_args()
    copy_tree()
    places = arguments.places
    mutants = [m for m in mutate() if not places or m.file in places or f"{m.file}:{m.line}" in places]
    if arguments.list:
        print(*(f"{m.file}:{m.line}: {m.what}" for m in mutants), sep="\n")
        return
    build("--emulated")
    fates = run_tests(mutants, arguments.orders, arguments.workers)

    def survivors():
        return [m for m in mutants if not fates[m.number][0] and fates[m.number][1] > 0]

    for sanitizer in filter(None, arguments.sanitizers.split(",")):
        if unexplained := [m for m in survivors() if not m.redundant]:
            build("--sanitizers", sanitizer)
            fates |= run_tests(unexplained, "forward", arguments.workers, sanitizer)
    if left := [m for m in survivors() if arguments.redundant or not m.redundant]:
        fates |= run_tests(left, "forward", arguments.workers, seconds=math.inf)
    lines, counts = [], {"killed": 0, "redundant": 0, "SURVIVED": 0}
    for m in mutants:
        killer, tests = fates[m.number]
        fate = "killed" if killer else "redundant" if m.redundant else "SURVIVED"
        counts[fate] += 1
        lines.append(f"{m.file}:{m.line:<4} {fate:9} {m.what:70} {killer or m.redundant or f'({tests} tests)'}")
    lines.append(f"{len(mutants)} mutants: " + ", ".join(f"{count} {fate}" for fate, count in counts.items()))
    write(WORK / "table.txt", "\n".join(lines) + "\n")
    print(*lines, sep="\n")
    sys.exit(counts["SURVIVED"] > 0)


if __name__ == "__main__":
    main()
