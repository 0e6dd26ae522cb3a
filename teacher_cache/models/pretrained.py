"""The one door for model folders and hub names: configurations, weights, tokenizers, processors.

Left to itself, Transformers draws weights that a checkpoint lacks at random and prints a report, makes a model of one
type out of a folder of another with a warning, and asks on the terminal whether to run code that lies in the folder.
None of the three shows in a cache or a student afterwards, so here each is an error, and nobody is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from teacher_cache.errors import ConfigError, TeacherError


class ModelError(TeacherError, ConfigError):
    """A model folder that is not what it was named as: caught wherever a teacher's error or a setting's is."""


def read_config(setting: str, name: str, revision: str = "", trust: bool = False) -> Any:
    """The Transformers configuration of ``name``. ``setting`` (as in ``teacher.model``) is for the error.

    ``trust``: the user allows code from the folder to run (``teacher.trust_remote_code``).

    Raises
    ------
    ModelError
        There is none, or none that can be read without running code.
    """
    from transformers import AutoConfig

    with _told(setting, name, "no model configuration can be read"):
        return AutoConfig.from_pretrained(name, revision=revision or None, trust_remote_code=trust)


def read_tokenizer(setting: str, name: str, revision: str = "") -> Any:
    """The tokenizer of ``name``; no code of the folder runs."""
    from transformers import AutoTokenizer

    with _told(setting, name, "no tokenizer can be loaded"):
        return AutoTokenizer.from_pretrained(name, revision=revision or None, trust_remote_code=False)


def read_generation_config(name: str) -> Any:
    """How ``name`` says that it generates; None where it does not."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(name)
    except OSError:  # no such file
        return None


def read_image_processor(setting: str, name: str) -> Any:
    """The image processor of ``name``, Pillow's version: its pixels are the same with and without torchvision."""
    from transformers import AutoImageProcessor

    with _told(setting, name, "no image processor can be loaded"):
        return AutoImageProcessor.from_pretrained(name, backend="pil", trust_remote_code=False)


def read_processor(setting: str, name: str, revision: str = "", trust: bool = False) -> Any:
    """The processor of ``name``, with Pillow's image processor. A video part, of which there is no Pillow version, is
    loaded as it is."""
    from transformers import AutoImageProcessor, AutoProcessor

    place: dict[str, Any] = {"revision": revision or None, "trust_remote_code": trust}
    with _told(setting, name, "no processor can be loaded", _PROCESSOR_FILES):
        try:
            return AutoProcessor.from_pretrained(name, backend="pil", **place)
        except ImportError as error:
            if "ideo processor" not in str(error):
                raise
        processor = AutoProcessor.from_pretrained(name, **place)
        processor.image_processor = AutoImageProcessor.from_pretrained(name, backend="pil", **place)
        return processor


def model_class(setting: str, name: str, config: Any) -> Any:
    """The Transformers class of a model that reads images and text, or text, and writes on from its left.

    Raises
    ------
    ModelError
        There is none for this ``model_type``, or it writes in another way.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    classes = (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING)
    found = next((kinds[type(config)] for kinds in classes if type(config) in kinds), None)
    if found is None:
        what = "has no class that reads images and text, or text, and writes text"
    elif config.is_encoder_decoder or config.get_text_config().is_encoder_decoder:
        what = "is an encoder-decoder, whose answers have states apart from the text that they follow"
    elif "Diffusion" in found.__name__:
        what = "writes by diffusion, so that no state predicts the next token"
    else:
        return found
    raise ModelError(
        f"{setting}={name}: model_type {getattr(config, 'model_type', '')!r} {what} in Transformers; expected one of "
        "AutoModelForImageTextToText or AutoModelForCausalLM that predicts token by token. Name another"
    )


def without_weights(setting: str, name: str, config: Any) -> Any:
    """The model of a Transformers configuration on the ``meta`` device: its modules and shapes, no storage."""
    import torch

    with torch.device("meta"):
        return model_class(setting, name, config)._from_config(config)


def load_model(setting: str, name: str, revision: str = "", **arguments: Any) -> Any:
    """The model of ``name`` by its own class, every weight from its checkpoint; its head is one matrix.

    Raises
    ------
    ModelError, TeacherError
        See :func:`model_class` and ``parts.check_head``; or weights are missing, unexpected or of another shape.
    """
    from teacher_cache.models.parts import check_head

    found = model_class(setting, name, read_config(setting, name, revision))
    model = _weights(found.from_pretrained, setting, name, revision=revision or None, **arguments)
    check_head(setting, name, model)
    return model


def check_llava(setting: str, name: str, config: Any) -> None:
    """Refuse a configuration of another type than LLaVA-1.5's: its weights would be taken and run otherwise.

    Raises
    ------
    ModelError
    """
    kind = getattr(config, "model_type", "")
    if kind == "llava":
        return
    if config.get_text_config() is config:
        found, do = (
            f"a {kind} model without a vision tower",
            ("Name a LLaVA folder. (A student can be put together: student.language_model and student.vision_tower)"),
        )
    else:
        found, do = f"a {kind} checkpoint", "Name a LLaVA-1.5 folder (llava-hf/llava-1.5-7b-hf and the like)"
    raise ModelError(f"{setting}={name}: {found}, expected model_type llava, LLaVA-1.5's arrangement. {do}")


def load_llava(setting: str, name: str, revision: str = "", **arguments: Any) -> Any:
    """The ``LlavaForConditionalGeneration`` of ``name``, every weight from its checkpoint.

    Raises
    ------
    ModelError
        Another model type; or weights that are missing, unexpected or of another shape.
    """
    from transformers import LlavaForConditionalGeneration

    check_llava(setting, name, read_config(setting, name, revision))
    return _weights(
        LlavaForConditionalGeneration.from_pretrained, setting, name, revision=revision or None, **arguments
    )


def load_language_model(setting: str, name: str, **arguments: Any) -> Any:
    """The causal language model of ``name``, every weight from its checkpoint."""
    from transformers import AutoModelForCausalLM

    config = read_config(setting, name)
    if config.get_text_config() is not config:
        raise ModelError(
            f"{setting}={name}: a {config.model_type} model, which has parts beside its language model; expected a "
            "text-only causal language model. A LLaVA folder is named as student.model"
        )
    return _weights(AutoModelForCausalLM.from_pretrained, setting, name, **arguments)


def load_vision_tower(setting: str, name: str, **arguments: Any) -> Any:
    """The vision tower of ``name``, or the model (CLIP, SigLIP) that it is a part of, with all its weights."""
    from transformers import AutoModel

    check_tower(setting, name, read_config(setting, name))
    return _weights(AutoModel.from_pretrained, setting, name, **arguments)


def check_tower(setting: str, name: str, config: Any) -> None:
    """Refuse what has no vision tower of square patches.

    Raises
    ------
    ModelError
    """
    tower = getattr(config, "vision_config", config)
    if not (hasattr(tower, "image_size") and hasattr(tower, "patch_size")):
        raise ModelError(
            f"{setting}={name}: a {config.model_type} model, expected a vision tower with an image size and a patch "
            "size, for example CLIP's or SigLIP's"
        )


def _weights(load: Callable[..., Any], setting: str, name: str, **arguments: Any) -> Any:
    if (Path(name) / "adapter_config.json").is_file():
        raise ModelError(
            f"{setting}={name}: a folder with an adapter (adapter_config.json), expected a whole model. {_MERGE}"
        )
    with _told(setting, name, "not a checkpoint that Transformers can load"):
        model, found = load(
            name,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, with all of them, in place of a traceback
            use_safetensors=True,
            trust_remote_code=False,
            **arguments,
        )
    missing, unexpected = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    shapes = sorted((key, tuple(stored), tuple(wanted)) for key, stored, wanted in found["mismatched_keys"])
    faults = [
        _few("are not in the checkpoint, and would be random", missing),
        _few("of the checkpoint have no place in the model", unexpected),
        _few("have another shape", [f"{key} {stored}, expected {wanted}" for key, stored, wanted in shapes]),
        _few("could not be read", [str(message) for message in found.get("error_msgs", [])]),
    ]
    if any(faults):
        raise ModelError(
            f"{setting}={name}: not the weights of a whole {type(model).__name__}: "
            f"{'; '.join(f for f in faults if f)}. {_advice(unexpected)}"
        )
    return model


def _few(what: str, names: list[str]) -> str:
    """A count and the first three names; nothing where there are none."""
    return f"{len(names)} weights {what} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})" if names else ""


def _advice(unexpected: list[str]) -> str:
    if any(name.startswith("base_model.model.") or ".lora_" in name for name in unexpected):
        return f"These are the names of an adapter. {_MERGE}"
    if any("mm_projector" in name or name.startswith("model.vision_tower.vision_tower") for name in unexpected):
        return (
            "These are the names of LLaVA's own repository: convert the folder with "
            "transformers/models/llava/convert_llava_weights_to_hf.py, or take a llava-hf folder"
        )
    return (
        "Is a file of the checkpoint missing (a projector in a file of its own, a shard that was not downloaded), or "
        "does its config.json belong to another model? Save the whole model again with save_pretrained"
    )


_MERGE = "Merge it into its model first: peft's merge_and_unload(), then save_pretrained"
_PROCESSOR_FILES = "The folder needs processor_config.json (or preprocessor_config.json) and the tokenizer's files"


@contextmanager
def _told(setting: str, name: str, what: str, do: str = "") -> Iterator[None]:
    """Whatever Transformers raises about a folder, as a :class:`ModelError` that names the setting."""
    try:
        yield
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, AttributeError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()
        if "trust_remote_code" in str(error):
            what, reason = "it brings code of its own, which is not run", "its config.json has an auto_map"
            do = "Take a model that Transformers has a class for" + (
                ", or set teacher.trust_remote_code=true if you have read that code" if "teacher" in setting else ""
            )
        elif isinstance(error, ImportError) and "orchvision" in str(error):
            do = "Install torchvision, which the video part of its processor needs"
        raise ModelError(f"{setting}={name}: {what} ({reason}){f'. {do}' if do else ''}") from error
