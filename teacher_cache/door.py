"""A cache in anybody's own loop: what ``teacher_cache.open`` gives.

The one module of this package that knows of ``student_train``, and only when it is asked: whoever imports it loads no
torch. Nothing inside the package imports it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teacher_cache.errors import ConfigError
from teacher_cache.store import reader

if TYPE_CHECKING:
    from student_train.feed.torch_dataset import CacheDataset


class TeacherCache(reader.TeacherCache):
    """A complete, readable cache of M samples: by number, in any order, from any number of processes.

    ``len(cache)`` is M, ``cache[i]`` one sample with all its arrays, ``cache.read(numbers, names)`` several at once,
    ``cache.head`` (V, d) the teacher's output projection, ``cache.manifest`` who made it. Make it with
    ``teacher_cache.open``.

    Raises
    ------
    CacheError
        When it is opened: no cache, not complete, another format or tokenizer. When it is read: a changed byte.

    Examples
    --------
    >>> import teacher_cache as tc
    >>> with tc.open("runs/tiny/cache") as cache:
    ...     batch = cache.read([5, 0], ["topk_ids"])
    >>> rows = int(batch.counts["row"].sum())
    >>> batch.arrays["topk_ids"].shape == (rows, 16)
    True
    """

    def torch(
        self,
        processor: Any,
        *,
        images: str | Path | Sequence[str] = "",
        signals: Sequence[str] = ("topk",),
        model: Any = None,
        chat_template: str = "",
        same_ids: bool = False,
    ) -> CacheDataset:
        """A map-style torch ``Dataset`` of this cache for a student with this ``processor`` (or tokenizer).

        images: the folder of the image files, or the Parquet files that hold them · signals: what is read of the
        teacher, by the losses' ``source`` (``topk``, ``sampled``, ``exact``), and ``advantage``; none for the answers
        alone · model: the student, or its folder (default: where the processor was loaded from) · chat_template,
        same_ids: as ``student.chat_template`` and ``sources[…].tokenizer=same_ids`` in a configuration.

        Its items go through ``data.collate`` to a batch: a dictionary of what the model reads, and ``labels`` (B, S),
        −100 where no answer token stands. ``batch.teacher`` has the R answer rows: ``positions`` that predict them,
        ``answer_ids`` (R,), ``row_loss(loss, logits)`` (R,), ``loss(losses, logits)`` and ``head_loss(losses, states,
        model)``, which never forms the logits.

        Raises
        ------
        CacheError, ConfigError, DataError, TemplateError
            Here, not at a step: another vocabulary or end token, a signal that the cache lacks, a processor of another
            family, images that are missing, samples too long for the student.

        Examples
        --------
        >>> import teacher_cache as tc
        >>> from transformers import AutoProcessor
        >>> processor = AutoProcessor.from_pretrained("runs/tiny/students/0", backend="pil")
        >>> with tc.open("runs/tiny/cache", tokenizer=processor.tokenizer) as cache:
        ...     data = cache.torch(processor, images="runs/tiny/world/images", signals=["topk"])
        >>> batch = data.collate([data[0], data[7]])
        >>> sorted(batch)
        ['attention_mask', 'input_ids', 'labels', 'pixel_values']
        >>> int((batch["labels"] != -100).sum()) == len(batch.teacher)
        True
        """
        from student_train.feed.torch_dataset import CacheDataset

        if self.storage.options:
            raise ConfigError(
                f"{self.storage.url}: opened with options, which loader processes do not get. Give them to fsspec "
                "itself (its configuration, or the store's environment variables), and open the cache without"
            )
        return CacheDataset(
            self.storage.address,
            processor,
            images=images,
            signals=signals,
            model=model,
            chat_template=chat_template,
            same_ids=same_ids,
        )


def open(url: str | Path, *, tokenizer: Any = None, **settings: Any) -> TeacherCache:
    """The cache at ``url``: a folder, or ``s3://``, ``gs://`` and whatever else fsspec knows.

    tokenizer: the student's; one of another base vocabulary is refused, since ids would mean other text. Of a remote
    cache shards are copied as they are read: ``prefetch_folder``, ``prefetch_gigabytes``; ``options``: fsspec's ·
    ``checked`` (default) compares every block with its checksum when it is first read.

    Raises
    ------
    CacheError
        No cache, not complete, another format version, changed files, or another tokenizer; with what to do.

    Examples
    --------
    >>> import teacher_cache as tc
    >>> with tc.open("runs/tiny/cache") as cache:
    ...     sample = cache[0]
    >>> sample.arrays["topk_logprobs"].shape == (int(sample.arrays["loss_mask"].sum()), 16)  # (R, k)
    True
    """
    return TeacherCache.open(url, tokenizer=tokenizer, **settings)
