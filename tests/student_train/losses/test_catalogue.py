"""An entry of the catalogue is all that a loss needs: settings, schema, arrays, plan and references follow from it."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import pytest
import yaml

from student_train.config import ExpectedSize, FitConfig, SourceConfig, StudentConfig
from student_train.losses.catalogue import CATALOGUE, DEFAULT_LOSS, SPECS, Answers, LossSpec, States
from student_train.losses.needs import needed_arrays
from student_train.studies.plan_sources import source_manifest
from student_train.studies.run_plan import plan_fit
from teacher_cache.config import as_plain, build_config, schema
from teacher_cache.errors import ConfigError
from teacher_cache.files import read_yaml
from tests.promises.test_offline_online import TERMS

NAMES = list(CATALOGUE)
ROOT = Path(__file__).parents[3] / "student_train"
NAMED_IN = {"catalogue.py", "row_losses.py", "image_losses.py"}


def test_no_other_module_names_a_loss() -> None:
    """In its code, that is: what a page or an example says may name one."""
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in ROOT.rglob("*.py")
        if path.name not in NAMED_IN
        for name in _words(ast.parse(path.read_text(encoding="utf-8")))
        if name in NAMES
    }
    assert not found


def _words(tree: ast.AST) -> Iterator[str]:
    """Names and words of texts in the code, docstrings left out."""
    told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            yield node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in told:
            yield from re.findall(r"\w+", node.value)


@pytest.mark.parametrize("name", NAMES)
def test_every_loss_is_planned_and_reads_what_its_entry_says(name: str, tmp_path: Path) -> None:
    phase_one = read_yaml((ROOT.parent / "pipelines/llavadi/cache.yaml").read_text(encoding="utf-8"))
    phase_one["signals"] = {"preset": "full", "second_last": True, "attention": True, "sampled": 12}
    made_with = tmp_path / "cache.yaml"
    made_with.write_text(yaml.safe_dump(phase_one), encoding="utf-8")
    expected = ExpectedSize(samples=100, rows_per_sample=10, tokens_per_sample=50)
    source = SourceConfig(cache="not there", made_with=str(made_with), expected=expected)
    parts = {"language_model": "mtgv/MobileLLaMA-1.4B-Base", "vision_tower": "openai/clip-vit-large-patch14-336"}
    student = StudentConfig(**parts, attention="eager")
    spec, asks = LossSpec(name), not isinstance(CATALOGUE[name], Answers)
    manifest = source_manifest(source)
    rows, images = needed_arrays([spec], manifest)
    assert set(rows) | set(images) <= {a.name for a in (*manifest.arrays, *manifest.image_arrays)}
    assert bool(rows or images) == asks
    assert bool(images) == bool(CATALOGUE[name].visual)
    plan, plain = (plan_fit(FitConfig("out", (source,), student, (loss,))) for loss in (spec, DEFAULT_LOSS))
    assert (plan.cache_bytes > plain.cache_bytes) == asks
    assert (plan.teacher_flops > 0) == asks
    assert (plan.head_bytes > plain.head_bytes) == spec.needs_head
    assert (plan.trained > plain.trained) == isinstance(CATALOGUE[name], States)


@pytest.mark.parametrize("name", NAMES)
def test_every_loss_has_a_schema_of_the_settings_that_it_reads(name: str) -> None:
    made = schema(FitConfig)
    definition = made["$defs"][name]
    assert {"$ref": f"#/$defs/{name}"} in made["properties"]["losses"]["items"]["oneOf"]
    assert list(definition["properties"]) == [f.name for f in fields(SPECS[name])]
    assert definition["properties"]["name"]["const"] == name
    assert not definition["additionalProperties"]
    assert all("description" in p for key, p in definition["properties"].items() if key != "name")


@pytest.mark.parametrize("term", TERMS, ids=lambda t: " ".join(map(str, as_plain(t).values())))
def test_written_settings_are_those_that_are_read_and_read_back_as_the_same(term: LossSpec) -> None:
    plain = as_plain(term)
    assert build_config(FitConfig, {"losses": [plain]}, "a file").losses == (term,)
    for name, value in plain.items():
        if name not in ("average", *CATALOGUE[term.name].own, *(f.name for f in fields(DEFAULT_LOSS))):
            with pytest.raises(ConfigError):
                LossSpec(DEFAULT_LOSS.name, **{name: value})


def test_a_setting_that_is_not_read_is_not_written() -> None:
    exact = LossSpec("forward_kl", source="exact", tokens="all", pool=2)
    assert as_plain(exact).keys() & {"tokens", "pool", "rows"} == {"tokens", "pool"}
    assert as_plain(replace(exact, tokens="text")).keys() & {"tokens", "pool", "rows"} == {"tokens"}
    assert as_plain(LossSpec("forward_kl", source="sampled")).keys() & {"temperature", "tokens", "rows"} == {"rows"}


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"name": "forwrd_kl"}, r"losses\[0\]: no loss is called forwrd_kl; did you mean forward_kl\?"),
        ({"name": "jsd", "bta": 0.3}, r"losses\[0\]: jsd has no setting bta; did you mean beta\?"),
        ({"name": "forward_kl", "beta": 0.3}, "forward_kl has no setting beta; expected one of name, weight"),
        ({"name": "jsd", "source": "sampled"}, r"losses\[0\]\.source: expected one of topk, exact, found 'sampled'"),
        ({"name": "jsd", "tokens": "text"}, "does not read tokens with source: topk.* or set source: exact"),
        ({"name": "jsd", "pool": 2}, "jsd does not read pool with tokens: answer, found pool: 2"),
        ({"name": "hidden_mse", "tokens": "all", "layer": "second_last"}, "set tokens: answer or text"),
        ({"name": "forward_kl", "source": "sampled", "temperature": 1.0}, "does not read temperature with source"),
        ({"name": "similarity_mse", "tokens": "all"}, r"losses\[0\]\.tokens: expected one of answer, text, found"),
        ({"weight": 1.0}, r"losses\[0\]: expected a loss, for example \{name: cross_entropy\}, found"),
    ],
)
def test_what_a_loss_does_not_read_cannot_be_written(loss: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(FitConfig, {"losses": [loss]}, "a file")


def test_the_invented_loss_in_contributing_can_be_applied() -> None:
    page = (ROOT.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    diff = page.split("```diff\n")[1].split("```")[0]
    command = ["git", "apply", "--check", "--unidiff-zero", "-"]
    subprocess.run(command, input=diff, text=True, check=True, cwd=ROOT.parent)
    assert sum(line.startswith("+") and not line.startswith("+++") for line in diff.splitlines()) == 10
