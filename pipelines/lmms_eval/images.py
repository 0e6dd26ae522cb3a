"""The functions that a local task's YAML names; `local_task` puts a copy beside it. Runs in lmms-eval's environment."""

from PIL import Image


def doc_to_visual(doc):
    """The image of a question as lmms-eval wants it, or none for a question without one."""
    return [Image.open(doc["image"]).convert("RGB")] if doc["image"] else []
