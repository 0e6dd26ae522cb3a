"""Settings of phase two. What the cache already says (teacher, template, tokenizer, signals) is never typed again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import WithJsonSchema

from student_train.losses.catalogue import DEFAULT_LOSS, Answers, Attention, Logits, LossSpec
from teacher_cache.config import CHECKED, AtLeast0, AtLeast1, NotNegative, Positive, Seed, Share, check_settings
from teacher_cache.errors import ConfigError


@dataclass(frozen=True)
class ExpectedSize:
    """What a plan counts with while a source is not there yet; the figures per sample are means."""

    __pydantic_config__ = CHECKED
    samples: AtLeast0 = 0
    """Samples of the source."""
    rows_per_sample: float = 0.0
    """Answer tokens of a sample."""
    tokens_per_sample: float = 0.0
    """Question, answer and template; one for the image."""
    images: AtLeast0 = 0
    """Distinct ones."""
    image_share: Share = 1.0
    """Samples with an image."""
    positions_per_image: AtLeast0 = 0
    """In the teacher, on average; 0: as many as LLaVA-1.5's configuration says. Other processors count by size."""


@dataclass(frozen=True)
class SourceConfig:
    """Where samples come from: a teacher cache, or plain LLaVA data (cross-entropy only).

    >>> SourceConfig(cache="runs/tiny/cache", image_folder="runs/tiny/world/images").answers
    'cached'
    """

    __pydantic_config__ = CHECKED
    cache: str = ""
    """Folder or address of a finished cache."""
    data: str = ""
    """In its place plain data, as ``data.path`` of a cache."""
    image_folder: str = ""
    """What the paths of images start from."""
    image_data: str | tuple[str, ...] = ""
    """The Parquet files (files, a folder or a pattern, as ``data.path``) whose embedded images the cache was made from.
    They are laid down once, in ``prefetch_folder`` or a temporary one, and read from there."""
    answers: Literal["cached", "original"] = "cached"
    """``original`` trains on the data set's own answers, which the cache keeps as text: cross-entropy only."""
    tokenizer: Literal["exact", "same_ids"] = "exact"
    """For ``cache``: ``same_ids`` takes a student of the teacher's base vocabulary that has another end token, other
    merges or other added tokens (the base model of an instruction-tuned teacher), if no cached id is one of those."""
    max_skipped: Share = 0.1
    """Of ``data``: the share of samples that may be left out (images that are missing or damaged, lines that are no
    conversation); they stand with their reasons in skipped.jsonl beside the run. More than that stops it."""
    before: str = ""
    """A cache of the teacher before it was tuned, over the same answers (``teacher.answerer``). Losses of exact logits
    then learn what the tuning changed (Delta-KD, arXiv:2509.14526): logits of ``onto`` + ``shift`` · (``cache`` −
    ``before``)."""
    onto: str = ""
    """What that is added to: a cache of the untrained student in the paper. Empty: ``cache`` itself."""
    shift: Positive = 1.0
    """How much of it."""
    share: Positive = 1.0
    """Part of this source seen in an epoch (0.5: a fresh half every epoch; 2: twice)."""
    weight: Positive = 1.0
    """What one of its samples counts in every loss, beside one of another source."""
    max_samples: AtLeast0 = 0
    """The first so many samples; 0 takes all."""
    prefetch_folder: str = ""
    """Where files of a remote cache are copied to; all ranks of a machine may share it. Empty: a temporary folder for
    each of them (and its loader processes)."""
    prefetch_gigabytes: Positive = 20.0
    """What that folder (or each temporary one) may hold."""
    made_with: str = ""
    """The phase-one file that makes ``cache``, and ``expected``: for a plan only, before the cache is there."""
    expected: ExpectedSize = field(default_factory=ExpectedSize)


@dataclass(frozen=True)
class StudentConfig:
    """The student: a folder of any vision-language or causal language model, or a language model and a vision tower
    put together.

    Beside ``model``, ``language_model`` and ``vision_tower`` say what that folder was put together from: a plan reads
    their configurations while the folder is not there yet.

    >>> StudentConfig(model="runs/tiny/students/0", train="lora").lora_rank
    16
    """

    model: str = ""
    """Folder or hub name; or where the student that is put together is kept."""
    language_model: str = ""
    """Put together: a causal language model."""
    vision_tower: str = ""
    """Put together: a CLIP or SigLIP tower."""
    tokenizer: str = ""
    """A composed student takes the tokenizer of this model, its teacher: ids, and the number of them, are then the
    teacher's."""

    __pydantic_config__ = CHECKED
    layers_from: str = ""
    """A teacher whose every n-th layer (and embeddings, norm, head, projector) the student starts from (DistilBERT)."""
    layers: AtLeast0 = 0
    """With ``layers_from``: how many layers; 0 takes half of the teacher's."""
    train: Literal["full", "projector", "lora"] = "full"
    """All weights, the projector alone, or low-rank adapters and the projector."""
    train_vision: bool = False
    """Train the vision tower, too."""
    lora_rank: AtLeast1 = 16
    """With ``train: lora``: rank of the adapters."""
    lora_alpha: AtLeast1 = 32
    """With ``train: lora``: they are scaled by alpha / rank."""
    load_in_4bit: bool = False
    """Frozen weights in 4 bits (QLoRA); needs a GPU and bitsandbytes."""
    gradient_checkpointing: bool = False
    """Keep no activations inside layers and compute them again: less memory, a third more time."""
    chat_template: str = ""
    """How it writes conversations: a Jinja file, or a paper's by name (vicuna_v1, plain). Empty: its own; a LLaVA-1.5
    student then takes that of its caches, whose ids it reads as they are."""
    template_kwargs: dict[str, Any] = field(default_factory=dict, hash=False)
    """What is given to its chat template (``enable_thinking: false``)."""
    image_processor: dict[str, Any] = field(default_factory=dict, hash=False)
    """Settings in place of its image processor's own, exported with it, as ``teacher.image_processor``:
    ``{size: {shortest_edge: 3136, longest_edge: 602112}}``."""
    image_mode: Literal["auto", "pad", "crop"] = "auto"
    """``pad``: to a square with the mean colour, as LLaVA-1.5; ``crop``: what its processor does otherwise (CLIP's cuts
    the centre out). ``auto``: as the caches' teacher saw them; without a cache, as the student's processor does."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """In which numbers products are formed, frozen weights are kept and the student is exported. What is trained is
    kept in float32: a step of 2e-5 is lost between two bfloat16 numbers, and 1e-8 (Adam's) is 0 in float16."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """``eager`` gives the attention maps that ``attention_mse`` compares."""
    vision_features: Literal["compute", "cache"] = "compute"
    """``cache`` runs the frozen tower once per image and keeps its features beside the run."""


@dataclass(frozen=True)
class TrainConfig:
    """How it is trained; LLaVA-1.5's recipe by default.

    >>> TrainConfig(max_steps=600, global_batch=32).schedule
    'cosine'
    """

    __pydantic_config__ = CHECKED
    epochs: Positive = 1.0
    """Passes over the sources."""
    max_steps: AtLeast0 = 0
    """Overrides ``epochs`` when set."""
    max_seconds: NotNegative = 0.0
    """Stop after so many CPU seconds of this process, for baselines with an equal budget; the schedule still
    follows ``max_steps``."""
    global_batch: AtLeast1 = 128
    """Samples of a step, over all ranks."""
    micro_batch: AtLeast1 = 16
    """Samples of one forward pass of a rank; changes memory and speed, not the gradient."""
    learning_rate: NotNegative = 2e-5
    """At its highest."""
    projector_learning_rate: NotNegative = 0.0
    """0: the same as the rest."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Of the learning rate, after the warm-up."""
    warmup_share: Share = 0.03
    """Share of the steps in which the learning rate rises from 0."""
    weight_decay: NotNegative = 0.0
    """AdamW's, of all that is trained."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's."""
    clip_norm: NotNegative = 1.0
    """Longest gradient that is taken as it is; 0 clips none."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """``adamw_8bit`` keeps its moments in 8 bits."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """In which numbers products are formed, where ``student.dtype`` is float32. ``auto``: what ``accelerate launch``
    was told (``--mixed_precision``), else no."""
    seed: Seed = 0
    """Of the order of samples and of weights that start at random."""
    shuffle: Literal["auto", "full", "shards"] = "auto"
    """``full`` mixes all samples, ``shards`` those of a block of shards; ``auto``: the latter for a remote cache."""
    group: Literal["none", "length", "modality"] = "none"
    """Put samples of like length, or with and without images, into the same micro-batch."""
    pack: bool = False
    """Fill the lines of a micro-batch with several short samples, which do not see each other, instead of padding."""
    head_rows: AtLeast0 = 0
    """Rows whose (rows × vocabulary) logits exist at once; 0 takes as many as the device works fastest with."""
    workers: AtLeast0 = 0
    """Processes that read ahead; 0 reads in the training process."""
    pixel_cache: AtLeast0 = 4096
    """Preprocessed images kept in memory, per loader process."""
    checkpoint_every: AtLeast0 = 500
    """Steps between checkpoints, of which the last two are kept; 0 writes one at the end (and when a signal comes)."""
    log_every: AtLeast1 = 10
    """Steps between lines of log.jsonl."""
    tracker: str = ""
    """Any tracker Accelerate knows (tensorboard, wandb …); the loss curve is always in log.jsonl."""
    threads: AtLeast0 = 0
    """torch threads; 0 leaves torch's choice."""


FitTree = Annotated[dict[str, Any], WithJsonSchema({"schema file": "fit.json"})]
"""Settings of a student's training, to be laid over others before they are read."""


@dataclass(frozen=True)
class FitConfig:
    """One stage of training, whole; ``fit`` trains it.

    >>> FitConfig(output="runs/mine", losses=(LossSpec("hidden_mse", weight=10),)).losses[0].label
    'hidden_mse'
    """

    __pydantic_config__ = CHECKED
    output: str = ""
    """Folder of the run."""
    sources: tuple[SourceConfig, ...] = ()
    """Where samples come from; an epoch mixes them."""
    student: StudentConfig = field(default_factory=StudentConfig)
    losses: tuple[LossSpec, ...] = (DEFAULT_LOSS,)
    """Terms that are added up, each with its weight."""
    train: TrainConfig = field(default_factory=TrainConfig)


def check_fit_config(config: FitConfig) -> None:
    """Settings that are missing or contradict each other, before anything is loaded."""
    check_settings(config)
    if not config.output:
        raise ConfigError("output: not set; name a folder for the run")
    if not config.sources:
        raise ConfigError("sources: none; name at least one teacher cache: sources: [{cache: …, image_folder: …}]")
    for number, source in enumerate(config.sources):
        if bool(source.cache) == bool(source.data):
            raise ConfigError(
                f"sources[{number}]: set either cache or data, found cache={source.cache!r}, data={source.data!r}"
            )
    if not (config.student.model or config.student.language_model or config.student.layers_from):
        raise ConfigError("student: set model (a folder), language_model and vision_tower, or layers_from")
    if config.student.layers_from and config.student.model:
        raise ConfigError(
            f"student: model={config.student.model} and layers_from={config.student.layers_from} are both set, and a "
            "student has one origin. Set student.model='' to cut layers, student.layers_from='' to train the model on"
        )
    if config.student.layers and not config.student.layers_from:
        raise ConfigError("student.layers says how many layers to take from layers_from, which is not set")
    if not config.losses:
        raise ConfigError(f"losses: none; at least {{name: {DEFAULT_LOSS.name}}}")
    distilled = [x.name for x in config.losses if x.advantage_share or not isinstance(x.entry, Answers)]
    plain = [i for i, s in enumerate(config.sources) if s.data or s.answers == "original"]
    if distilled and plain:
        raise ConfigError(
            f"losses: {', '.join(distilled)} need a teacher's signals, but sources[{plain[0]}] has none. "
            "Cache those answers first (data.regenerate=none scores original answers), or keep "
            f"{DEFAULT_LOSS.name} alone"
        )
    _check_shifts(config)
    for loss in config.losses:
        if isinstance(loss.entry, Attention) and config.student.attention != "eager":
            raise ConfigError(f"losses: {loss.name} needs the attention maps; set student.attention=eager")
        if loss.entry.whole_lines and config.train.pack:
            raise ConfigError(f"train.pack: {loss.name} looks at whole lines; set train.pack=false")
    labels = [loss.label for loss in config.losses]
    if len(set(labels)) < len(labels):
        raise ConfigError(f"losses: one term of each name, found {', '.join(labels)}")
    if config.student.load_in_4bit and (config.student.layers_from or not config.student.model):
        raise ConfigError(
            "student.load_in_4bit: only a folder (student.model) can be loaded in 4 bits, found layers_from or "
            "language_model. Train that student once without it, export it, and name its folder as student.model"
        )
    own = {"bfloat16": "bf16", "float16": "fp16"}.get(config.student.dtype)
    if own and config.train.mixed_precision not in ("auto", own):
        raise ConfigError(
            f"student.dtype={config.student.dtype} says in which numbers products are formed, and "
            f"train.mixed_precision={config.train.mixed_precision} says others. Set train.mixed_precision=auto, or "
            "student.dtype=float32"
        )


def _check_shifts(config: FitConfig) -> None:
    """What learns from a teacher's shift takes it from the full logits of answer rows: nothing else can be added up."""
    for number, source in enumerate(config.sources):
        if source.onto and not source.before:
            raise ConfigError(f"sources[{number}].onto: nothing is added to it. Set before, or leave onto out")
        for loss in config.losses if source.before else ():
            of_logits = isinstance(loss.entry, Logits) and loss.source == "exact" and loss.tokens == "answer"
            if not of_logits and not isinstance(loss.entry, Answers):
                raise ConfigError(
                    f"sources[{number}].before: {loss.label} would learn the teacher, not its shift, which only exact "
                    "logits of answer rows have. Set source: exact and tokens: answer, or leave the loss out"
                )
