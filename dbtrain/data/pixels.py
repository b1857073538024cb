"""One picture, of any format that Pillow reads, as bytes of 1 or 3 channels;
what has no exact such form is refused.

Pillow is imported when it is needed: a node that trains on text may lack it.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from dbtrain.errors import DataError, first_line

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

EXACT = {"1": "L", "L": "L", "LA": "L", "P": "RGB", "PA": "RGB", "RGB": "RGB", "RGBA": "RGB", "RGBX": "RGB"}
"""Pillow's modes whose opaque pixels L or RGB hold without loss."""
CONVERTED = ("CMYK", "YCbCr", "HSV", "LAB")
"""Modes that Pillow turns into RGB by a formula, which only a user can want."""
CHANNELS = {1: "L", 3: "RGB"}
HEAD = 4096
"""Bytes of a file in which the formats with boxes say how many bits a channel has."""


@dataclass(frozen=True)
class Want:
    """How pictures are brought to one shape; what is None is taken from the pictures,
    which then must agree."""

    size: tuple[int, int] | None = None
    """(height, width)."""
    resize: Literal["crop", "pad", "squash"] | None = None
    """`crop` (also for None): scaled until both sides are covered, the middle is kept; `pad`:
    scaled until both sides fit, bars are added; `squash`: each side is scaled for itself."""
    channels: Literal[1, 3] | None = None
    background: Literal["black", "white"] | None = None
    """What lies below transparent pixels, and the colour of the bars (by default black)."""


def pixels(value: Any, name: str, want: Want) -> NDArray[np.uint8]:
    """Bytes (channels, height, width) of a picture.

    Args:
        value: a path, the bytes of a file, both as the datasets library stores them (``{"bytes": ..., "path":
            ...}``), a picture of Pillow, or rows of whole numbers from 0 to 255, (H, W), (H, W, 1) or (H, W,
            3).
        name: the file, row and column, for messages.
        want: the shape it is brought to.

    Raises:
        DataError: it is no picture, damaged, animated, of more than 8 bits a channel, transparent without
            `want.background`, or in colours that only `want.channels` may convert.
    """
    picture = _flat(_opened(value, name), name, want)
    if want.channels:
        picture = picture.convert(CHANNELS[want.channels])
    array = np.asarray(_resized(picture, want))
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


def _opened(value: Any, name: str) -> Picture:
    """The picture, decoded and turned as its EXIF data say."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if value is None:
        raise DataError(f"{name} holds no picture: fill it, or leave the row out")
    if not isinstance(value, (str, Path, bytes, Image.Image)):
        return _from_rows(value, name)
    try:
        content = Path(value).read_bytes() if isinstance(value, (str, Path)) else value
        picture = Image.open(BytesIO(content)) if isinstance(content, bytes) else content
        _check_format(picture, content[:HEAD] if isinstance(content, bytes) else b"", name)
        picture.load()
        return ImageOps.exif_transpose(picture)
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(
            f"{name} has no bytes, and there is no file {error.filename}: put it there, or store the pictures' bytes"
        ) from error
    except Exception as error:  # Pillow's plugins raise anything on damaged files
        unknown = isinstance(error, UnidentifiedImageError)
        why = "Pillow knows no such format" if unknown else first_line(error)
        raise DataError(
            f"{name} cannot be read as a picture ({why}): it is damaged, cut short or something else; fetch it again, "
            "or take it out"
        ) from error


def _from_rows(value: Any, name: str) -> Picture:
    """A picture from rows of whole numbers."""
    from PIL import Image

    try:
        array = np.asarray(value)
    except ValueError:
        raise DataError(f"{name} holds rows of unequal lengths, which are no picture: fix it") from None
    if array.dtype.kind not in "iu" or not array.size or array.min() < 0 or array.max() > 255:
        raise DataError(
            f"{name} has values of {array.dtype} ({type(value).__name__}): give the bytes of a picture's file, or rows "
            "of whole numbers from 0 to 255, since pictures are kept in 8 bits"
        )
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] == 3):
        raise DataError(f"{name} has the shape {array.shape}: pictures are (H, W), (H, W, 1) or (H, W, 3)")
    return Image.fromarray(array.astype(np.uint8))


def _check_format(picture: Picture, head: bytes, name: str) -> None:
    """Refuse what Pillow would cut down without a word: more frames than one, more bits than 8."""
    frames = getattr(picture, "n_frames", 1)
    if frames > 1 and picture.format != "MPO":  # a telephone's JPEG with a preview behind the picture
        raise DataError(f"{name} has {frames} frames: save the one you mean as a picture of its own")
    bits = _bits(picture, head)
    if bits > 8:
        raise DataError(
            f"{name} has {bits} bits a channel (Pillow's mode {picture.mode}), and pictures are kept in 8: convert it "
            "to 8 bits, scaled as you mean it"
        )


def _bits(picture: Picture, head: bytes) -> int:
    """Bits a channel in the file, whatever Pillow makes of them."""
    if picture.mode.startswith("I;16"):
        return 16
    if picture.mode in ("I", "F"):
        return 16 if _raw_modes(picture).find(";16") >= 0 else 32
    if ";16" in _raw_modes(picture):
        return 16
    for arguments in _decoders(picture) if picture.format == "PPM" else []:
        # Netpbm: the greatest value is part of the header
        if isinstance(arguments, tuple) and isinstance(arguments[-1], int):
            return max(8, arguments[-1].bit_length())
    start = head.find(b"\xff\x4f\xff\x51")  # JPEG 2000, ISO/IEC 15444-1, A.5.1: SOC, SIZ, and Ssiz behind 42 bytes
    if picture.format == "JPEG2000" and 0 <= start < len(head) - 42:
        return (head[start + 42] & 0x7F) + 1
    box = head.find(b"pixi")  # AVIF, ISO/IEC 23008-12, 6.5.6: version and flags, count of channels, bits of each
    if picture.format == "AVIF" and 0 <= box < len(head) - 9:
        return head[box + 9]
    return 8


def _raw_modes(picture: Picture) -> str:
    return " ".join(str(arguments) for arguments in _decoders(picture))


def _decoders(picture: Picture) -> list[Any]:
    """Arguments of Pillow's decoders of a file that is open and not yet decoded."""
    return [tile.args for tile in getattr(picture, "tile", [])]


def _flat(picture: Picture, name: str, want: Want) -> Picture:
    """The picture in mode L or RGB, without transparency."""
    mode = EXACT.get(picture.mode)
    if mode is None and picture.mode in CONVERTED and want.channels:
        return picture.convert("RGB")
    if mode is None:
        how = "set data.channels=3 to have it converted" if picture.mode in CONVERTED else "convert it to 8 bits"
        raise DataError(
            f"{name} is of Pillow's mode {picture.mode}, which neither grey nor RGB holds exactly: {how}, or save it "
            "as RGB yourself"
        )
    if picture.has_transparency_data:
        picture = _on_background(picture, name, want)
    return picture if picture.mode == mode else picture.convert(mode)


def _on_background(picture: Picture, name: str, want: Want) -> Picture:
    from PIL import Image

    colours = picture.convert("RGBA")
    if colours.getchannel("A").getextrema() == (255, 255):
        return colours
    if want.background is None:
        raise DataError(
            f"{name} is transparent in places (Pillow's mode {picture.mode}): set data.background=white or black "
            "(--background of dbtrain encode) to lay it on a colour, or take the transparency away"
        )
    return Image.alpha_composite(Image.new("RGBA", colours.size, want.background), colours)


def _resized(picture: Picture, want: Want) -> Picture:
    if want.size is None or picture.size == (want.size[1], want.size[0]):
        return picture
    from PIL import Image, ImageOps

    size, method = (want.size[1], want.size[0]), Image.Resampling.BICUBIC
    if want.resize == "squash":
        return picture.resize(size, method)
    if want.resize == "pad":
        return ImageOps.pad(picture, size, method, color=want.background or "black")
    return ImageOps.fit(picture, size, method)
