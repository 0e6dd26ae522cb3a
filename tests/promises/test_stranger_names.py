"""No name in a stranger's cache leads anywhere but to the cache's own files; every digest of these caches is right."""

import os
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from teacher_cache.cli import app
from teacher_cache.errors import CacheError
from teacher_cache.store.names import inside, plain_name
from teacher_cache.store.prefetch import LocalCopy
from teacher_cache.store.reader import TeacherCache
from teacher_cache.store.storage import Storage
from teacher_cache.trust.verify import repair_cache, verify_cache
from tests.fixtures.forged import edit_index, put_sum, seal, untouched
from tests.fixtures.s3_server import S3Server
from tests.fixtures.store import signals, synthetic_cache

ROOT = Path(__file__).parents[2]
PAYLOAD = b"# written by a stranger's cache\n"
LEAVING = ["/etc/hostname", "../x", "a/../../x", "a//b", "./a", "a/.", "", "a\\b", "c:/x", "a\0b", "a\x1b[2Jb", 5, None]


@pytest.fixture
def forged(tmp_path):
    """A cache in the middle of somebody's folder."""
    synthetic_cache(tmp_path / "home/work/cache", config=signals("full"))
    return tmp_path / "home/work/cache"


@pytest.fixture
def victim(tmp_path):
    folder = tmp_path / "home/victim"
    folder.mkdir(parents=True)
    (folder / ".bashrc").write_bytes(b"mine\n")
    return folder


@pytest.mark.parametrize("name", LEAVING)
def test_a_name_that_could_leave_its_folder_is_refused(name):
    with pytest.raises(CacheError, match=r"here\.json: .*not a cache as teacher-cache writes it"):
        plain_name(name, "here.json")


@pytest.mark.parametrize("name", [n for n in LEAVING if n])
def test_a_manifest_with_a_name_of_its_own_is_refused(forged, victim, name):
    seal(forged, lambda plain: plain["files"].update({str(name): "0" * 64}))
    with untouched(victim), pytest.raises(CacheError, match=r"manifest\.json: .*"):
        TeacherCache.open(forged)


def test_repair_deletes_nothing_that_the_manifest_names(forged, victim):
    """attack/01: a side file ``answers/../../../victim/thesis.tex`` was unlinked by ``verify --repair``."""
    (forged / "answers").mkdir()
    (victim / "thesis.tex").write_text("work")
    seal(forged, lambda plain: plain["files"].update({"answers/../../../victim/thesis.tex": "0" * 64}))
    with untouched(victim):
        found = CliRunner().invoke(app, ["verify", str(forged), "--repair"])
    assert "could lead out of its folder" in found.output


@pytest.mark.parametrize("name", ["images", "images/00001", "shards/00001", "shards"])
def test_repair_removes_nothing_behind_a_link(forged, victim, name):
    shutil.move(forged / name, victim / "photos")
    (forged / name).symlink_to(victim / "photos")
    storage = Storage(forged)
    report = verify_cache(storage, deep=True)
    assert "a link that leads out" in report.lines()[0]
    with untouched(victim, forged), pytest.raises(CacheError, match="a link that leads out"):
        repair_cache(storage, report)


def test_a_link_below_the_root_to_a_place_within_is_followed(forged):
    (forged / "shards").rename(forged / "kept")
    (forged / "shards").symlink_to("kept")
    assert verify_cache(Storage(forged), deep=True).ok


def test_a_cache_behind_a_link_that_the_user_named_is_read(forged, tmp_path):
    (tmp_path / "link").symlink_to(forged)
    assert verify_cache(Storage(tmp_path / "link"), deep=True).ok


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
@pytest.mark.parametrize("name", ["samples.parquet", "manifest.json", "shards/00000/index.parquet"])
def test_what_is_no_file_is_neither_read_nor_waited_for(forged, kind, name):
    (forged / name).unlink()
    if kind == "pipe":
        os.mkfifo(forged / name)
    elif kind == "device":
        (forged / name).symlink_to("/dev/zero")
    else:
        (forged / name).mkdir()
    report = verify_cache(Storage(forged))
    assert name in [p.file for p in report.problems]
    with pytest.raises(CacheError, match=r"expected a file, found|a link that leads out"):
        _read_all(forged)


def _read_all(folder: Path) -> None:
    with TeacherCache.open(folder) as cache:
        cache.read([0])
        cache.counts("row")


def _name_outside(cache: Path, victim: Path) -> str:
    up = f"hidden/{'../' * 30}{str(victim).lstrip('/')}/.bashrc"
    put_sum(cache, "shards/00000", up, PAYLOAD)
    return up


@pytest.fixture(scope="module")
def server():
    server = S3Server()
    yield server
    server.close()


@pytest.fixture(params=["memory", "s3"])
def remote(request, server, forged, victim):
    """The forged cache behind an address, with the object that its index names."""
    name = _name_outside(forged, victim)
    number = str(abs(hash(str(forged))))[:12]
    if request.param == "memory":
        storage = Storage(f"memory://evil-{number}/cache")
    else:
        storage = Storage(f"{server.bucket('evil-' + number)}/cache", server.options)
    for path in forged.rglob("*"):
        if path.is_file():
            storage.write(str(path.relative_to(forged)), [path.read_bytes()])
    storage._fs.pipe_file(f"{storage._root}/shards/00000/{name}", PAYLOAD)
    return storage


def test_reading_a_remote_cache_writes_nothing_outside_the_prefetch_folder(remote, victim, tmp_path):
    """attack/02: an index that names ``hidden/../../…/.bashrc`` had that file written, promise 8 and more."""
    prefetch = tmp_path / "home/prefetch"
    with untouched(victim):
        assert any("could lead out of its folder" in p.what for p in verify_cache(remote, deep=True).problems)
        with TeacherCache(remote, prefetch_folder=prefetch) as cache:
            with pytest.raises(CacheError, match=r"shards/00000/index\.parquet: the name .* could lead out"):
                cache.prefetch([0, 1])
            with pytest.raises(CacheError, match=r"shards/00000/index\.parquet: the name .* could lead out"):
                cache.read([0])
            assert len(cache.read([4]).sample_ids) == 1
    assert all(
        p.is_relative_to(prefetch) for p in tmp_path.rglob("*") if PAYLOAD in (p.read_bytes() if p.is_file() else b"")
    )


def test_an_array_that_the_manifest_does_not_know_is_refused(forged):
    put_sum(forged, "shards/00000", "extra/zarr.json", b"{}")
    with TeacherCache.open(forged) as cache, pytest.raises(CacheError, match=r"'extra/zarr\.json', which no cache has"):
        cache.read([0])


def test_copies_of_a_cache_lie_in_the_prefetch_folder_whatever_its_generation_is(tmp_path):
    with pytest.raises(CacheError, match="could lead out"):
        LocalCopy(Storage("memory://generation"), tmp_path / "prefetch", 1.0, "../../../../../../../etc")


def test_a_server_that_sends_more_than_it_said_is_cut_off(forged, tmp_path):
    storage = Storage("memory://endless/cache")
    storage.write("big", [b"0" * 3_000_000])
    with pytest.raises(CacheError, match=r"endless/cache/big: expected at most 1,000 bytes, found more"):
        storage.download("big", tmp_path / "target", 1_000)
    with pytest.raises(CacheError, match=r"endless/cache/big: expected at most 1,000 bytes, found more"):
        storage.read("big", 1_000)
    assert not list(tmp_path.glob("*target*"))


def test_a_link_that_lies_where_a_temporary_file_goes_is_not_followed(forged, victim):
    (forged / f".skipped.jsonl.tmp-{os.getpid()}").symlink_to(victim / ".bashrc")
    (forged / f"shards/.00001.tmp-{os.getpid()}").symlink_to(victim)
    storage = Storage(forged)
    with untouched(victim):
        storage.write("skipped.jsonl", [b""])
        storage.commit_folder("shards/00001", {"index.parquet": [b"x"]}, "index.parquet")
    assert (forged / "shards/00001/index.parquet").read_bytes() == b"x"


def test_names_are_joined_to_a_folder_in_one_place():
    """The text search: nobody else makes a path of a cache's root and a name."""
    joined = re.compile(r"\.local\s*/|_root\s*/|\.local\.joinpath|_root\.joinpath|\{self\._root\}/")
    allowed = {
        "teacher_cache/store/storage.py": 1,  # Storage.path, which asks plain_name
        "teacher_cache/build/build.py": 1,  # a constant name, of a file of the build's own
    }
    found = {}
    for package in ("teacher_cache", "student_train"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if count := len(joined.findall(path.read_text(encoding="utf-8"))):
                found[str(path.relative_to(ROOT))] = count
    assert found == allowed


def test_inside_is_the_folder_itself_never(tmp_path):
    (tmp_path / "self").symlink_to(".")
    with pytest.raises(CacheError, match="a link that leads out"):
        inside(tmp_path, "self")


def test_edits_of_the_forger_keep_the_digests_right(forged):
    edit_index(forged, "shards/00000")
    assert verify_cache(Storage(forged), deep=True).ok
