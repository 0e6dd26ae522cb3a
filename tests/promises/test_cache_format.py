"""docs/cache-format.md is true: its reader gives what the package gives, its examples run, its tables are complete."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from teacher_cache.store.codecs import decode
from teacher_cache.store.reader import TeacherCache
from teacher_cache.store.records import record_arrays
from tests.fixtures.rounding import MODEL, within
from tests.fixtures.store import SHAPE, signals, synthetic_cache

PAGE = (Path(__file__).parents[2] / "docs/cache-format.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.S)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return synthetic_cache(tmp_path_factory.mktemp("format") / "c", 12, config=signals())


def test_the_documented_reader_gives_what_the_package_gives(made):
    scope = {"CACHE": str(made.storage.local)}
    exec(BLOCKS[0], scope)
    assert len([line for line in BLOCKS[0].splitlines() if line.strip()]) <= 36
    head = made.head.numpy()
    with TeacherCache(made.storage) as cache:
        for i in range(len(cache)):
            record = cache[i]
            sample_id, input_ids, topk_ids, logits = scope["sample"](i)
            assert sample_id == record.sample_id
            np.testing.assert_array_equal(input_ids, record.arrays["input_ids"])
            np.testing.assert_array_equal(topk_ids, record.arrays["topk_ids"])
            states = decode(record.arrays["hidden"], record.arrays["hidden_scale"], "int8", cache.scales["hidden"])
            np.testing.assert_allclose(logits, states @ head.T, **within(operations=MODEL))


def test_the_documented_reader_needs_numpy_and_pyarrow_alone(made):
    code = f"CACHE = {str(made.storage.local)!r}\n{BLOCKS[0]}\nprint(sample(2)[0])\nimport sys\n"
    code += "assert not {'torch', 'zarr', 'teacher_cache', 'safetensors'} & set(sys.modules)\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "sample-2", done.stderr


@pytest.mark.parametrize("block", BLOCKS[1:], ids=lambda b: b.split()[1])
def test_every_interoperability_example_runs(made, block, capsys):
    exec(block, {"CACHE": str(made.storage.local)})
    assert capsys.readouterr().out


def test_every_array_is_documented():
    for config in (signals("full", second_last=True, attention=True, sampled=3), signals("llava_kd")):
        for spec in record_arrays(config, SHAPE):
            assert f"`{spec.name.removesuffix('_scale')}" in PAGE, spec.name


def test_every_column_and_side_file_is_documented(made):
    import pyarrow.parquet as pq

    folder = made.storage.local
    for file in ("shards.parquet", "samples.parquet", "shards/00000/index.parquet"):
        for column in pq.read_schema(folder / file).names:
            assert re.search(rf"\b{column}\b", PAGE), (file, column)
    for name in made.manifest.files:
        assert name in PAGE, name
