"""A tiny pipeline with random weights and captioned pictures, for docs/captions.md. Nothing is fetched.

Command:  python scripts/tiny_pipeline.py FOLDER
FOLDER/pipeline has an autoencoder, a text encoder and a tokenizer of the classes that diffusers' WanPipeline
has; FOLDER/pictures has pictures of squares and discs, each with a caption in a .txt file.
"""

import itertools
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

COLOURS, SHAPES, SIZE = ("red", "green", "blue"), ("square", "disc"), 64
SPECIAL = ["[PAD]", "[END]", "[UNK]"]
EACH = 16
"""Pictures of each caption."""
CHANNELS = 4
"""Channels of a latent."""


def draw_pictures(folder: Path) -> None:
    """Pictures in which a shape lies somewhere, with `a COLOUR SHAPE` beside each."""
    folder.mkdir(parents=True)
    places = torch.randint(16, SIZE - 16, (len(COLOURS) * len(SHAPES) * EACH, 2)).tolist()
    for number, (colour, shape, _) in enumerate(itertools.product(COLOURS, SHAPES, range(EACH))):
        picture, (x, y) = Image.new("RGB", (SIZE, SIZE), "white"), places[number]
        pen, box = ImageDraw.Draw(picture), (x - 14, y - 14, x + 14, y + 14)
        (pen.rectangle if shape == "square" else pen.ellipse)(box, fill=colour)
        picture.save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(f"a {colour} {shape}\n")


def save_tokenizer(folder: Path) -> int:
    """A tokenizer of the captions' words, which puts a token at the end; returns how many tokens it knows."""
    words = [*SPECIAL, "a", *COLOURS, *SHAPES]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("$A [END]", special_tokens=[("[END]", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[END]", unk_token="[UNK]", model_max_length=512
    )
    fast.save_pretrained(folder)
    return len(words)


@torch.no_grad()
def save_autoencoder(folder: Path, pictures: Path) -> None:
    """A Wan autoencoder; mean and deviation of its latents by channel, as measured, stand in its
    config.json."""
    network = AutoencoderKLWan(
        base_dim=8, z_dim=CHANNELS, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        latents_mean=[0.0] * CHANNELS, latents_std=[1.0] * CHANNELS,
    ).eval()  # fmt: skip
    files = sorted(pictures.glob("*.png"))[::4]
    rows = [torch.frombuffer(bytearray(Image.open(file).tobytes()), dtype=torch.uint8) for file in files]
    images = torch.stack(rows).reshape(-1, SIZE, SIZE, 3).permute(0, 3, 1, 2) / 127.5 - 1
    latents = network.encode(images[:, :, None]).latent_dist.mode().transpose(0, 1).flatten(1)
    network.register_to_config(latents_mean=latents.mean(1).tolist(), latents_std=latents.std(1).tolist())
    network.save_pretrained(folder)


def main(folder: Path) -> None:
    """Write both folders."""
    torch.manual_seed(0)
    draw_pictures(folder / "pictures")
    words = save_tokenizer(folder / "pipeline" / "tokenizer")
    config = UMT5Config(vocab_size=words, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    UMT5EncoderModel(config).save_pretrained(folder / "pipeline" / "text_encoder")
    save_autoencoder(folder / "pipeline" / "vae", folder / "pictures")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
