"""Data sets by the name of their source."""

from collections.abc import Callable, Mapping
from typing import Any

from dbtrain.data.encoded import encoded
from dbtrain.data.images import digits, fashion_mnist, idx_folder
from dbtrain.data.latents import latents
from dbtrain.data.pictures import hugging_face, images
from dbtrain.data.splits import DataSet
from dbtrain.data.text import gcide, hugging_face_text, json_lines, python_topics, text_files

SOURCES: Mapping[str, Callable[..., DataSet]] = {
    "digits": digits,
    "fashion_mnist": fashion_mnist,
    "idx": idx_folder,
    "images": images,
    "hf": hugging_face,
    "text": text_files,
    "jsonl": json_lines,
    "gcide": gcide,
    "python_topics": python_topics,
    "hf_text": hugging_face_text,
    "latents": latents,
    "encoded": encoded,
}

READS_TENSORS = frozenset({"latents", "encoded"})
"""Sources that take ``read``, a reader of tensor files, because this room knows no storage."""

MAPS_TENSORS = frozenset({"encoded"})
"""Those of them whose files are mapped into memory and not read as a whole."""


def load(source: str, arguments: Mapping[str, Any]) -> DataSet:
    """Load a data set with the arguments of its section of the configuration.

    Raises:
        DataError: it is missing, damaged or does not hold what it should.
    """
    return SOURCES[source](**arguments)
