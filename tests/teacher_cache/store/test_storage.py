"""A folder is committed whole or not at all, whatever the disk does; faults say what to do."""

import contextlib
import errno
import multiprocessing
import os
import re
import resource
import stat
import time
from pathlib import Path

import pytest

from teacher_cache.errors import StorageError
from teacher_cache.store import storage as storage_module
from teacher_cache.store.storage import Storage
from tests.fixtures.waiting import PATIENCE

FILES = {"a/data": [b"123", memoryview(b"45")], "index": [b"i"]}


def _bytes(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_a_folder_appears_with_all_its_files(tmp_path):
    storage = Storage(tmp_path)
    storage.commit_folder("shards/00000", FILES, "index")
    assert _bytes(tmp_path) == {"shards/00000/a/data": b"12345", "shards/00000/index": b"i"}
    assert storage.names("shards") == ["00000"]
    assert storage.exists("shards/00000/index")
    assert storage.size("shards/00000/a/data") == 5
    assert storage.names("nowhere") == []


def test_a_folder_that_is_redone_is_replaced_whole(tmp_path):
    storage = Storage(tmp_path)
    storage.commit_folder("shards/00000", {**FILES, "old": [b"x"]}, "index")
    storage.commit_folder("shards/00000", FILES, "index")
    assert set(_bytes(tmp_path)) == {"shards/00000/a/data", "shards/00000/index"}


@pytest.mark.parametrize("fails_at", ["_write_file", "flush"])
def test_a_fault_while_committing_leaves_nothing(tmp_path, monkeypatch, fails_at):
    storage = Storage(tmp_path)
    real, calls = getattr(storage_module, fails_at), []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(storage_module, fails_at, full)
    with pytest.raises(
        StorageError, match=r"shards/00000: could not write it .*The disk is full: free space.*same command"
    ):
        storage.commit_folder("shards/00000", FILES, "index")
    monkeypatch.undo()
    assert _bytes(tmp_path) == {}
    storage.commit_folder("shards/00000", FILES, "index")
    assert len(_bytes(tmp_path)) == 2


@pytest.mark.parametrize(
    ("of_folders", "message"),
    [({"fsync": errno.EINVAL}, ""), ({"rename": errno.ENOTSUP}, "cannot do that (rename a folder, for one)")],
)
def test_a_file_system_without_one_of_our_steps_is_used_or_named(tmp_path, monkeypatch, of_folders, message):
    """CIFS and some FUSE file systems cannot fsync a folder, those that show a bucket cannot rename one."""
    fsync, rename = os.fsync, Path.rename

    def refused(step, is_folder):
        if step in of_folders and is_folder:
            raise OSError(of_folders[step], os.strerror(of_folders[step]))

    monkeypatch.setattr(os, "fsync", lambda n: refused("fsync", stat.S_ISDIR(os.fstat(n).st_mode)) or fsync(n))
    monkeypatch.setattr(Path, "rename", lambda self, to: refused("rename", self.is_dir()) or rename(self, to))
    storage = Storage(tmp_path)
    with pytest.raises(StorageError, match=re.escape(message)) if message else contextlib.nullcontext():
        storage.commit_folder("shards/00000", {"index": [b"i"], "a": [b"1"]}, "index")
    assert storage.names("shards") == ([] if message else ["00000"])


def test_a_file_where_a_folder_is_to_be_is_named_and_removed_by_repair(tmp_path):
    storage = Storage(tmp_path)
    storage.write("shards/00000", [b"x"])
    with pytest.raises(StorageError, match="A file lies where a folder is to be: move it away"):
        storage.commit_folder("shards/00000", {"index": [b"i"]}, "index")
    storage.remove("shards/00000", "index")
    assert storage.names("shards") == []


def test_a_file_that_a_killed_process_left_half_written_goes_when_it_is_written_again(tmp_path: Path) -> None:
    left, other = tmp_path / "answers/.part-0.parquet.tmp-999-00c0ffee", tmp_path / "answers/.part-1.parquet.tmp-999-1"
    left.parent.mkdir()
    left.write_bytes(b"half")
    other.write_bytes(b"of another file")
    Storage(str(tmp_path)).write("answers/part-0.parquet", [b"whole"])
    assert sorted(path.name for path in left.parent.iterdir()) == [other.name, "part-0.parquet"]


def test_what_a_killed_process_left_is_cleared_and_never_listed_as_a_shard(tmp_path):
    left = tmp_path / "shards/.00000.tmp-999/a"
    left.mkdir(parents=True)
    (left / "data").write_bytes(b"half")
    storage = Storage(tmp_path)
    assert [n for n in storage.names("shards") if n.isdigit()] == []
    storage.commit_folder("shards/00000", FILES, "index")
    assert storage.names("shards") == ["00000"]


def test_a_single_file_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    storage = Storage(tmp_path)
    storage.write("manifest.json", [b"old"])

    def parts():
        yield b"ne"
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(StorageError, match=r"manifest\.json: could not write it \(Input/output error\)"):
        storage.write("manifest.json", parts())
    assert _bytes(tmp_path) == {"manifest.json": b"old"}


def _dying_in_the_third_byte(root: str) -> None:
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the system ends a process that writes beyond this limit
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2, 2))
    Storage(root).write("manifest.json", [b"newer"])


def test_a_process_that_dies_while_it_writes_leaves_the_old_file(tmp_path):
    Storage(tmp_path).write("manifest.json", [b"old"])
    process = multiprocessing.get_context("fork").Process(target=_dying_in_the_third_byte, args=(str(tmp_path),))
    process.start()
    process.join()
    assert process.exitcode is not None
    assert process.exitcode < 0
    assert (tmp_path / "manifest.json").read_bytes() == b"old"


def _as_nobody(root: str, queue) -> None:
    if os.getuid() == 0:
        os.setuid(65534)
    try:
        Storage(root).commit_folder("shards/00000", FILES, "index")
    except StorageError as error:
        queue.put(str(error))
    else:
        queue.put("written")


def _with_little_space(root: str, queue) -> None:
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        Storage(root).commit_folder("shards/00000", {"data": [bytes(5000)], "index": [b"i"]}, "index")
    except StorageError as error:
        queue.put(str(error))


@pytest.mark.parametrize(
    ("target", "message"),
    [(_as_nobody, "No permission to write here: change it"), (_with_little_space, "limit of this process is reached")],
)
def test_real_refusals_of_the_system_are_explained_and_leave_nothing(tmp_path, target, message):
    os.chmod(tmp_path, 0o555 if target is _as_nobody else 0o755)  # noqa: PTH101
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=target, args=(str(tmp_path), queue))
    process.start()
    assert message in queue.get(timeout=PATIENCE)
    process.join()
    os.chmod(tmp_path, 0o755)  # noqa: PTH101
    assert _bytes(tmp_path) == {}


@pytest.fixture
def remote(request, monkeypatch):
    monkeypatch.setattr("teacher_cache.files.FIRST_WAIT_SECONDS", 0.0)
    name = request.node.name.replace("[", "-").replace("]", "")
    return Storage(f"memory://{name}")


def test_memory_storage_commits_the_mark_last(remote, monkeypatch):
    written = []
    monkeypatch.setattr(remote, "write", lambda name, parts: written.append(name))
    remote.commit_folder("shards/00000", {"index": [b"i"], "a": [b"1"], "b": [b"2"]}, "index")
    assert written == ["shards/00000/a", "shards/00000/b", "shards/00000/index"]


def test_a_remote_folder_that_is_redone_does_not_exist_meanwhile(remote, monkeypatch):
    remote.commit_folder("s", FILES, "index")
    seen = []
    real = remote.write
    monkeypatch.setattr(remote, "write", lambda n, p: (seen.append(remote.exists("s/index")), real(n, p)))
    remote.commit_folder("s", FILES, "index")
    assert seen == [False, False]
    assert remote.read("s/index") == b"i"


def test_passing_faults_are_tried_again(remote, monkeypatch):
    remote.write("x", [b"data"])
    real, calls = type(remote._fs).cat_file, []

    def shaky(self, *arguments, **options):
        calls.append(1)
        if len(calls) < 4:
            raise ConnectionError("reset by peer")
        return real(self, *arguments, **options)

    monkeypatch.setattr(type(remote._fs), "cat_file", shaky)
    assert remote.read("x") == b"data"
    assert len(calls) == 4


def test_lasting_faults_say_what_to_do(remote, monkeypatch):
    def broken(self, *_, **__):
        raise TimeoutError("no answer")

    monkeypatch.setattr(type(remote._fs), "pipe_file", broken)
    with pytest.raises(StorageError, match=r"could not write it in 5 tries \(no answer\)\. Committed shards stand"):
        remote.write("x", [b"data"])


def test_final_refusals_are_not_tried_again(remote, monkeypatch):
    calls = []

    def denied(self, *_, **__):
        calls.append(1)
        raise PermissionError("403")

    monkeypatch.setattr(type(remote._fs), "pipe_file", denied)
    with pytest.raises(StorageError, match=r"no permission to write it \(403\)\. Check the credentials"):
        remote.write("x", [b"data"])
    assert calls == [1]
    with pytest.raises(FileNotFoundError):
        remote.read("nowhere")


def test_a_download_appears_whole_or_not_at_all(remote, monkeypatch, tmp_path):
    remote.write("x", [b"data"])
    remote.download("x", tmp_path / "deep/x", 4)
    assert (tmp_path / "deep/x").read_bytes() == b"data"

    def half(self, _, target, **__):
        Path(target).write_bytes(b"da")
        raise ConnectionError("cut")

    monkeypatch.setattr(type(remote._fs), "get_file", half)
    with pytest.raises(StorageError, match="could not read it in 5 tries"):
        remote.download("x", tmp_path / "y", 4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep"]


def test_free_space_is_known_before_the_folder_exists(tmp_path):
    assert Storage(tmp_path / "not/yet").free_bytes() > 0
    assert Storage("memory://x").free_bytes() is None


def _without_files(root: str, queue, passing: bool) -> None:
    """No file can be opened any more; with ``passing``, until this process has waited."""
    held = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    with contextlib.suppress(OSError):
        while True:
            held.append(os.open("/dev/null", os.O_RDONLY))

    def wait(_: float) -> None:
        for descriptor in held[-20:] if passing else ():
            os.close(descriptor)
            held.remove(descriptor)

    time.sleep = wait
    try:
        Storage(root).commit_folder("shards/00000", FILES, "index")
        said = repr(Storage(root).read("shards/00000/index"))
    except StorageError as error:
        said = str(error)
    for descriptor in held:
        os.close(descriptor)
    queue.put(said)


@pytest.mark.parametrize(
    ("passing", "message"), [(True, repr(b"i")), (False, "too many files open: raise its limit (ulimit -n)")]
)
def test_faults_of_the_system_that_pass_are_waited_for_and_others_named(tmp_path, passing, message):
    context = multiprocessing.get_context("fork")
    reading, writing = context.Pipe(duplex=False)
    process = context.Process(target=_without_files, args=(str(tmp_path), _Sender(writing), passing))
    process.start()
    assert message in reading.recv()
    process.join()


class _Sender:
    """A pipe as the queue that these functions fill: a queue's thread would need a file of its own."""

    def __init__(self, pipe) -> None:
        self.put = pipe.send
