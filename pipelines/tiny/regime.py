"""Where the gain is and where it vanishes: the demo's baseline and its best arm, for other data and student sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from pipelines.tiny.prepare import prepare
from student_train.studies.ablate import ablate
from student_train.studies.runs import AblationConfig
from teacher_cache.build.build import build_cache
from teacher_cache.config import CacheConfig, build_config, load_config
from teacher_cache.progress import note, silence_libraries

HERE = Path(__file__).parent
METRICS = ("vqa", "pope_f1", "hallucination")


def regime(output: Path, sizes: list[tuple[int, int]], seeds: int) -> list[dict[str, Any]]:
    """One ablation per (training images, student width), scored on dev images; a line each with the paired gains."""
    lines = []
    for images, width in sizes:
        folder = output / f"{images}-images-width-{width}"
        note(f"{images} images, width {width}")
        prepare(
            folder,
            train_images=images,
            dev_images=150,
            test_images=0,
            seed=0,
            students=seeds,
            width=width,
            layers=2,
        )
        build_cache(_cache(folder), style="quiet")
        table = ablate(_ablation(folder, seeds), "lines")
        baseline, distilled = table["arms"]
        lines.append({"images": images, "width": width, **_gains(baseline, distilled)})
    (output / "regime.json").write_text(json.dumps(lines, indent=1), encoding="utf-8")
    (output / "regime.md").write_text(as_markdown(lines), encoding="utf-8")
    return lines


def as_markdown(lines: list[dict[str, Any]]) -> str:
    head = ["images", "student width", *(f"{m}: regenerated → hidden (difference)" for m in METRICS)]
    rows = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for line in lines:
        cells = [str(line["images"]), str(line["width"]), *(line[m] for m in METRICS)]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _cache(folder: Path) -> CacheConfig:
    world = folder / "world"
    paths = [f"output={folder / 'cache'}", f"data.path={world / 'train.json'}", f"data.image_folder={world / 'images'}"]
    return load_config(CacheConfig, HERE / "cache.yaml", paths)


def _ablation(folder: Path, seeds: int) -> AblationConfig:
    text = (HERE / "demo.yaml").read_text(encoding="utf-8").replace("runs/tiny/", f"{folder}/")
    tree = yaml.safe_load(text)
    tree["arms"] = {name: tree["arms"][name] for name in ("regenerated", "hidden")}
    tree["measure_options"] = {"world": str(folder / "world"), "split": "dev"}
    tree |= {"output": str(folder / "ablation"), "seeds": list(range(seeds)), "metrics": list(METRICS)}
    return build_config(AblationConfig, tree, "regime")


def _gains(baseline: dict[str, Any], distilled: dict[str, Any]) -> dict[str, str]:
    cells = {}
    for metric in METRICS:
        mean, deviation = distilled["difference"][metric]
        cells[metric] = (
            f"{baseline['mean'][metric]:.1f} → {distilled['mean'][metric]:.1f} ({mean:+.1f} ± {deviation:.1f})"
        )
    return cells


def main(
    output: Path = Path("runs/regime"),
    sizes: Annotated[str, typer.Option(help="images:width, comma-separated")] = "100:64,1000:64,300:32,300:96",
    seeds: int = 3,
) -> None:
    """Train baseline and best arm at several data and student sizes."""
    silence_libraries()
    pairs = [(int(a), int(b)) for a, b in (size.split(":") for size in sizes.split(","))]
    typer.echo(as_markdown(regime(output, pairs, seeds)))


if __name__ == "__main__":
    typer.run(main)
