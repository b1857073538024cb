"""Every error a user can cause or meet; the command line prints these as one line,
and anything else as a bug."""

import reprlib
from typing import NoReturn


def first_line(error: BaseException) -> str:
    """What a foreign exception says first; its kind if it says nothing."""
    said = str(error).strip()
    return said.splitlines()[0] if said else type(error).__name__


def refuse_argument(name: str, value: object, wanted: str) -> NoReturn:
    """Raise the `ArgumentError` for a value of the wrong type; `wanted` says what to give."""
    raise ArgumentError(f"{name}={reprlib.repr(value)} is of the type {type(value).__name__}: give {wanted}")


class DbtrainError(Exception):
    """Base of all expected errors: the message says what, the offending value and how to fix it."""

    exit_code = 1


class ConfigError(DbtrainError):
    """The configuration is wrong: an unknown key, a value out of its range,
    two settings that exclude each other."""

    exit_code = 2


class ArgumentError(ConfigError, TypeError):
    """A function of the Python interface was given a value of another type than its argument takes."""


class DataError(DbtrainError):
    """Data is missing, corrupt, or does not fit the model (a label out of range, another image size)."""


class ShardError(DbtrainError):
    """A shard, commit or manifest is missing, damaged, or belongs to another run, block or codebook."""


class FencedError(DbtrainError):
    """This attempt no longer owns its block: a newer attempt has started, so nothing may be committed."""


class NonFiniteLossError(DbtrainError):
    """The loss became NaN or infinite; the block keeps its last good checkpoint."""


class PlacementError(DbtrainError):
    """No cluster answers, no node of it can hold a block, or a GPU was demanded where there is none."""


class HostDiedError(DbtrainError):
    """A process of the cluster that held an object is dead; what was asked of it is not answered."""


class VersionError(DbtrainError):
    """Machines of one run have different versions of what decides the numbers, or lack a package."""


class PreflightError(DbtrainError):
    """The machine or the cluster would not carry a run; the table above says what and how to fix it."""


class RunLockedError(DbtrainError):
    """Another coordinator works on the same run directory."""


class IncompleteRunError(DbtrainError):
    """Some blocks did not finish; the same command continues only those."""


class WorkerError(DbtrainError):
    """A worker reported an error that another attempt cannot fix."""


class FirstWorkerError(DbtrainError):
    """The first worker of a block failed where the others depend on it; it alone says why."""
