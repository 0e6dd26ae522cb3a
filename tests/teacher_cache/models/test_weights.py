"""Single parts of a checkpoint, read without loading its model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from teacher_cache.models.parts import check_head
from teacher_cache.models.pretrained import load_model, read_config, without_weights
from teacher_cache.models.weights import final_norm, output_head, rename_vision_weights, unknown_vision_names
from tests.fixtures.families import FAMILIES


@pytest.mark.parametrize("name", FAMILIES)
def test_head_and_final_norm_are_the_models_own(name: str, family_folder: Callable[[str], Path]) -> None:
    """Llama's norm is x·w, Gemma's x·(1 + w), Cohere's a LayerNorm: the module is taken, not its weight alone."""
    if "video_processor" in FAMILIES[name].parts:
        pytest.importorskip("torchvision", reason="its processor needs the extra vlm")
    folder = family_folder(name)
    model = load_model("m", str(folder), dtype=torch.float32)
    skeleton = without_weights("m", name, read_config("m", str(folder)))
    check_head("m", name, skeleton)
    head = model.get_output_embeddings().weight
    states = torch.randn(3, head.shape[1], generator=torch.manual_seed(0))
    assert torch.equal(output_head(folder), head)
    assert torch.equal(final_norm(skeleton, folder)(states), model.get_decoder().norm(states))


@pytest.mark.parametrize(("name", "renamed"), [("llava_next", True), ("mistral3", False), ("gemma3", True)])
def test_only_towers_of_clip_and_siglip_have_other_names_in_vllm(
    name: str, renamed: bool, family_folder: Callable[[str], Path]
) -> None:
    assert bool(unknown_vision_names(family_folder(name))) == renamed
    if not renamed:
        assert rename_vision_weights(family_folder(name)) == 0
