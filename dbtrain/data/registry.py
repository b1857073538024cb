"""Data sets by the name of their source."""

from collections.abc import Callable, Mapping
from typing import Any

from dbtrain.data.images import digits, fashion_mnist, hugging_face, idx_folder
from dbtrain.data.splits import DataSet

SOURCES: Mapping[str, Callable[..., DataSet]] = {
    "digits": digits,
    "fashion_mnist": fashion_mnist,
    "idx": idx_folder,
    "hf": hugging_face,
}


def load(source: str, arguments: Mapping[str, Any]) -> DataSet:
    """Load a data set with the arguments of its section of the configuration.

    Raises:
        DataError: it is missing, damaged or does not hold what it should.
    """
    return SOURCES[source](**arguments)
