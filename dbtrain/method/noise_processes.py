"""Which noise processes there are. To add one, write a class that is a `NoiseKind`, and one row here."""

from typing import Any

from dbtrain.method.interface import NoiseKind
from dbtrain.method.lookup import look_up

NOISE_PROCESSES: dict[str, Any] = {
    "gaussian": "dbtrain.method.gaussian:GaussianNoise",
    "masking": "dbtrain.method.masking:MaskingNoise",
}
"""By name: the class, or ``package.module:Class``. A program of your own adds a row to this table before it calls."""


def noise_process(name: str) -> NoiseKind:
    """The class of a noise process.

    Raises:
        ConfigError: there is none of that name.
    """
    kind: NoiseKind = look_up(NOISE_PROCESSES, "noise.process", name)
    return kind
