"""Finding pictures: suffixes, links, loops, pipes, and what is passed over."""

import errno
import os
import threading

import pytest
from PIL import Image

from utils.pictures import ImageError, find_images, read_pixels


def test_search_is_sorted_and_ignores_case(tmp_path):
    for name in ("b.PNG", "A.jpg", "c.JpEg", "notes.txt", "sub/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [p.name for p in find_images([tmp_path])] == ["A.jpg", "b.PNG", "c.JpEg", "d.png"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageError, match="empty: no pictures"):
        find_images([tmp_path / "empty"])
    with pytest.raises(ImageError, match="missing: no such"):
        find_images([tmp_path / "missing"])


def test_hidden_files_are_left_out_and_others_counted(tmp_path, capsys):
    for name in ("a.png", "._a.png", ".cache/b.png", "c.jfif", "notes.txt", "d.heic_", "e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.name for path in find_images([tmp_path])] == ["a.png", "c.jfif"]
    told = capsys.readouterr().err
    assert "3 files that are no pictures are passed over (2 .txt, 1 .heic_)" in told


def test_files_whose_kind_cannot_be_told_are_in_the_list(tmp_path, monkeypatch):
    """As in a folder that may be listed and not entered: they are reported where they are read."""
    (tmp_path / "a.png").touch()

    def refusing(ask):
        def asked(path, *more, **options):
            if str(path).endswith("a.png"):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return ask(path, *more, **options)

        return asked

    for name in ("stat", "lstat"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))
    assert find_images([tmp_path]) == [tmp_path / "a.png"]


def test_links_are_followed_once_and_broken_ones_are_errors(tmp_path, capsys):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.png").touch()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "loop").symlink_to(tmp_path / "photos")
    (tmp_path / "photos" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    found = find_images([tmp_path / "photos"])
    assert [path.name for path in found] == ["gone.png", "a.png"]
    assert "loop: a link to a folder that is searched already" in capsys.readouterr().err
    with pytest.raises(ImageError, match="gone.png: cannot be read as a picture .No such file"):
        read_pixels(found[0])
    with pytest.raises(ImageError, match="gone.png: a broken link"):
        find_images([tmp_path / "photos" / "gone.png"])


def test_pipes_are_read(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    Image.new("RGB", (5, 4), "red").save(tmp_path / "a.png")
    writer = threading.Thread(target=lambda: pipe.write_bytes((tmp_path / "a.png").read_bytes()))
    writer.start()
    assert find_images([pipe]) == [pipe]
    assert read_pixels(pipe).shape == (4, 5, 3)
    writer.join()
