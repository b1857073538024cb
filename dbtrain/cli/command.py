"""What all commands share: the application, their arguments, and how errors reach the user."""

import contextlib
import errno
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from dbtrain.errors import ConfigError, DbtrainError, first_line
from dbtrain.telemetry.layout import say

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train a deep residual network as isolated blocks (DiffusionBlocks), merge them, and evaluate the whole.",
)


ConfigFile = Annotated[Path, typer.Argument(help="YAML file, or the name of a shipped one: see dbtrain configs.")]


Overrides = Annotated[list[str] | None, typer.Argument(help="Dotted overrides, such as model.depth=12 blocks=3.")]


Address = Annotated[
    str | None,
    typer.Option(help="Ray cluster: auto, host:port or ray://host:port; by default one on this machine alone."),
]


Verbose = Annotated[bool, typer.Option("--verbose", help="Also print every time-out that is in force.")]


BlockNumbers = Annotated[str | None, typer.Option("--blocks", help="Numbers of blocks, with commas, such as 0,2.")]


RunDirectory = Annotated[str, typer.Argument(help="Directory or URL of a run (out/name).")]


Now = Annotated[
    bool,
    typer.Option("--now", help="By the newest commits of a run that trains or is not done; it is left as it is."),
]


UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
"""No fault of the program's: the disk is full or read-only."""


OUT_OF_MEMORY = (
    "the memory ran out ({}): ask for less at once, as by evaluation.batch_size, evaluation.samples, --count or "
    "the section model; evaluation.resident=one keeps one block of a merged model in memory"
)


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does: what it holds, such as a run's lock, is given back."""


def hear_sigterm() -> None:
    """Raise :class:`Terminated` when SIGTERM comes; `train` answers it itself while blocks train."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise Terminated

    signal.signal(signal.SIGTERM, end)


def numbers(text: str) -> list[int]:
    """Whole numbers with commas.

    Raises:
        ConfigError: the text is something else.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{text!r} is no list of whole numbers with commas, such as 1,2,3") from None


def reported(command: Callable[..., None]) -> Callable[..., None]:
    """A user's mistake ends in one line and a non-zero code; a bug shows its traceback."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            with _telling_imports():
                command(*args, **kwargs)
            sys.stdout.flush()  # a full disk that it is sent to is told here, not when Python ends
        except DbtrainError as error:
            say(Console(stderr=True), f"error: {error}", "red")
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt as stop:
            say(Console(stderr=True), "stopped: what is committed stays, and the same command goes on from there")
            number = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
            raise typer.Exit(128 + number) from None
        except (typer.Exit, BrokenPipeError):  # a reader that has seen enough, such as head, is no bug: click ends it
            raise
        except OSError as error:
            if error.errno not in UNWRITABLE:
                _tell_bug()
            where = error.filename or "what this command prints to"
            told = f"error: {where} cannot be written ({error.strerror}): free space, or write to another place"
            Console(stderr=True).print(told, style="red", highlight=False, markup=False, soft_wrap=True)
            _drop_output()
            raise typer.Exit(1) from None
        except Exception as error:
            if not _memory_ran_out(error):
                _tell_bug()
            say(Console(stderr=True), f"error: {OUT_OF_MEMORY.format(first_line(error))}", "red")
            raise typer.Exit(1) from None

    return wrapped


def _memory_ran_out(error: Exception) -> bool:
    """Whether an exception says that there is not so much memory, of a GPU or of the machine."""
    # PyTorch raises a plain RuntimeError for a CPU, and is not imported here
    said = any(words in str(error) for words in ("can't allocate memory", "Storage size calculation overflowed"))
    return said or type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError)


@contextlib.contextmanager
def _telling_imports() -> Iterator[None]:
    """Show on the error output which code of the user's is imported, before it is."""
    log, handler = logging.getLogger("dbtrain.models.import_path"), logging.StreamHandler()
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


def _drop_output() -> None:
    """Let go of output that cannot be written: Python would try again at its end, and exit with code 120."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _tell_bug() -> NoReturn:
    traceback.print_exc()
    frame = _frame_of_own_class()
    if frame:
        print(f"this arose in your own {frame.filename}, line {frame.lineno} (model.arch)", file=sys.stderr)
        raise typer.Exit(1) from None
    print("this is a bug in dbtrain; please report it with the lines above", file=sys.stderr)
    raise typer.Exit(70) from None


def _frame_of_own_class() -> traceback.FrameSummary | None:
    """The last frame of the present error that lies in a file with an architecture of the user's."""
    interface = sys.modules.get("dbtrain.method.interface")  # not imported here: what failed may be the import
    kinds = interface.BlockModel.__subclasses__() if interface else []
    modules = [sys.modules.get(kind.__module__) for kind in kinds if not kind.__module__.startswith("dbtrain.")]
    files = {getattr(module, "__file__", None) for module in modules}
    own = [frame for frame in traceback.extract_tb(sys.exc_info()[2]) if frame.filename in files]
    return own[-1] if own else None
