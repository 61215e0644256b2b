"""A file holds the old or the new, and an error says what to do."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest

from ppl_vae.atomic import write_atomically


def test_replaces_removes_left_overs_and_respects_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "file"
    (tmp_path / ".file.0123abcd.tmp").touch()  # a killed write's
    (tmp_path / ".other.0123abcd.tmp").touch()  # perhaps of another process, at work
    write_atomically(path, b"old")
    mask = os.umask(0o027)
    try:
        write_atomically(path, b"new")
    finally:
        os.umask(mask)
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o640
    assert {entry.name for entry in tmp_path.iterdir()} == {"file", ".other.0123abcd.tmp"}


@pytest.mark.parametrize("function", ["builtins.open", "os.fsync", "os.replace"])
@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.ENOSPC, "free some space, then try again; `ppl-vae fit --resume`"),
        (errno.EDQUOT, "free some space"),
        (errno.EFBIG, "free some space"),
        (errno.EACCES, "Permission denied.*put that right"),
        (None, None),  # Ctrl-C
    ],
)
def test_an_error_keeps_the_old_and_its_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, code: int | None, advice: str
) -> None:
    error = KeyboardInterrupt() if code is None else OSError(code, os.strerror(code))

    def refuse(*args: object) -> None:
        raise error

    path = tmp_path / "file"
    path.write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(function, refuse)
        with pytest.raises(type(error)) as caught:
            write_atomically(path, b"new")
    if isinstance(caught.value, OSError):
        assert re.search(f"could not write 3 bytes .*{advice}", str(caught.value))
        assert (caught.value.errno, caught.value.filename) == (code, str(path))
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"old"
