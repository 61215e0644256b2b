"""Files that are replaced whole or not at all, whatever kills the process or fills the disk."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from pathlib import Path

_DISK_FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` so that ``path`` holds, at any moment and after any kill, the old or the new.

    Also removes what earlier writes of this file left behind when they were killed.

    Raises:
        OSError: it cannot be written; ``path`` is then as it was (or new, if only the last step
            failed, which makes the rename outlast a power cut).
    """
    for left_over in path.parent.glob(f".{path.name}.*.tmp"):
        left_over.unlink(missing_ok=True)
    # Not `tempfile`: its files are readable by their owner alone, and stay so after the rename.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        advice = "free some space" if error.errno in _DISK_FULL else "put that right"
        # With an errno, OSError picks its own subclass (PermissionError, …) and shows the file.
        raise OSError(
            error.errno,
            f"could not write {len(data)} bytes ({error.strerror}); what was saved before is "
            f"intact: {advice}, then try again; `ppl-vae fit --resume` goes on with a run",
            str(path),
        ) from error
    finally:
        with contextlib.suppress(OSError):  # it is gone if all went well
            temporary.unlink()


def _sync_folder(folder: Path) -> None:
    """Bring a rename, which lives in the folder, to the disk: a power cut may undo it otherwise."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems
            raise
    finally:
        os.close(descriptor)
