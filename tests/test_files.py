"""Files are there whole or not at all; what cannot be written is found out before the work; addresses and names."""

import os
import stat
import threading

import numpy as np
import pytest

from stepcache.files import check_writable, parse_document, read_text, replacing, write_atomically
from stepcache.fleet import places
from stepcache.measure.video import open_clip, write_clip


def test_text_and_bytes_are_written_with_the_permissions_of_a_new_file(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "deep" / "er" / "a.txt", "grün\n")
        write_atomically(tmp_path / "b.bin", b"\0\1")
    finally:
        os.umask(before)
    assert read_text(tmp_path / "deep" / "er" / "a.txt", "test") == "grün\n"
    assert (tmp_path / "b.bin").read_bytes() == b"\0\1"
    assert stat.S_IMODE((tmp_path / "b.bin").stat().st_mode) == 0o640


def test_what_was_there_stays_when_writing_fails(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("precious")

    def interrupted():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "precious"
    assert os.listdir(tmp_path) == ["a.json"]


def test_many_writers_of_one_file_leave_one_whole_file(tmp_path):
    path = tmp_path / "a.txt"
    texts = [str(n) * 10_000 for n in range(8)]
    threads = [threading.Thread(target=write_atomically, args=(path, text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in texts
    assert os.listdir(tmp_path) == ["a.txt"]


def test_the_longest_name_can_be_written(tmp_path):
    write_atomically(tmp_path / ("x" * 255), "text")
    assert (tmp_path / ("x" * 255)).read_text() == "text"


def test_what_can_be_written_leaves_nothing_behind(tmp_path):
    check_writable(tmp_path / "new" / "folder" / "a.txt")
    check_writable(tmp_path / "new" / "folder", folder=True)
    check_writable(tmp_path, folder=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "folder", "message"),
    [
        ("file/a.txt", False, "is a file, not a folder"),
        ("file/deep/a.txt", False, "is a file, not a folder"),
        ("file", True, "is a file, not a folder"),
        (".", False, "is a folder; give the name of a file"),
        ("x" * 300, False, "cannot be written: File name too long"),
    ],
)
def test_what_cannot_be_written(tmp_path, monkeypatch, name, folder, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=message):
        check_writable(name, folder)


def test_documents_name_schema_and_version():
    assert parse_document('{"schema": "a", "version": 2, "x": 1}', "a", 2) == {"x": 1}
    for text, message in (
        ("{", "not JSON"),
        ('{"schema": "b"}', "not a a file"),
        ('{"schema": "a", "version": 1}', "version 1 is unknown; this program reads version 2: make the file anew"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_document(text, "a", 2)


def test_names_with_a_colon_are_files(tmp_path, monkeypatch):
    """Neither fsspec nor FFmpeg takes 10:53.mp4 for a protocol."""
    monkeypatch.chdir(tmp_path)
    for name in ("10:53", "data:x", "a b://c"):
        assert not places.is_remote(places.place(name))
    frames = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    for name in ("10:53.mkv", "data:x.mkv"):
        write_clip(name, frames)
        assert np.array_equal(open_clip(name).read(), frames)
    assert sorted(os.listdir(tmp_path)) == ["10:53.mkv", "data:x.mkv"]


def test_addresses(tmp_path):
    pytest.importorskip("upath", reason="universal_pathlib is not installed (pip install 'stepcache[cluster]')")
    assert places.place(f"file://{tmp_path}") == tmp_path
    assert places.is_remote(places.place("memory://a/b"))
    places.check_writable(places.place("memory://a/b"))
    with pytest.raises(ValueError, match="gopher"):
        places.place("gopher://hole/x")
