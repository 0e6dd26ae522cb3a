"""Make torchvision's CUDA wheel work beside a CPU build of torch, in the environment that runs this file.

    .venv/bin/python -m pipelines.repair_torchvision

Package indexes offer torchvision for torch 2.13 as CUDA builds only. Their compiled part looks for libcudart, so
`import torchvision` says "operator torchvision::nms does not exist", and what imports it (processors with a video
part, vLLM) fails with it. Two operators' schemas are declared just before it is imported: its Python half (resize and
friends) then works; `nms`, `roi_align` and image decoding stay missing, and nothing here uses them. A torchvision that
imports is left as it is.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

SHIM_NAME = "_torchvision_cpu_shim"
# Processes that import torchvision before any code of ours runs (vLLM's engine and workers) are reached by a .pth file
# in site-packages alone. The finder costs nothing until torchvision is imported.
SHIM = '''\
"""Declares torchvision's operators before it is imported: its CUDA wheel cannot load beside a CPU torch.

Written by pipelines/repair_torchvision.py, which says why. Does nothing beside a CUDA build of torch.
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


def import_error(module: str) -> str:
    """Return the last line of what `import module` says in a fresh process, '' if it works."""
    done = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True, check=False)
    lines = done.stderr.strip().splitlines() or ["(no message)"]
    return lines[-1] if done.returncode else ""


if __name__ == "__main__":
    repair_torchvision()
