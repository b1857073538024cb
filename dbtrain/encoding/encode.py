"""The encode command: pictures, with classes or captions, into files that `data.source=encoded` reads.

A file is written when all its samples are encoded, and never again: the same command goes on after the last
one.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dbtrain.data.pixels import Want, pixels
from dbtrain.encoding.encoders import PictureEncoder, TextEncoder
from dbtrain.encoding.samples import Samples, with_captions, with_classes
from dbtrain.errors import ConfigError, DataError
from dbtrain.shards.safetensors_file import as_file
from dbtrain.shards.storage.store import Store
from dbtrain.telemetry.counting import Count, silent

RECORD = "encode.json"
"""File in the output folder that says what was encoded by what; another command does not continue it."""


@dataclass(frozen=True)
class Encoding:
    """How samples are encoded."""

    size: tuple[int, int]
    """(height, width) in pixels."""
    resize: Literal["crop", "pad", "squash"] = "crop"
    background: Literal["black", "white"] | None = None
    tokens: int = 77
    """Length of a caption in tokens; shorter ones are filled up, longer ones cut off."""
    batch: int = 16
    per_file: int = 1024
    """Samples of a file."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the encoders and of the embeddings that are kept."""


def encode(source: str, vae: str, text: str | None, to: str, how: Encoding, count: Count = silent) -> list[str]:
    """Encode all samples of a folder; returns what people should be told.

    Args:
        source: folder of pictures.
        vae: folder of an autoencoder of diffusers.
        text: folder of a text encoder of transformers, for captions; None for the classes of folders.
        to: folder of the files.
        how: they are encoded.
        count: is told how many pictures are done.

    Raises:
        ConfigError: the folder was begun by another command, or a package is missing.
        DataError: a picture, a caption or an encoder is missing or damaged.
        ShardError: the folder cannot be written.
    """
    samples = with_classes(source) if text is None else with_captions(source)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if how.precision == "bf16" else torch.float32
    pictures = PictureEncoder(vae, device, dtype)
    captions = None if text is None else TextEncoder(text, how.tokens, device, dtype)
    target = Store(to)
    _begin(target, _record(samples, pictures, captions, how))
    _write_files(target, samples, pictures, captions, how, count)
    return _told(samples, pictures, captions, to)


def _record(samples: Samples, pictures: PictureEncoder, captions: TextEncoder | None, how: Encoding) -> dict[str, Any]:
    encoders = {"vae": pictures.stamp, "text": captions and captions.stamp}
    content = {"samples": len(samples), "pictures": samples.stamp, "classes": list(samples.classes), **encoders}
    settings = {**asdict(how), "size": list(how.size)}
    if captions is None:
        settings.pop("tokens")
    return {**content, **settings}


def _begin(target: Store, record: Mapping[str, Any]) -> None:
    """Note what is encoded, or see that it is what the folder was begun with."""
    if target.list() in ([], [RECORD]):  # nothing is encoded yet: an attempt that failed before binds nobody
        target.makedirs()
        target.write_json(RECORD, record)
        return
    if not target.exists(RECORD):
        raise ConfigError(f"{target.url} is not empty and has no {RECORD}: give a folder of its own")
    before = target.read_json(RECORD)
    differing = [key for key, value in record.items() if not isinstance(before, dict) or before.get(key) != value]
    if differing:
        key = differing[0]
        raise ConfigError(
            f"{target.url} was begun with {key}={before.get(key) if isinstance(before, dict) else before}, and this "
            f"command has {key}={record[key]}: give it as before, or another folder"
        )


def _write_files(
    target: Store, samples: Samples, pictures: PictureEncoder, captions: TextEncoder | None, how: Encoding, count: Count
) -> None:
    want = Want(how.size, how.resize, 1 if pictures.channels == 1 else 3, how.background)
    values, total = samples.pictures(), len(samples)
    for number, start in enumerate(range(0, total, how.per_file)):
        stop = min(total, start + how.per_file)
        count("pictures encoded", start, total)
        name = f"part-{number:05d}.safetensors"
        if target.exists(name):
            next(islice(values, stop - start, stop - start), None)  # those are done
            continue
        batches = []
        for at in range(start, stop, how.batch):
            chunk = list(islice(values, min(how.batch, stop - at)))
            batches.append(_batch(samples, chunk, at, pictures, captions, want))
            count("pictures encoded", at + len(chunk), total)
        joined = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
        target.write(name, as_file(joined, {"kind": "encoded"}, target.where(name)))


def _batch(
    samples: Samples, values: list[Any], start: int, pictures: PictureEncoder, captions: TextEncoder | None, want: Want
) -> dict[str, Tensor]:
    """Latents, and labels or text and mask, of the pictures from number `start` on."""
    images = np.stack([pixels(value, samples.names(start + i), want) for i, value in enumerate(values)])
    latent = pictures(torch.from_numpy(images).float() * (2 / 255) - 1)
    _check_finite(latent, samples, start)
    told = samples.told[start : start + len(values)]
    if captions is None:
        return {"latent": latent, "label": torch.tensor(told, dtype=torch.int64)}
    text, mask = captions(told)
    return {"latent": latent, "text": text, "mask": mask}


def _check_finite(latent: Tensor, samples: Samples, start: int) -> None:
    wrong = (~latent.flatten(1).isfinite().all(dim=1)).nonzero()[:, 0].tolist()
    if wrong:
        raise DataError(
            f"the latents of {samples.names(start + wrong[0])} are not finite: encode with --precision fp32, or check "
            "the autoencoder's weights"
        )


def _told(samples: Samples, pictures: PictureEncoder, captions: TextEncoder | None, to: str) -> list[str]:
    lines = [f"{len(samples):,} samples in {to}"]
    classes = f" data.classes={len(samples.classes)}" if samples.classes else ""
    lines.append(f"train on them with data.source=encoded data.path={to}{classes}")
    own = pictures.normalisation()
    if own is not None:
        numbers = [",".join(f"{value:.6g}" for value in part) for part in own]
        lines.append(f"the autoencoder's own scale: data.mean=[{numbers[0]}] data.std=[{numbers[1]}]")
    if captions is not None and captions.cut:
        lines.append(f"warning: {captions.cut:,} captions have more than {captions.length} tokens and were cut off")
    return lines
