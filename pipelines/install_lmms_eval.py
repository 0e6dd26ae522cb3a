"""Install lmms-eval, the part of it that scores LLaVA students, into the environment that runs this file.

    python3 -m venv .venv-lmms && .venv-lmms/bin/python pipelines/install_lmms_eval.py

An environment of its own, because lmms-eval has 52 requirements (video, web clients, judges, trackers), some pinned.
We install it without them and add those (`LMMS` in locks.py) that `--model llava_hf` imports on the way to GQA,
ScienceQA, TextVQA, POPE, MME and MMBench; `prove` imports all of that, so a missing one shows here. Other benchmarks
may need more: `pip install` what they name. What is deliberately not here:

- torchvision: beside a CPU build of torch its wheel fails at import and takes Transformers with it; and where it is,
  Transformers resizes images with it, which is not bit for bit what the student was trained on.
"""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

LOCKS = Path(__file__).resolve().parent / "locks"
PROVED = (
    "lmms_eval.__main__",
    "lmms_eval.models.chat.llava_hf",
    *(
        f"lmms_eval.tasks.{name}"
        for name in ("gqa.utils", "scienceqa.utils", "textvqa.utils", "pope.utils", "mme.utils")
    ),
    "lmms_eval.tasks.mmbench.en_utils",
)


def main() -> None:
    """Install the locks, lmms-eval without its own requirements, and prove that what we use imports."""
    if sys.prefix == sys.base_prefix:
        sys.exit(
            f"{sys.executable} is not in a virtual environment, and lmms-eval's pins must not touch a shared Python.\n"
            "Make one first: python3 -m venv .venv-lmms && .venv-lmms/bin/python pipelines/install_lmms_eval.py"
        )
    pip("install", "--requirement", str(LOCKS / "lmms.txt"))
    pip("install", "--no-deps", "--requirement", str(LOCKS / "lmms-alone.txt"))
    prove()


def prove() -> None:
    """Import it all in a fresh process: a broken install must show here, not after an hour of answering."""
    code = f"import importlib\nfor name in {PROVED!r}: importlib.import_module(name)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"lmms-eval is installed, but does not import: {done.stderr.strip().splitlines()[-1]}")
    print(f"lmms-eval {importlib.metadata.version('lmms-eval')}: imports, with LLaVA and the six benchmarks")


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True)


if __name__ == "__main__":
    main()
