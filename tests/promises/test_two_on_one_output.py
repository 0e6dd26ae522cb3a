"""Two commands that start together on one output: one works as if alone, the other is told who has it."""

import pytest
import torch

from benchmarks.chaos_builds import Stage
from benchmarks.chaos_fits import FitStage
from benchmarks.chaos_outputs import two_builds, two_fits


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    torch.set_num_threads(1)
    return Stage.make(tmp_path_factory.mktemp("two"), seed=1, images=12)


def test_of_two_builds_on_one_output_one_goes_on_and_the_other_names_it(stage):
    assert two_builds(stage, 3).startswith("two builds on one output: 3 tries")


def test_of_two_fits_on_one_output_one_goes_on_and_the_other_names_it(stage):
    assert two_fits(FitStage.make(stage), 3).startswith("two fits on one output: 3 tries")
