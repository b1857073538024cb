"""One picture of every kind that people have: taken exactly, or refused by name."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from dbtrain.data.pixels import Want, pixels
from dbtrain.errors import DataError

WIDTH, HEIGHT = 37, 53
NOISE = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
ANY = Want()


def saved(picture, kind="PNG", **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def png(mode, channels, bits=16):
    """A PNG of more bits than Pillow writes, by its specification."""
    rows = np.random.default_rng(1).integers(0, 256, (HEIGHT, 1 + WIDTH * channels * bits // 8), dtype=np.uint8)
    rows[:, 0] = 0

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", WIDTH, HEIGHT, bits, mode, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows.tobytes())) + chunk(b"IEND", b"")


def refused(value, *words, want=ANY):
    with pytest.raises(DataError) as caught:
        pixels(value, "pets/cat/7.png", want)
    message = str(caught.value)
    assert message.startswith("pets/cat/7.png") and "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "PPM", "WEBP"])
def test_colours_are_kept_exactly(kind):
    content = saved(Image.fromarray(NOISE), kind, **({"lossless": True} if kind == "WEBP" else {}))
    assert np.array_equal(pixels(content, "a", ANY), NOISE.transpose(2, 0, 1))


def test_the_same_picture_comes_from_a_file_bytes_a_struct_an_object_and_rows(tmp_path):
    file, content = tmp_path / "a.png", saved(Image.fromarray(NOISE))
    file.write_bytes(content)
    forms = [str(file), file, content, {"bytes": content, "path": "x"}, {"bytes": None, "path": str(file)}]
    for value in (*forms, Image.fromarray(NOISE), NOISE.tolist()):
        assert np.array_equal(pixels(value, "a", ANY), NOISE.transpose(2, 0, 1))


def test_grey_and_one_bit_are_one_channel_and_a_palette_is_its_colours():
    grey = Image.fromarray(NOISE[..., 0])
    assert np.array_equal(pixels(saved(grey), "a", ANY), NOISE[None, ..., 0])
    bits = NOISE[..., 0] > 127
    assert np.array_equal(pixels(saved(Image.fromarray(bits)), "a", ANY)[0], np.where(bits, 255, 0))
    palette = Image.fromarray(NOISE).quantize(16)
    expected = np.asarray(palette.convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(pixels(saved(palette), "a", ANY), expected)
    assert np.array_equal(pixels(saved(palette, "GIF"), "a", ANY), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_stands_as_a_viewer_shows_it(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = pixels(saved(Image.fromarray(NOISE), "PNG", exif=exif), "a", ANY)
    straight = NOISE.transpose(2, 0, 1)
    expected = {  # TIFF 6.0, tag 274: where row 0 and column 0 are
        1: straight,
        2: straight[:, :, ::-1],
        3: straight[:, ::-1, ::-1],
        4: straight[:, ::-1],
        5: straight.transpose(0, 2, 1),
        6: straight.transpose(0, 2, 1)[:, :, ::-1],
        7: straight.transpose(0, 2, 1)[:, ::-1, ::-1],
        8: straight.transpose(0, 2, 1)[:, ::-1],
    }[orientation]
    assert np.array_equal(turned, expected)


@pytest.mark.parametrize(("mode", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)], ids=["grey", "RGB", "LA", "RGBA"])
@pytest.mark.parametrize("want", [ANY, Want(channels=3), Want(channels=1)], ids=["any", "3", "1"])
def test_a_png_of_16_bits_is_never_cut_down_to_8(mode, channels, want):
    refused(png(mode, channels), "16 bits a channel", "convert it", want=want)


def deep():
    rows = NOISE[..., 0].astype(np.uint16) << 8
    yield "tiff, 16 bits", saved(Image.fromarray(rows), "TIFF"), 16
    yield "tiff, 32 bits", saved(Image.fromarray(rows.astype(np.int32)), "TIFF"), 32
    yield "tiff, floats", saved(Image.fromarray(rows.astype(np.float32)), "TIFF"), 32
    yield "pgm", b"P5 37 53 65535\n" + rows.tobytes(), 16
    yield "ppm", b"P6 37 53 1023\n" + bytes(2 * NOISE.size), 10
    yield "jpeg 2000", saved(Image.fromarray(rows), "JPEG2000"), 16


@pytest.mark.parametrize(("content", "bits"), [row[1:] for row in deep()], ids=[row[0] for row in deep()])
def test_other_formats_of_more_than_8_bits_are_refused(content, bits):
    refused(content, f"{bits} bits a channel")


def test_a_colour_jpeg_2000_of_12_bits_is_refused():
    content = bytearray(saved(Image.fromarray(NOISE), "JPEG2000"))
    start = content.index(b"\xff\x4f\xff\x51")
    assert content[start + 42] == 7  # one less than the bits of the first channel
    content[start + 42] = 11
    refused(bytes(content), "12 bits a channel")


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_an_avif_says_its_bits():
    content = saved(Image.fromarray(NOISE), "AVIF")
    assert pixels(content, "a", ANY).shape == (3, HEIGHT, WIDTH)
    # both places that say it: Pillow's library refuses a file in which they differ
    pixel, codec = content.index(b"pixi") + 9, content.index(b"av1C") + 6
    deeper = bytearray(content)
    deeper[pixel : pixel + 3] = b"\x0a" * 3
    deeper[codec] |= 0x40  # AV1 Codec ISO Media File Format Binding, 2.3.3: high_bitdepth
    refused(bytes(deeper), "10 bits a channel")


@pytest.mark.parametrize(("mode", "kind"), [("CMYK", "JPEG"), ("CMYK", "TIFF"), ("LAB", "TIFF"), ("YCbCr", "TIFF")])
def test_other_colours_are_converted_only_where_the_user_says_so(mode, kind):
    content = saved(Image.new(mode, (WIDTH, HEIGHT)), kind)
    refused(content, f"mode {mode}", "data.channels=3")
    assert pixels(content, "a", Want(channels=3)).shape == (3, HEIGHT, WIDTH)
    assert pixels(content, "a", Want(channels=1)).shape == (1, HEIGHT, WIDTH)


def test_transparency_needs_a_background_and_full_opacity_does_not():
    alpha = np.full((HEIGHT, WIDTH, 1), 255, np.uint8)
    opaque = saved(Image.fromarray(np.concatenate([NOISE, alpha], 2)))
    assert np.array_equal(pixels(opaque, "a", ANY), NOISE.transpose(2, 0, 1))
    alpha[5, 6] = 0
    content = saved(Image.fromarray(np.concatenate([NOISE, alpha], 2)))
    refused(content, "transparent in places", "data.background=white or black")
    refused(content, "transparent in places", want=Want(channels=3))
    for colour, value in (("white", 255), ("black", 0)):
        found = pixels(content, "a", Want(background=colour))
        assert (found[:, 5, 6] == value).all() and np.array_equal(found[:, 6:], NOISE.transpose(2, 0, 1)[:, 6:])


def test_a_transparent_colour_of_a_palette_or_a_plain_picture_counts_too():
    palette = Image.fromarray(NOISE).quantize(16)
    refused(saved(palette, transparency=3), "transparent in places")
    grey = Image.fromarray(NOISE[..., 0])
    refused(saved(grey, transparency=int(NOISE[0, 0, 0])), "transparent in places")
    assert pixels(saved(grey, transparency=int(NOISE[0, 0, 0])), "a", Want(background="white"))[0, 0, 0] == 255
    partly = Image.fromarray(np.stack([NOISE[..., 0], NOISE[..., 1]], -1), "LA")
    assert pixels(saved(partly), "a", Want(background="black")).shape == (1, HEIGHT, WIDTH)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_several_frames_are_refused(kind):
    frames = [Image.new("RGB", (WIDTH, HEIGHT), (0, 200 * i, 0)) for i in range(3)]
    refused(saved(frames[0], kind, save_all=True, append_images=frames[1:]), "has 3 frames")


def test_a_telephones_jpeg_with_a_preview_is_its_picture():
    frames = [Image.new("RGB", (WIDTH, HEIGHT), (200, 0, 0)), Image.new("RGB", (8, 8))]
    content = saved(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert pixels(content, "a", ANY).shape == (3, HEIGHT, WIDTH)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
def test_a_picture_that_is_cut_short_is_refused(kind):
    content = saved(Image.fromarray(NOISE), kind)
    for length in (0, 5, len(content) // 3, len(content) * 2 // 3):
        refused(content[:length], "cannot be read as a picture", "fetch it again")


def test_what_is_no_picture_is_refused(tmp_path):
    refused(b"<html>404</html>", "Pillow knows no such format")
    refused(None, "holds no picture")
    refused({"bytes": None, "path": None}, "holds no picture")
    refused(str(tmp_path / "gone.png"), f"no file {tmp_path / 'gone.png'}")
    refused(str(tmp_path), "cannot be read as a picture")
    refused([[0.5, 1.0]], "values of float64")
    refused([[0, 256]], "values of int64")
    refused([[0, -1]], "values of int64")
    refused([[1, 2], [3]], "rows of unequal lengths")
    refused(7, "has the shape ()")
    refused([], "values of")
    refused(np.zeros((4, 4, 4), int).tolist(), "has the shape (4, 4, 4)")


def test_channels_are_made_grey_or_rgb_as_the_user_says():
    grey = pixels(saved(Image.fromarray(NOISE[..., 0])), "a", Want(channels=3))
    assert np.array_equal(grey, np.repeat(NOISE[None, ..., 0], 3, 0))
    # ITU-R 601-2
    luma = (NOISE.astype(float) @ [0.299, 0.587, 0.114])[None]
    assert np.abs(pixels(saved(Image.fromarray(NOISE)), "a", Want(channels=1)) - luma).max() <= 1


def striped(width, height):
    """Left half red, right half green; the top fifth is blue."""
    array = np.zeros((height, width, 3), np.uint8)
    array[:, : width // 2, 0], array[:, width // 2 :, 1] = 200, 200
    array[: height // 5] = (0, 0, 200)
    return saved(Image.fromarray(array))


def test_crop_keeps_the_middle_pad_adds_bars_and_squash_takes_all():
    tall = striped(40, 200)
    crop = pixels(tall, "a", Want((20, 20), "crop"))
    assert np.array_equal(crop, pixels(tall, "a", Want((20, 20))))
    assert crop.shape == (3, 20, 20) and crop[2].max() == 0 and crop[0, 10, 2] == 200 and crop[1, 10, 17] == 200
    pad = pixels(tall, "a", Want((20, 20), "pad", background="white"))
    assert (
        (pad[:, :, :8] == 255).all() and (pad[:, :, 12:] == 255).all() and pad[2, 0, 9] == 200 and pad[0, 15, 8] > 150
    )
    assert (pixels(tall, "a", Want((20, 20), "pad"))[:, :, :8] == 0).all()
    squash = pixels(tall, "a", Want((20, 20), "squash"))
    assert (squash[2, :3] > 150).all() and squash[0, 15, 2] == 200 and squash[1, 15, 17] == 200


@pytest.mark.parametrize("resize", ["crop", "pad", "squash"])
@pytest.mark.parametrize("size", [(37, 53), (53, 37), (64, 1), (3, 7)], ids=str)
def test_every_way_gives_exactly_the_size_that_was_asked_for(resize, size):
    for shape in ((WIDTH, HEIGHT), (1, 1), (200, 3)):
        assert pixels(striped(*shape), "a", Want(size, resize)).shape == (3, *size)


def test_a_picture_of_the_right_size_is_not_touched(tmp_path: Path):
    for resize in ("crop", "pad", "squash"):
        found = pixels(saved(Image.fromarray(NOISE)), "a", Want((HEIGHT, WIDTH), resize))
        assert np.array_equal(found, NOISE.transpose(2, 0, 1))
