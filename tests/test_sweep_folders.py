"""A cell's folder as bytes: it arrives whole, and nothing in it gets outside of it."""

from __future__ import annotations

import contextlib
import io
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mobilekit.errors import BadInputError
from mobilekit.pipeline import _sweep_folders


def archive(*members: tuple[str, bytes | None, bytes]) -> bytes:
    """A tar file of names, contents (None: a folder, or a link to `..`) and types."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content, kind in members:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, len(content or b""), ".."
            tar.addfile(info, io.BytesIO(content or b""))
    return stream.getvalue()


def test_a_folder_travels_whole(tmp_path: Path) -> None:
    for name in ("a.txt", "models/net.mlpackage/Data/b.bin", ".mobilekit"):
        (tmp_path / "from" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "from" / name).write_bytes(os.urandom(2000))
    (tmp_path / "from" / "models" / "empty").mkdir()
    (tmp_path / "from" / "link").symlink_to(tmp_path)
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "old.txt").write_text("gone")
    _sweep_folders.from_bytes(_sweep_folders.as_bytes(tmp_path / "from"), tmp_path / "to")

    def content(folder: Path) -> dict[str, bytes | None]:
        found = [path for path in folder.rglob("*") if not path.is_symlink()]
        return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in found}

    assert content(tmp_path / "to") == content(tmp_path / "from")


HOSTILE = {
    "up": ("../x", b"x", tarfile.REGTYPE),
    "up within": ("a/../../x", b"x", tarfile.REGTYPE),
    "absolute": ("/tmp/mobilekit-hostile", b"x", tarfile.REGTYPE),  # noqa: S108
    "of Windows": ("..\\x", b"x", tarfile.REGTYPE),
    "drive": ("c:x", b"x", tarfile.REGTYPE),
    "itself": (".", b"x", tarfile.REGTYPE),
    "link": ("x", None, tarfile.SYMTYPE),
    "hard link": ("x", None, tarfile.LNKTYPE),
    "device": ("x", None, tarfile.CHRTYPE),
    "pipe": ("x", None, tarfile.FIFOTYPE),
    "long": ("x" * 300, b"x", tarfile.REGTYPE),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_nothing_leaves_the_folder(case: str, tmp_path: Path) -> None:
    folder = tmp_path / "cells" / "cell"
    folder.mkdir(parents=True)
    (folder / "kept").write_text("kept")
    with pytest.raises(BadInputError):
        _sweep_folders.from_bytes(archive(("good", b"y", tarfile.REGTYPE), HOSTILE[case]), folder)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "cells",
        "cells/cell",
        "cells/cell/kept",
    ]


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    inside = archive(("a", b"x", tarfile.REGTYPE), ("a/b", b"x", tarfile.REGTYPE))
    for content in (b"", b"no archive" * 100, inside, archive(("a", b"x" * 5000, tarfile.REGTYPE))[:2000]):
        with pytest.raises(BadInputError):
            _sweep_folders.from_bytes(content, tmp_path / "cell")
        assert list(tmp_path.iterdir()) == []


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["..", ".", "", "a", "b", "a\\b", "c:"]), min_size=1, max_size=5).map("/".join))
def test_no_name_leads_out(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "room" / "cell"
    folder.parent.mkdir(exist_ok=True)
    with contextlib.suppress(BadInputError):
        _sweep_folders.from_bytes(archive((name, b"x", tarfile.REGTYPE)), folder)
    assert {path.name for path in tmp_path.iterdir()} == {"room"}
    assert {path.name for path in folder.parent.iterdir()} <= {"cell"}
