"""The errors that both command lines print calmly: each says what, where, expected and found, and what to do next.

Each is also the builtin that a caller would catch. Everything else that is raised is a fault of ours and a traceback.

>>> import teacher_cache as tc
>>> try:
...     tc.open("runs/no-cache")
... except tc.errors.CacheError as error:
...     print(isinstance(error, ValueError))
True
"""

from __future__ import annotations


class UserError(Exception):
    """Something that whoever gave the input can mend; never raised itself."""


class ConfigError(UserError, ValueError):
    """A setting that does not exist, has the wrong type or contradicts another one."""


class DataError(UserError, ValueError):
    """A data file that is not LLaVA's format as a whole; nothing can be read from it."""


class ImageError(UserError, ValueError):
    """An image that is missing, outside the image folder, truncated, too large or no image at all."""


class TemplateError(UserError, ValueError):
    """A template that does not exist, or that the tokenizer cannot write token by token."""


class ConversationError(UserError, ValueError):
    """A conversation that a model cannot be shown; the text is the reason to skip it."""


class StorageError(UserError, OSError):
    """The disk or the object store refused; what was committed before stands."""


class CacheError(UserError, ValueError):
    """A cache that may not be used: other version, other tokenizer, incomplete, corrupted, made from other data."""


class CacheVersionError(CacheError):
    """A whole cache of another format version: nothing in it is broken."""


class TeacherError(UserError, RuntimeError):
    """A teacher that cannot be loaded, or does not fit the data; says what to set."""


class TeacherCrashed(TeacherError):
    """A process of the teacher died. The next call starts a new one; what had not come yet must be asked again."""


class LossError(UserError, ValueError):
    """Losses that this cache or this student cannot have: signals that are not cached, widths or grids that differ."""


class TrainingError(UserError, ValueError):
    """A run that cannot go on: its numbers are no numbers any more."""


class EvaluationError(UserError, RuntimeError):
    """A benchmark that cannot be run or a student that cannot be scored."""


class ReportError(UserError, ValueError):
    """A folder without runs, or a file in it that is not what it should be."""
