"""``make chaos``: what may happen to builds, fits and their files happens, at random. Every promise is checked."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.chaos_builds import Stage, flips, full_disk, kills, local_place, s3_place, s3_server
from benchmarks.chaos_fits import FitStage, flipped_checkpoints, flipped_features, killed_fits
from benchmarks.chaos_outputs import two_builds, two_fits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200, help="killed builds; a quarter of them on S3")
    parser.add_argument("--fits", type=int, default=100, help="killed fits")
    parser.add_argument("--flips", type=int, default=1000, help="single bits flipped, over all files of each kind")
    parser.add_argument("--tries", type=int, default=20, help="two builds, and two fits, on one output")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        stage = Stage.make(Path(folder), arguments.seed)
        fits = FitStage.make(stage)
        on_s3 = arguments.runs // 4
        say(lambda: kills(stage, local_place(stage), arguments.runs - on_s3, "local"))
        with s3_server() as options:
            say(lambda: kills(stage, s3_place(options), on_s3, "S3"))
        say(lambda: flips(stage, arguments.flips))
        say(lambda: full_disk(stage))
        say(lambda: killed_fits(fits, arguments.fits))
        say(lambda: flipped_checkpoints(fits, arguments.flips))
        say(lambda: flipped_features(fits, arguments.flips))
        say(lambda: two_builds(stage, arguments.tries))
        say(lambda: two_fits(fits, arguments.tries))


def say(part: Callable[[], object]) -> None:
    begin = time.monotonic()
    print(f"{part()} ({time.monotonic() - begin:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
