"""The student model: loaded, put together, cut from a teacher's layers, frozen or given adapters as the config says."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedModel

from student_train.config import StudentConfig
from teacher_cache.data.conversations import IMAGE_TAG
from teacher_cache.errors import ConfigError
from teacher_cache.models.parts import lora_targets, parts_of
from teacher_cache.models.pretrained import (
    load_language_model,
    load_model,
    load_vision_tower,
    model_class,
    read_config,
    read_image_processor,
    read_processor,
    read_tokenizer,
)


def load_student(config: StudentConfig, seed: int) -> tuple[PreTrainedModel, Any]:
    """The model, ready to train (what is frozen needs no gradient), and its processor (a text model's tokenizer).

    New weights (a composed student's projector) are drawn from ``seed``.

    Raises ``ConfigError``: no such checkpoint, or parts that do not fit together.
    """
    torch.manual_seed(seed)
    # All of it is trained: loaded as it is, since what bfloat16 rounds away does not come back.
    loaded = replace(config, dtype="float32") if config.train == "full" else config
    if config.layers_from:
        model, processor = cut_layers(loaded)
    elif config.model:
        model, processor = _load_folder(loaded)
    else:
        model, processor = compose(loaded)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    choose_trainable(model, config)
    settle_precision(model, config)
    return model, processor


def settle_precision(model: nn.Module, config: StudentConfig) -> None:
    """What is trained in float32, what is frozen in ``student.dtype`` (or as it was quantised).

    Half-precision weights do not train: at a learning rate of 2e-5 most steps are smaller than half of the distance to
    the next bfloat16, and Adam's 1e-8 is 0 in float16. Products are formed in ``student.dtype`` all the same, by
    autocast (``training.setup.computed_in``).
    """
    frozen = getattr(torch, config.dtype)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
        elif parameter.is_floating_point():
            parameter.data = parameter.data.to(frozen)


def choose_trainable(model: PreTrainedModel, config: StudentConfig) -> None:
    """Freeze what is not trained: the vision tower unless asked, the language model for ``projector`` and ``lora``.

    Raises ``ConfigError``: the model has no projector, or no tower, that could be trained.
    """
    parts = parts_of(model)
    if not parts.tower and (config.train == "projector" or config.train_vision):
        wanted = "student.train_vision" if config.train_vision else "student.train=projector"
        raise ConfigError(
            f"{wanted}: a {type(model).__name__} reads text only and has no vision tower and no projector. Set "
            "student.train=full or lora, and student.train_vision=false"
        )
    model.requires_grad_(config.train == "full")
    if parts.tower:
        model.get_submodule(parts.tower).requires_grad_(config.train_vision)
    for name in parts.projector:  # Qwen-VL's lies inside its tower
        model.get_submodule(name).requires_grad_(True)
    for name in parts.parameters:
        model.get_parameter(name).requires_grad_(True)
    if config.train == "lora":
        add_adapters(model, config)


def add_adapters(model: PreTrainedModel, config: StudentConfig) -> None:
    """LoRA in place on all linear layers of the decoder, by peft; module names stay what they are."""
    from peft import LoraConfig, inject_adapter_in_model

    lora = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=lora_targets(model))
    inject_adapter_in_model(lora, model)


def merge_adapters(model: nn.Module) -> None:
    """Fold LoRA weights into the layers they sit on, so that a plain Transformers model is left."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], module.get_base_layer())


def _load_folder(config: StudentConfig) -> tuple[PreTrainedModel, Any]:
    setting = "layers_from" if config.layers_from else "model"
    name, setting = getattr(config, setting), f"student.{setting}"
    model = load_model(
        setting,
        name,
        dtype=getattr(torch, config.dtype),
        attn_implementation="eager" if config.attention == "eager" else None,  # else sdpa, where the class has it
        quantization_config=_four_bit(config, setting, name),
    )
    return model, read_own_processor(setting, name, model)


def read_own_processor(setting: str, name: str, model: PreTrainedModel) -> Any:
    """The processor of ``model``, which lies in ``name``; of a model that reads text only, its tokenizer."""
    return (read_processor if parts_of(model).tower else read_tokenizer)(setting, name)


def compose(config: StudentConfig) -> tuple[LlavaForConditionalGeneration, Any]:
    """A language model and a vision tower with a new two-layer GELU projector between them (LLaVA-1.5)."""
    if not (config.language_model and config.vision_tower):
        raise ConfigError("student: a composed student needs both language_model and vision_tower")
    dtype = getattr(torch, config.dtype)
    language = load_language_model("student.language_model", config.language_model, dtype=dtype)
    vision = load_vision_tower("student.vision_tower", config.vision_tower, dtype=dtype)
    vision = getattr(vision, "vision_model", vision)
    tokenizer = read_tokenizer("student.tokenizer", config.tokenizer or config.language_model)
    token = _image_token(tokenizer)
    taken = read_config("student.tokenizer", config.tokenizer) if config.tokenizer else None
    size = composed_vocabulary(language.config, taken, token)
    if size > language.get_input_embeddings().num_embeddings:
        language.resize_token_embeddings(size)
    llava = composed_config(language.config, read_config("student.vision_tower", config.vision_tower), token)
    model = LlavaForConditionalGeneration._from_config(llava, dtype=dtype, attn_implementation=config.attention)
    model.model.language_model.load_state_dict(language.get_decoder().state_dict())
    if not llava.tie_word_embeddings:
        model.get_output_embeddings().load_state_dict(language.get_output_embeddings().state_dict())
    _load_vision(model.model.vision_tower, vision, config)
    tower = llava.vision_config
    processor = LlavaProcessor(
        image_processor=read_image_processor("student.vision_tower", config.vision_tower),
        tokenizer=tokenizer,
        patch_size=tower.patch_size,
        vision_feature_select_strategy=llava.vision_feature_select_strategy,
        num_additional_image_tokens=int(tower.model_type.startswith("clip")),
        image_token=IMAGE_TAG,
    )
    return model, processor


def composed_config(text: Any, vision: Any, image_token: int) -> LlavaConfig:
    """LLaVA-1.5's arrangement of a language model and a tower: features of the last layer but one, two-layer GELU."""
    vision = getattr(vision, "vision_config", vision)
    has_class_token = vision.model_type.startswith("clip")
    return LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=image_token,
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if has_class_token else "full",
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        tie_word_embeddings=bool(getattr(text, "tie_word_embeddings", False)),
    )


def composed_vocabulary(text: Any, tokenizer_model: Any | None, image_token: int) -> int:
    """Output ids of a composed student: its own, room for the image token, or those of the model whose tokenizer it
    takes, so that the teacher's head and the student's give logits for the same ids."""
    taken = tokenizer_model.get_text_config().vocab_size if tokenizer_model is not None else 0
    return max(int(text.vocab_size), taken, image_token + 1)


def _image_token(tokenizer: Any) -> int:
    """The id of ``<image>``, added where the tokenizer has none."""
    if IMAGE_TAG not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TAG]})
    return int(tokenizer.convert_tokens_to_ids(IMAGE_TAG))


def _load_vision(tower: nn.Module, vision: nn.Module, config: StudentConfig) -> None:
    """Copy the tower's weights, whether or not the classes wrap them in ``vision_model``."""
    target = tower.state_dict()
    source = {re.sub(r"^vision_model\.", "", k): v for k, v in vision.state_dict().items()}
    filled = {k: source.get(re.sub(r"^vision_model\.", "", k)) for k in target}
    missing = [k for k, v in filled.items() if v is None]
    if missing:
        raise ConfigError(
            f"student.vision_tower={config.vision_tower}: no weights for {missing[0]}; expected a CLIP or SigLIP tower"
        )
    tower.load_state_dict(filled)


def cut_layers(config: StudentConfig) -> tuple[PreTrainedModel, Any]:
    """A student of every n-th layer of a teacher, everything else the teacher's (DistilBERT; LLAVADI section 4.5).

    Half the layers takes 0, 2, 4 …: layer i of the student is layer ⌊i·n/m⌋ of the teacher's n.
    """
    if not Path(config.layers_from).exists() and "/" not in config.layers_from:
        raise ConfigError(f"student.layers_from={config.layers_from}: no such folder")
    model, processor = _load_folder(config)
    decoder: Any = model.get_submodule(parts_of(model).decoder)
    decoder.layers = nn.ModuleList([decoder.layers[number] for number in keep_layers(model.config, config)])
    for number, layer in enumerate(decoder.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
    return model, processor


def keep_layers(model: Any, config: StudentConfig) -> list[int]:
    """The numbers of the layers that a cut student keeps; ``model``, the teacher's configuration, becomes its own.

    Each keeps its kind of attention (``layer_types``), which is not the same for all layers of every model.

    Raises ``ConfigError``: there are not as many; or the embeddings have a part for each layer.
    """
    text = model.get_text_config()
    if getattr(text, "hidden_size_per_layer_input", 0):
        raise ConfigError(
            f"student.layers_from={config.layers_from}: a {model.model_type} model has an input of its own for every "
            "layer (hidden_size_per_layer_input), which cannot be cut with them. Take a smaller model as student.model"
        )
    total = text.num_hidden_layers
    wanted = config.layers or total // 2
    if not 1 <= wanted <= total:
        raise ConfigError(f"student.layers={config.layers}: the teacher has {total} layers")
    kept = [i * total // wanted for i in range(wanted)]
    text.num_hidden_layers = wanted
    if getattr(text, "layer_types", None):
        text.layer_types = [text.layer_types[number] for number in kept]
    return kept


def _four_bit(config: StudentConfig, setting: str, name: str) -> Any:
    if not config.load_in_4bit:
        return None
    if config.train == "full":
        raise ConfigError("student.load_in_4bit: 4-bit weights cannot be trained; set student.train=lora (QLoRA)")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "student.load_in_4bit needs bitsandbytes. Install it (pip install bitsandbytes), or set it to false"
        )
    from transformers import BitsAndBytesConfig

    stored = read_config(setting, name)
    with torch.device("meta"):
        model = model_class(setting, name, stored)._from_config(stored)
    parts, head = parts_of(model), model.get_output_embeddings()
    heads = [path for path, module in model.named_modules() if module is head]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=getattr(torch, config.dtype),
        # The projector is trained, the head is used as a matrix: both stay as they are, and so does the small tower.
        llm_int8_skip_modules=[*parts.projector, *heads, *filter(None, [parts.tower])],
    )
