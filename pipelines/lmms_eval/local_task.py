"""Writes questions with short answers as a task that lmms-eval finds with `--include_path`.

The score is lmms-eval's own `exact_match`, case and punctuation aside, as its GQA task takes it. That is what
`student_train.evaluation.metrics.vqa_accuracy` computes, so the two give the same figure.

    python -m pipelines.lmms_eval.local_task WORLD/test.json WORLD/images TASK_FOLDER
"""

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from teacher_cache.errors import DataError

TASK_YAML = """\
# Written by pipelines/lmms_eval/local_task.py; run: lmms-eval --include_path THIS_FOLDER --tasks {name}
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {questions}
test_split: test
output_type: generate_until
doc_to_visual: !function images.doc_to_visual
doc_to_text: question
doc_to_target: answer
generation_kwargs:
  max_new_tokens: {max_new_tokens}
  temperature: 0
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
    ignore_punctuation: true
metadata:
  version: 1.0
"""


def write_local_task(
    questions: Path, image_folder: Path, folder: Path, *, name: str = "tiny_world", max_new_tokens: int = 32
) -> None:
    """Make `folder` a task from LLaVA JSON with one question a sample; samples without an image may be among them.

    DataError: a sample of several turns, or an image outside `image_folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    samples = json.loads(questions.read_text(encoding="utf-8"))
    lines = [json.dumps(_question(sample, image_folder.resolve(), questions)) + "\n" for sample in samples]
    target = folder.resolve() / "questions.jsonl"
    target.write_text("".join(lines), encoding="utf-8")
    shutil.copyfile(Path(__file__).with_name("images.py"), folder / "images.py")
    yaml = TASK_YAML.format(name=name, questions=json.dumps(str(target)), max_new_tokens=max_new_tokens)
    (folder / f"{name}.yaml").write_text(yaml, encoding="utf-8")


def _question(sample: dict[str, Any], image_folder: Path, path: Path) -> dict[str, str]:
    turns = [turn["value"] for turn in sample["conversations"]]
    if len(turns) != 2:
        raise DataError(
            f"{path}, sample {sample['id']}: {len(turns)} messages; expected a question and its answer, because "
            "lmms-eval asks single questions. Take a split of one question a sample."
        )
    return {
        "question_id": str(sample["id"]),
        "image": _image(sample, image_folder, path),
        "question": turns[0].replace("<image>", "").strip(),
        "answer": turns[1],
    }


def _image(sample: dict[str, Any], image_folder: Path, path: Path) -> str:
    """The absolute path of a sample's image, "" where it has none."""
    if not sample.get("image"):
        return ""
    image = (image_folder / sample["image"]).resolve()
    if not image.is_relative_to(image_folder) or not image.is_file():
        raise DataError(
            f"{path}, sample {sample['id']}: image '{sample['image']}'; expected a file inside {image_folder}. "
            "Pass the data set's image folder."
        )
    return str(image)


def main(
    questions: Annotated[Path, typer.Argument(help="LLaVA JSON, one question a sample")],
    image_folder: Path,
    folder: Annotated[Path, typer.Argument(help="where the task is written")],
    name: str = "tiny_world",
    max_new_tokens: int = 32,
) -> None:
    """Write an lmms-eval task folder."""
    write_local_task(questions, image_folder, folder, name=name, max_new_tokens=max_new_tokens)
    typer.echo(f"{folder / f'{name}.yaml'}: lmms-eval --include_path {folder} --tasks {name}")


if __name__ == "__main__":
    typer.run(main)
