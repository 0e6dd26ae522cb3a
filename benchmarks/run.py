"""``make bench``: every benchmark that two CPU cores can run, one after another; each prints ratios of one run.

A benchmark that fails stops nothing: the others still print, and the exit code says that one failed.
"""

from __future__ import annotations

import subprocess
import sys

BENCHMARKS = (
    "benchmarks.store",
    "benchmarks.fidelity",
    "benchmarks.head_loss",
    "benchmarks.visual_loss",
    "benchmarks.training",
    "benchmarks.own_loop",
)


def main() -> int:
    failed = []
    for name in BENCHMARKS:
        print(f"\n== python -m {name}\n", flush=True)
        if subprocess.call([sys.executable, "-m", name]):
            failed.append(name)
    if failed:
        print(f"\nfailed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
