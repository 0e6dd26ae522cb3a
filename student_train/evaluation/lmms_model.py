"""The model class `llava_student` of lmms-eval, and the command line with it. The one file that imports lmms_eval.

Run as a script by lmms-eval's own environment (`evaluation.lmms` does), because the two environments differ:

    …/evaluation/lmms_model.py --model llava_student --model_args pretrained=FOLDER --tasks gqa

Why a class of our own: `llava_hf` of lmms-eval 0.7.3 hands an empty image list to the processor when a question has no
image; generation then fails, the error is only logged, and "" is scored (in its simple mode: the inputs of the question
before are answered again). Half of ScienceQA's test questions and the tiny world's facts have none.
"""

from typing import Any

from lmms_eval.__main__ import cli_evaluate
from lmms_eval.models import MODEL_REGISTRY_V2
from lmms_eval.models.chat.llava_hf import LlavaHf
from lmms_eval.models.registry_v2 import ModelManifest


class StudentLlava(LlavaHf):
    """`llava_hf` that answers questions without an image too."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._image_processor = OptionalImages(self._image_processor)  # type: ignore[has-type]

    @property
    def eot_token_id(self) -> int:
        """Of the student's template: ChatML's end token is not the end token of Qwen's base tokenizer."""
        ends = self.model.generation_config.eos_token_id
        return int(ends if isinstance(ends, int) else ends[0])


class OptionalImages:
    """A processor for which no images and an empty list of them are the same."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __call__(self, images: Any = None, **arguments: Any) -> Any:
        return self._processor(images=images or None, **arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)


def main() -> None:
    """lmms-eval's command line with one more model."""
    manifest = ModelManifest(model_id="llava_student", chat_class_path=f"{__name__}.{StudentLlava.__name__}")
    MODEL_REGISTRY_V2.register_manifest(manifest)
    cli_evaluate()


if __name__ == "__main__":
    main()
