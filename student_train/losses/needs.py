"""What losses need of a cache and of a student: which arrays are read, and what is refused before the first step."""

from __future__ import annotations

from collections.abc import Sequence

from student_train.losses.catalogue import Images, Logits, LossSpec
from student_train.losses.image_losses import pooled_grid
from teacher_cache.errors import CacheError, ConfigError
from teacher_cache.store.manifest import Manifest


def needed_arrays(specs: Sequence[LossSpec], manifest: Manifest) -> tuple[list[str], list[str]]:
    """Names of the cache's arrays, and of its per-image arrays, that these losses read."""
    names = {name for spec in specs for name in spec.entry.arrays(spec, manifest.signals_config)}
    names |= {"advantage" for spec in specs if spec.advantage_share}
    if manifest.signals["codec"] in ("int8", "int4"):
        names |= {f"{n}_scale" for n in names if n.startswith("hidden")}
    visual: set[str] = set()
    if any(spec.entry.visual or spec.tokens == "all" for spec in specs):
        visual = {s.name for s in manifest.image_arrays} or {"visual"}
    return sorted(names), sorted(visual)


def check_losses(specs: Sequence[LossSpec], manifest: Manifest, url: str) -> None:
    """Losses that this cache's settings cannot serve, before the first step."""
    hidden, visual, grid = (manifest.signals[name] for name in ("hidden", "visual", "temperatures"))
    for spec in specs:
        wanted = ("states",) if spec.tokens == "all" or spec.density else spec.entry.visual
        if spec.tokens != "answer" and hidden != "text":
            raise CacheError(
                f"{url}: {spec.name} on {spec.tokens} tokens needs states of all text positions, the cache has "
                f"signals.hidden={hidden}. Use tokens: answer, or build with signals.hidden=text"
            )
        if wanted and visual not in wanted:
            how = " on all tokens" * (spec.tokens == "all") + " with density" * spec.density
            raise CacheError(
                f"{url}: {spec.name}{how} needs signals.visual="
                f"{' or '.join(wanted)}, the cache has {visual}. Build one with that signal (teacher-cache plan prices "
                "it), or leave the loss out"
            )
        if spec.pool and not _shows_squares(manifest):
            raise ConfigError(
                f"losses: {spec.label} with pool: {spec.pool}: the teacher of {url} reads images in grids of their own "
                "shape, and only a square one can be pooled. Leave pool out, and take a student with the teacher's "
                "image processor"
            )
        if isinstance(spec.entry, Logits) and spec.source == "topk" and spec.temperature not in grid:
            raise ConfigError(
                f"losses: {spec.name} at temperature {spec.temperature:g} from top-k is exact only on the cache's grid "
                f"{grid}. Take one of these, or source: exact"
            )


def _shows_squares(manifest: Manifest) -> bool:
    """Whether the teacher's processor makes one square of every image; a plan's manifest does not say."""
    image = manifest.teacher.get("processor", {}).get("image", {})
    size = image.get("crop_size") or image.get("size") or {"height": 0, "width": 0}
    several = ("crop_to_patches", "image_grid_pinpoints", "do_image_splitting", "do_pan_and_scan")
    return "height" in size and size["height"] == size.get("width") and not any(image.get(name) for name in several)


def check_shared(specs: Sequence[LossSpec], teacher: int, student: int, visual: str, url: str) -> None:
    """Refuse what cannot be cut to the shared ids, because only sums over all of the teacher's ids are stored.

    Raises ``ConfigError``.
    """
    for spec in specs if teacher > student else ():
        standardised = getattr(spec.entry, "standardised", False) and spec.source == "topk"
        gram = visual == "gram" and spec.own().get("space") == "logits"
        if standardised or gram:
            stored = "mean and deviation of the logits" if standardised else "Gram of the logits"
            instead = "source: exact" if standardised else "space: hidden, or a cache with signals.visual=states"
            raise ConfigError(
                f"losses: {spec.name}: {url} holds the {stored} over the teacher's {teacher:,} ids, and the student "
                f"has {student:,}. Take {instead}"
            )


def check_grids(specs: Sequence[LossSpec], teacher_tokens: int, student_tokens: int) -> None:
    """Refuse losses that compare image positions of which the two sides have different numbers, unless they pool.

    Raises ``LossError``.
    """
    for spec in specs:
        if spec.on_images:
            pooled_grid(teacher_tokens, student_tokens, spec.pool)


def reads_head_square(specs: Sequence[LossSpec], visual: str) -> bool:
    """Whether a Gram of logits will be formed from visual states (``TeacherSide.head_square``)."""
    return visual == "states" and any(type(spec.entry) is Images for spec in specs)
