"""``make test-portable``: the numeric tests with other processors' instruction sets, with one thread and two.

    python -m benchmarks.portable                  # every variant, one after another
    python -m benchmarks.portable --only avx2-1    # one of them
    python -m benchmarks.portable -- -x -k losses  # what follows -- goes to pytest

A processor shows itself in the order in which products and sums are formed. torch (``ATEN_CPU_CAPABILITY``), oneDNN,
MKL and OpenBLAS can each be told to take the code of an older one. All test files run but those that compute nothing,
which :data:`LEFT_OUT` names (``tests/promises/test_portable.py`` checks them). Prints the minutes, asserts none.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
INSTRUCTIONS = {
    "own": {},
    "default": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "DNNL_MAX_CPU_ISA": "SSE41",  # its former name, which some builds read
        "MKL_CBWR": "COMPATIBLE",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "OPENBLAS_CORETYPE": "Prescott",
    },
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "DNNL_MAX_CPU_ISA": "AVX2",
        "MKL_CBWR": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "OPENBLAS_CORETYPE": "Haswell",
    },
}
"""On ARM, ``default`` is torch's code without SVE; ``avx2`` is left out there."""
VARIANTS = {f"{name}-{threads}": (name, threads) for name in INSTRUCTIONS for threads in (1, 2)}
del VARIANTS["own-1"]  # which is make test
LEFT_OUT = {
    "texts, names and settings": (
        *(
            "architecture",
            "config",
            "conversations",
            "docs",
            "environment",
            "lmms_command",
            "manifest",
            "order",
            "parquet",
        ),
        *("portable", "stranger_names"),
    ),
    "bytes, files and processes": (
        *("arrays", "stopped_builds", "chaos", "cluster", "locks", "remote", "remote_training", "stopping", "storage"),
        "vllm_processes",
    ),
    "the whole path, of which each part is tested": ("benchmarks", "newcomer", "pages"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=VARIANTS, help="one variant")
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, after --")
    arguments = parser.parse_args()
    failed = []
    for variant in [arguments.only] if arguments.only else here():
        begin = time.monotonic()
        print(f"\n== {variant}", flush=True)
        command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", *arguments.pytest, *files()]
        if subprocess.call(command, cwd=ROOT, env={**os.environ, **environment(variant)}):
            failed.append(variant)
        print(f"== {variant}: {(time.monotonic() - begin) / 60:.1f} minutes", flush=True)
    print(f"failed: {', '.join(failed)}" if failed else "every variant is green")
    return len(failed)


def here() -> list[str]:
    """The variants that this machine can take."""
    x86 = platform.machine() == "x86_64"
    return [variant for variant, (instructions, _) in VARIANTS.items() if x86 or instructions != "avx2"]


def environment(variant: str) -> dict[str, str]:
    instructions, threads = VARIANTS[variant]
    return {**INSTRUCTIONS[instructions], "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def files() -> list[str]:
    """Every test file of the light suite that computes something."""
    left_out = {f"test_{name}.py" for names in LEFT_OUT.values() for name in names}
    return [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if path.name not in left_out and path.parent.name not in ("vllm", "lmms")
    ]


if __name__ == "__main__":
    sys.exit(main())
