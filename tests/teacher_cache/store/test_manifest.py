"""A manifest is what was written, or it is refused with a reason."""

import dataclasses
import json

import pytest

from teacher_cache.errors import CacheError
from teacher_cache.store.manifest import MANIFEST, check_same_content, digest, read_manifest, write_manifest
from teacher_cache.store.storage import Storage
from tests.fixtures.store import SHAPE, signals, synthetic_cache, synthetic_manifest


def _manifest(**fields):
    return synthetic_manifest(11, signals(**fields), 4, {}, SHAPE)


def test_a_manifest_survives_its_file(tmp_path):
    storage = Storage(tmp_path)
    write_manifest(storage, _manifest())
    assert read_manifest(storage) == _manifest()


def test_no_cache_says_how_to_make_one(tmp_path):
    with pytest.raises(
        CacheError, match=r"no teacher cache here \(manifest\.json is missing\)\. Make one first: teacher"
    ):
        read_manifest(Storage(tmp_path / "nowhere"))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"format_version": 1}', "\x00\x01"])
def test_something_else_is_not_a_manifest(tmp_path, text):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(CacheError, match=r"manifest\.json: .*not a manifest.*restore it from a copy"):
        read_manifest(Storage(tmp_path))


def test_another_format_version_is_refused(tmp_path):
    storage = Storage(tmp_path)
    write_manifest(storage, dataclasses.replace(_manifest(), format_version=7))
    with pytest.raises(CacheError, match=r"cache format 7, this package reads format 2\. Build the cache again"):
        read_manifest(storage)


def test_a_changed_byte_is_found(tmp_path):
    storage = Storage(tmp_path)
    write_manifest(storage, _manifest())
    whole = (tmp_path / MANIFEST).read_bytes()
    for place in range(0, len(whole), 3):
        (tmp_path / MANIFEST).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(CacheError):
            read_manifest(storage)


def test_a_hand_made_digest_does_not_help_a_changed_fingerprint(tmp_path):
    storage = Storage(tmp_path)
    write_manifest(storage, _manifest())
    plain = json.loads((tmp_path / MANIFEST).read_bytes())
    plain["signals"]["top_k"] = 9
    plain.pop("digest")
    text = json.dumps(plain | {"digest": digest(plain)}, sort_keys=True, indent=1) + "\n"
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(CacheError, match="fingerprint does not belong to its content"):
        read_manifest(storage)


def test_settings_that_differ_are_named_with_both_values():
    check_same_content(_manifest(), _manifest(), "here")
    with pytest.raises(
        CacheError, match=r"here: begun with other settings.*signals\.top_k: 8 in the cache, 9 now\. Set"
    ):
        check_same_content(_manifest(), _manifest(top_k=9), "here")
    with pytest.raises(CacheError, match=r"signals\.codec: 'int8' in the cache, 'int4' now.*\(and 1 more\)"):
        check_same_content(_manifest(), _manifest(codec="int4", top_k=9, pca=4, sampled=3), "here")


def test_what_does_not_change_the_content_does_not_change_the_fingerprint(tmp_path):
    one = _manifest()
    other = dataclasses.replace(one, complete=True, created_at="now", made_with={"x": "y"}, counts={"rows": 3})
    assert one.fingerprint == other.fingerprint
    assert one.fingerprint != _manifest(top_k=9).fingerprint
    made = synthetic_cache(tmp_path / "c")
    assert made.manifest.fingerprint == one.fingerprint
