"""Which noise processes there are. To add one, write a class that is a `NoiseKind`, and one row here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dbtrain.method.lookup import look_up, resolve

if TYPE_CHECKING:  # the configuration reads this table, and imports no torch before it needs a row
    from dbtrain.method.interface import NoiseKind

NOISE_PROCESSES: dict[str, Any] = {
    "gaussian": "dbtrain.method.gaussian:GaussianNoise",
    "flow": "dbtrain.method.flow:FlowNoise",
    "masking": "dbtrain.method.masking:MaskingNoise",
}
"""Noise processes by name: the class, or ``package.module:Class``, which is imported when it is asked for.

A program of your own may add a row, but only its own process sees it: rows do not travel to Ray's workers,
which import the package anew. What `dbtrain train` trains needs its class and its row in the package.
"""


def noise_process(name: str) -> NoiseKind:
    """The class of a noise process.

    Raises:
        ConfigError: there is none of that name.
    """
    kind: NoiseKind = look_up(NOISE_PROCESSES, "noise.process", name)
    return kind


def others_settings(name: str) -> list[tuple[str, str]]:
    """(process, key) of the section `noise` for each key that only another process than this one reads."""
    kinds: dict[str, NoiseKind] = {other: resolve(row) for other, row in NOISE_PROCESSES.items() if other != name}
    return [(other, key) for other, kind in kinds.items() for key in kind.own_settings]


def policies() -> tuple[str, ...]:
    """Values of `noise.ranges` that any process knows."""
    kinds: list[NoiseKind] = [resolve(row) for row in NOISE_PROCESSES.values()]
    return tuple(dict.fromkeys(policy for kind in kinds for policy in kind.policies))
