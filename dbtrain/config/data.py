"""Section `data`: one class a source."""

import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from dbtrain.config.section import Count, Positive, Section, Share


class DigitsConfig(Section):
    """Scikit-learn's digits; needs nothing but the package."""

    source: Literal["digits"] = "digits"
    validation: Share = 0.1


class FashionMnistConfig(Section):
    """Fashion-MNIST from a folder of IDX files, Debian's package, or the hub, in this order."""

    source: Literal["fashion_mnist"] = "fashion_mnist"
    path: str | None = None
    validation: Share = 0.1


class IdxConfig(Section):
    """A folder with the four IDX files of MNIST."""

    source: Literal["idx"] = "idx"
    path: str
    classes: Count | None = None
    """Number of classes; by default one more than the greatest label of the training file."""
    validation: Share = 0.1


def _both_sides(size: object) -> object:
    return (size, size) if isinstance(size, int) else size


class PicturesSection(Section):
    """What every source of labelled pictures takes; what is not set is taken from the data,
    which then must agree."""

    path: str
    image: str = "image"
    """Column of the pictures, in a table."""
    label: str = "label"
    """Column of their classes, in a table: whole numbers or names."""
    size: Annotated[tuple[Count, Count], BeforeValidator(_both_sides)] | None = None
    """Height and width to which pictures are brought, or one number for both:
    `data.size=[37,53]`, `data.size=64`."""
    resize: Literal["crop", "pad", "squash"] | None = None
    """How they are brought there: `crop` (the default) keeps the middle,
    `pad` adds bars, `squash` distorts."""
    channels: Literal[1, 3] | None = None
    """1 makes all pictures grey, 3 makes them RGB."""
    background: Literal["black", "white"] | None = None
    """What lies below transparent pixels, and the colour of bars (by default black)."""
    classes: Count | None = None
    """How many there must be; other data is refused."""
    validation: Share = 0.1
    """Share of the training pictures that is split off where the data has no such split."""
    test: Share = 0.1
    """The same for the test split."""
    test_split: str | None = None
    """Name of the split to test on, if not `test`."""
    cache: str | None = None
    """Folder of the decoded pictures; by default that of the user's cache."""

    @model_validator(mode="after")
    def _resize_has_a_size(self) -> "PicturesSection":
        if self.resize and self.size is None:
            raise ValueError(f"data.resize={self.resize} needs a size to resize to: set data.size")
        return self


class ImagesConfig(PicturesSection):
    """Pictures with classes: a folder of class folders,
    with or without splits, or one or more Parquet files."""

    source: Literal["images"] = "images"


class HuggingFaceConfig(PicturesSection):
    """A data set of pictures on the hub, or a local path that `datasets` reads."""

    added_later: ClassVar[tuple[str, ...]] = (
        "size",
        "resize",
        "channels",
        "background",
        "test",
        "test_split",
    )
    """Keys whose default does not count as a difference from a run that was started before there were any."""

    source: Literal["hf"] = "hf"


class TextSection(Section):
    """What every source of text takes; three contiguous parts of it are the splits."""

    tokenizer: str = "letters"
    """`letters` (27), `bytes` (256), or the path of a Hugging Face tokenizer."""
    length: Count = 256
    """Tokens of a sample."""
    validation: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    test: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    cache: str | None = None
    """Folder of the packed tokens; by default that of the user's cache."""


class TextConfig(TextSection):
    """Text files in UTF-8: one, or all .txt and .txt.gz files of a folder; hidden ones are left out."""

    source: Literal["text"] = "text"
    path: str


class JsonLinesConfig(TextSection):
    """JSON Lines, an object with a text on each line: one file,
    or all .jsonl, .ndjson and .gz of them of a folder."""

    source: Literal["jsonl"] = "jsonl"
    path: str
    column: str = "text"
    """Key of the text in each object."""


class GcideConfig(TextSection):
    """The dictionary of Debian's package dict-gcide."""

    source: Literal["gcide"] = "gcide"
    path: str | None = None


class PythonTopicsConfig(TextSection):
    """The language reference that comes with Python; needs nothing but Python."""

    source: Literal["python_topics"] = "python_topics"


class HuggingFaceTextConfig(TextSection):
    """A text column of a data set of the hub, or of a local folder or file that `datasets` reads."""

    source: Literal["hf_text"] = "hf_text"
    path: str
    name: str | None = None
    split: str = "train"
    column: str = "text"


class LatentsConfig(Section):
    """Latents with classes, from tensor files that some encoder wrote; never a pickle."""

    source: Literal["latents"] = "latents"
    path: str
    """A safetensors file with `latent` (n, C, H, W) and `label` (n,), or a .npy file of the latents."""
    labels: str | None = None
    """A .npy file of the labels, for latents in a .npy file."""
    classes: Count
    scale: Positive | None = None
    """Factor on every latent; by default such that their standard deviation is 0.5."""
    validation: Share = 0.1
    test: Share = 0.1


def _by_channel(value: object) -> object:
    if value is None or value == "measured":
        return value
    numbers = isinstance(value, (list, tuple)) and all(type(n) in (int, float) and math.isfinite(n) for n in value)
    if not numbers or not value:
        # not a ValueError, which of a mapping would be one of a whole section
        raise PydanticCustomError("by_channel", "must be numbers by channel, as in [0.1,0.2], or measured, or null")
    return value


PerChannel = Annotated[tuple[float, ...] | Literal["measured"] | None, BeforeValidator(_by_channel)]


class EncodedConfig(Section):
    """Latents with classes, or with text embeddings and masks, from safetensors files that are mapped into
    memory; `dbtrain encode` writes them."""

    source: Literal["encoded"] = "encoded"
    path: str
    """A folder of safetensors files, or one: `latent` (n, C, H, W) or (n, C, T, H, W), and `label` (n,), or
    `text` (n, L, D) and `mask` (n, L)."""
    classes: Count | None = None
    """Number of classes of files with labels; without it they must have text."""
    mean: PerChannel = "measured"
    """Mean of the latents by channel, which is subtracted: numbers, `measured`, or null for none."""
    std: PerChannel = "measured"
    """Deviation of the latents by channel, by which they are divided."""
    scale: Positive = 1.0
    """Factor after that: 0.5 where `noise.sigma_data` is as by default."""
    validation: Share = 0.1
    test: Share = 0.1
    cache: str | None = None
    """Folder of what was measured of the files; by default that of the user's cache."""

    @field_validator("std")
    @classmethod
    def _deviations_are_positive(cls, value: PerChannel) -> PerChannel:
        if isinstance(value, tuple) and not all(number > 0 for number in value):
            raise ValueError("must be above 0 in every channel")
        return value


DataConfig = Annotated[
    DigitsConfig
    | FashionMnistConfig
    | IdxConfig
    | ImagesConfig
    | HuggingFaceConfig
    | TextConfig
    | JsonLinesConfig
    | GcideConfig
    | PythonTopicsConfig
    | HuggingFaceTextConfig
    | LatentsConfig
    | EncodedConfig,
    Field(discriminator="source"),
]

PATHS = ("path", "labels", "tokenizer", "cache")
"""Keys whose value is a path, or may be one."""
PLACES = tuple(f"data.{key}=" for key in PATHS)
"""How overrides begin that say where data lies, not what it is."""
BUILT_IN_TOKENIZERS = ("letters", "bytes")


def absolute_paths(data: DataConfig, before: Mapping[str, str] = MappingProxyType({})) -> DataConfig:
    """The section for a process with another working directory than this one.

    Names of the hub and of tokenizers stay, and so does what is not here: the process may say more of it.

    Args:
        data: as the user gave it.
        before: :func:`resolved_paths` of when the run was started. They go first while they are there:
            a run keeps to its data, wherever it is continued or evaluated from.
    """
    # the folder of the packed tokens is made where it is missing
    here = {k: str(Path(v).absolute()) for k, v in given_paths(data).items() if k == "cache" or Path(v).exists()}
    kept = {key: before[key] for key in _relative(data) if key in before and Path(before[key]).exists()}
    return data.model_copy(update=here | kept)


def resolved_paths(data: DataConfig) -> dict[str, str]:
    """What the relative paths of the section are in this working directory,
    by key; without what is not here."""
    found = absolute_paths(data)
    return {key: path for key in _relative(data) if (path := getattr(found, key)) != getattr(data, key)}


def whereabouts(data: DataConfig, before: Mapping[str, str]) -> str:
    """Where relative paths that lead nowhere were looked for,
    as the end of a message; empty if there are none."""
    lost = [key for key in _relative(absolute_paths(data, before)) if key in before or not data.source.startswith("hf")]
    places = [
        f"data.{key}={getattr(data, key)} was looked for "
        + (f"at {before[key]}, where the run found it when it was started, and " if key in before else "")
        + f"below {Path.cwd()}"
        for key in lost
    ]
    return f"; {'; '.join(places)}: put it there, or run this command where it lies" if places else ""


def named_places(data: DataConfig) -> str:
    """Where the section says that its data lies, for a message; the source's name if that is all."""
    places = [f"data.{key}={value}" for key, value in given_paths(data).items() if key != "cache"]
    return ", ".join(places) or f"data.source={data.source}"


def given_paths(data: DataConfig) -> dict[str, str]:
    """The paths that the section names, by key."""
    return {key: value for key in PATHS if (value := getattr(data, key, None)) and value not in BUILT_IN_TOKENIZERS}


def _relative(data: DataConfig) -> list[str]:
    return [key for key, value in given_paths(data).items() if not Path(value).is_absolute()]
