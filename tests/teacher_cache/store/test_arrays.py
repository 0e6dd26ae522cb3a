"""Our arrays are ordinary Zarr v3: other people's readers open them, without this package."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.errors import CacheError
from teacher_cache.store.arrays import (
    ArrayLayout,
    chunk_rows_for,
    data_file,
    layout_from_metadata,
    load_safetensors_array,
    shard_bytes,
    view,
    zarr_metadata,
)
from teacher_cache.store.open_arrays import CompressedArray
from tests.fixtures.store import signals, synthetic_cache

DTYPES = ["bool", "int8", "uint8", "uint16", "uint32", "int64", "float16", "float32"]


@pytest.fixture(scope="module", params=["none", "zstd"])
def made(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("interop") / "cache"
    layout = {"compression": request.param, "chunk_kilobytes": 1}
    return synthetic_cache(folder, 12, layout=layout, config=signals("full", attention=True))


def _expected(made, name, shard=1):
    ids = {f"sample-{i}" for i in range(4 * shard, 4 * shard + 4)}
    return np.concatenate([r.arrays[name] for r in made.records if r.sample_id in ids])


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(DTYPES),
    st.lists(st.integers(1, 5), max_size=2),
    st.integers(0, 40),
    st.integers(1, 300),
    st.booleans(),
)
def test_any_array_survives_its_file(dtype, shape, rows, chunk_bytes, compressed):
    random = np.random.default_rng(rows)
    array = random.integers(0, 2 if dtype == "bool" else 100, (rows, *shape)).astype(dtype)
    line = int(array[:1].nbytes) if rows else 1
    layout = ArrayLayout(dtype, tuple(shape), rows, chunk_rows_for(line, rows, chunk_bytes), compressed)
    names = tuple("abc"[: 1 + len(shape)])
    assert layout_from_metadata(zarr_metadata(layout, names), names, "zarr.json") == layout
    file = b"".join(shard_bytes(array, layout))
    if not compressed:
        assert len(file) == layout.file_bytes
        np.testing.assert_array_equal(view(file, layout), array)


def test_zarr_opens_the_cache_as_one_hierarchy(made):
    import zarr

    group = zarr.open_group(str(made.storage.local), mode="r")
    for name in ("input_ids", "topk_logprobs", "hidden", "hidden_scale", "attention"):
        np.testing.assert_array_equal(group[f"shards/00001/{name}"][:], _expected(made, name))
    assert group["shards/00001/hidden"].shape[1:] == (40,)
    assert "images/00000/visual" in group


def test_zarr_reads_a_part_of_an_array(made):
    import zarr

    array = zarr.open_array(str(made.storage.local / "shards/00001/topk_ids"), mode="r")
    np.testing.assert_array_equal(array[3:9, :2], _expected(made, "topk_ids")[3:9, :2])


def test_tensorstore_opens_an_array(made):
    import tensorstore

    for name in ("topk_ids", "hidden", "stats", "loss_mask", "topk_logprobs"):
        path = f"file://{made.storage.local}/shards/00001/{name}/"
        array = tensorstore.open({"driver": "zarr3", "kvstore": path}, open=True, read=True).result()
        np.testing.assert_array_equal(array.read().result(), _expected(made, name))
        assert array.domain.labels[0] in ("token", "row", "position")


def test_xarray_opens_a_shard_with_named_axes(made):
    import xarray

    shard = xarray.open_zarr(made.storage.local / "shards/00001", consolidated=False)
    np.testing.assert_array_equal(shard["topk_logprobs"].values, _expected(made, "topk_logprobs"))
    assert shard["topk_logprobs"].dims[0] == shard["stats"].dims[0] == "row"
    assert shard["input_ids"].dims == ("token",)


def test_pandas_and_duckdb_read_the_index_and_the_ledger(made):
    import duckdb
    import pandas

    folder = made.storage.local
    index = pandas.read_parquet(folder / "shards/00001/index.parquet")
    assert index["sample_id"].tolist() == ["sample-4", "sample-5", "sample-7"]
    assert index["rows"].sum() == len(_expected(made, "topk_ids"))
    query = f"select sum(rows) from '{folder}/samples.parquet' where images > 0"
    assert duckdb.sql(query).fetchall()[0][0] == sum(r.rows for r in made.records if r.image_ids)
    joined = duckdb.sql(f"select count(*) from '{folder}/shards/*/index.parquet' where answers[1] like 'answer%'")
    assert joined.fetchall()[0][0] == len(made.records)
    assert pandas.read_parquet(folder / "shards.parquet")["samples"].sum() == len(made.records)


def test_the_cache_opens_without_this_package_and_without_torch(made):
    code = (
        "import sys, zarr, pandas\n"
        f"root = {str(made.storage.local)!r}\n"
        "ids = zarr.open_group(root, mode='r')['shards/00000/topk_ids']\n"
        "print(ids.shape, len(pandas.read_parquet(root + '/samples.parquet')))\n"
        "assert 'torch' not in sys.modules and 'teacher_cache' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"({len(_expected(made, 'topk_ids', 0))}, 8) {len(made.records)}"


def test_an_uncompressed_file_begins_with_the_bytes_of_its_array(made):
    if made.manifest.layout["compression"] != "none":
        return
    expected = _expected(made, "hidden")
    file = (made.storage.local / "shards/00001/hidden/c/0/0").read_bytes()
    assert file[: expected.nbytes] == expected.tobytes()


def test_reading_needs_no_torch(made):
    code = (
        "import sys\nfrom teacher_cache.store.reader import TeacherCache\n"
        f"print(len(TeacherCache.open({str(made.storage.local)!r}).read([0, 1]).arrays))\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_foreign_array_is_refused():
    foreign = json.dumps({"shape": [3], "codecs": [{"name": "bytes"}]}).encode()
    with pytest.raises(CacheError, match=r"a/zarr\.json: not an array this package wrote"):
        layout_from_metadata(foreign, ("row",), "a/zarr.json")


def test_bfloat16_tensors_are_read_as_float32():
    import torch
    from safetensors.torch import save

    head = torch.randn(3, 5).bfloat16()
    np.testing.assert_array_equal(
        load_safetensors_array(save({"head": head}), "head", "x", (3, 5)), head.float().numpy()
    )
    assert data_file(ArrayLayout("int8", (4,), 2, 2)) == "c/0/0"
    assert struct.calcsize("<Q") == 8


def test_frames_that_unpack_to_far_more_than_they_are_are_not_unpacked(tmp_path: Path) -> None:
    """A stranger's 5 kB whose chunks are all one frame of zeros: 300 chunks of 1 MiB."""
    chunks, size = 300, 1 << 20
    frame = pa.compress(bytes(size), codec="zstd", asbytes=True)
    index = np.array([[0, len(frame)]] * chunks, "<u8").tobytes()
    (tmp_path / "0").write_bytes(frame + index + bytes(4))
    array = CompressedArray(tmp_path / "0", ArrayLayout("uint8", (size,), chunks, 1, True), "shards/00000/hidden")
    assert not array.lines(7, 1).any()
    with pytest.raises(CacheError, match=r"shards/00000/hidden: .* bytes that unpack to 314,572,800"):
        array.lines(0, chunks)
