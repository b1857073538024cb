"""Compiling in a worker: where compiled code is kept, and that the time for it is told and is no hang."""

import atexit
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

CACHE = "TORCHINDUCTOR_CACHE_DIR"
"""PyTorch's variable for the folder of compiled code; Triton's kernels and the compiled graphs lie below it.
A user who sets it keeps their own folder."""


def keep_compiled_code() -> None:
    """Let PyTorch keep compiled code in the user's own cache, for the next worker of this machine.

    Its default is a folder in /tmp whose name anybody can guess and make first, and what lies there is run:
    libraries are loaded from it, and pickles read. Call it before anything is compiled.
    """
    if CACHE not in os.environ:
        os.environ[CACHE] = str(private_folder() or _passing_folder())


def private_folder() -> Path | None:
    """``dbtrain/compiled`` in the user's cache, mode 700; None where there can be no such folder.

    A link there, or a folder that another user owns, is none.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dbtrain" / "compiled"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            return None
        folder.chmod(0o700)
        return folder if os.access(folder, os.W_OK) else None
    except (OSError, RuntimeError):  # a home that cannot be written, or none, as in a read-only container
        return None


def _passing_folder() -> Path:
    """A new folder, mode 700, that goes with this process: nothing is kept for the next one."""
    folder = tempfile.mkdtemp(prefix="dbtrain-compiled-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@contextmanager
def compilations(begin: Callable[[], None], end: Callable[[float], None]) -> Iterator[None]:
    """Call `begin` whenever PyTorch begins to compile, and `end` with the seconds that it took.

    The backward pass is compiled apart from the forward pass, and another shape anew: each is told.
    """
    from torch._dynamo.callback import callback_handler  # not above: it imports the compiler, 1.5 s

    started = 0.0

    def on_start(_: object) -> None:
        nonlocal started
        started = time.monotonic()
        begin()

    def on_end(_: object) -> None:
        end(time.monotonic() - started)

    callback_handler.register_start_callback(on_start)
    callback_handler.register_end_callback(on_end)
    try:
        yield
    finally:
        callback_handler.remove_start_callback(on_start)
        callback_handler.remove_end_callback(on_end)
