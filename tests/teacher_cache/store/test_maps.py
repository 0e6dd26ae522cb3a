"""However many shards a cache has: few maps are let go of at a time, and what is mapped again is what was written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from teacher_cache.errors import CacheError
from teacher_cache.store import open_arrays, reader
from teacher_cache.store.maps import MAPS, OpenMaps
from teacher_cache.store.reader import TeacherCache
from tests.fixtures.store import Made, synthetic_cache

SHARDS = 12


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return synthetic_cache(tmp_path_factory.mktemp("maps"), 4 * SHARDS, skipped=())


@pytest.fixture
def maps(monkeypatch: pytest.MonkeyPatch) -> OpenMaps:
    few = OpenMaps(11)
    monkeypatch.setattr(open_arrays, "MAPS", few)
    return few


def test_far_fewer_maps_than_files_give_the_same_arrays(made: Made, maps: OpenMaps) -> None:
    with TeacherCache.open(made.storage.url) as cache:
        for numbers in np.random.default_rng(0).permutation(np.tile(np.arange(len(cache)), 3)).reshape(-1, 6):
            batch = cache.read(numbers)
            for name, array in batch.arrays.items():
                wanted = np.concatenate([made.records[n].arrays[name] for n in numbers])
                np.testing.assert_array_equal(array, wanted)
            assert len(maps) <= 11


class Counted:
    """Stands where an array does; remembers whether it was let go of."""

    used, gone = False, False

    def unmap(self) -> None:
        self.gone = True


def test_one_goes_for_one_that_comes_and_it_is_one_not_used_lately() -> None:
    maps, arrays = OpenMaps(10), [Counted() for _ in range(30)]
    for number, array in enumerate(arrays):
        maps.opening(array, lambda: None)
        arrays[0].used = True
        assert sum(a.gone for a in arrays) == max(number + 1 - 10, 0)
    assert not arrays[0].gone


def test_arrays_of_a_cache_that_is_gone_are_not_counted() -> None:
    maps = OpenMaps(10)
    for _ in range(30):
        maps.opening(Counted(), lambda: None)
    assert len(maps) == 0
    assert len(maps._queue) <= 10


def test_an_index_that_was_let_go_of_is_read_again(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    with TeacherCache.open(made.storage.url) as cache:
        cache.read(range(len(cache)))
        one = next(iter(cache._folders)).memory_bytes
        assert cache._folders.bytes == sum(f.memory_bytes for f in cache._folders)
    monkeypatch.setattr(reader, "_INDEX_BYTES", int(3.5 * one))
    with TeacherCache.open(made.storage.url) as cache:
        for number in np.random.default_rng(0).permutation(len(cache)):
            assert cache.read([number]).sample_ids == [f"sample-{number}"]
            assert cache._folders.bytes == sum(f.memory_bytes for f in cache._folders) <= 3.5 * one


def test_a_file_that_was_replaced_while_it_was_not_mapped_is_checked_anew(tmp_path: Path, maps: OpenMaps) -> None:
    made = synthetic_cache(tmp_path / "c", 4 * SHARDS, skipped=())
    with TeacherCache.open(tmp_path / "c") as cache:
        cache.read(range(len(cache)))
        path = tmp_path / "c/shards/00000/input_ids/c/0"
        data = path.read_bytes()
        (tmp_path / "new").write_bytes(bytes([data[0] ^ 1]) + data[1:])
        (tmp_path / "new").replace(path)
        with pytest.raises(CacheError, match=r"shards/00000/input_ids/c/0: bytes 0.*were changed"):
            cache.read([0])
    assert made.records


LITTLE_ROOM = """
import resource, sys
from pathlib import Path
import numpy as np
from teacher_cache.store.arrays import ArrayLayout
from teacher_cache.store.open_arrays import MappedArray
folder, layout = Path(sys.argv[1]), ArrayLayout("uint8", (), 1 << 30, 1 << 30)
arrays = []
for number in range(8):
    path = folder / str(number)
    with path.open("wb") as file:
        file.write(bytes([number]))
        file.truncate(layout.file_bytes)
    arrays.append(MappedArray(lambda path=path: path, layout, None, str(path)))
now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (5 << 29), now + (5 << 29)))  # two and a half of them
print([int(array.lines(0, 1)[0]) for array in arrays * 2])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_where_the_system_has_no_room_for_a_map_others_are_let_go_of(tmp_path: Path) -> None:
    out = subprocess.run([sys.executable, "-c", LITTLE_ROOM, str(tmp_path)], capture_output=True, text=True, check=True)
    assert out.stdout == f"{[*range(8), *range(8)]}\n"


def test_the_process_keeps_maps_for_others() -> None:
    assert MAPS.limit >= 1000
    assert not Path("/proc/sys/vm/max_map_count").exists() or MAPS.limit < int(
        Path("/proc/sys/vm/max_map_count").read_text()
    )
