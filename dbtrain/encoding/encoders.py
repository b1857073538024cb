"""Autoencoders of diffusers and text encoders of transformers, from folders on disk; never from a pickle.

Both libraries are imported when they are needed.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dbtrain.errors import ConfigError, DataError, first_line

CONFIG = "config.json"
TEXT_ENCODERS: Mapping[str, str] = {
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
}
"""Class that reads texts alone, by `model_type`; any other type takes `AutoModel`."""


class PictureEncoder:
    """The mean of an autoencoder's posterior, and pictures of such latents.

    Args:
        folder: of `save_pretrained`, or a pipeline with a folder ``vae``.
        device, dtype: device and dtype of its arithmetic.

    Raises:
        ConfigError: diffusers is missing.
        DataError: the folder is no autoencoder of diffusers, or has no safetensors weights.
    """

    def __init__(self, folder: str, device: torch.device, dtype: torch.dtype) -> None:
        place = _inner(Path(folder), "vae")
        self.config = _config(place, "an autoencoder of diffusers")
        name = str(self.config.get("_class_name"))
        library = _library("diffusers", "diffusers")
        kind = getattr(library, name, None)
        if kind is None or not name.startswith("Autoencoder"):
            raise DataError(f"{place / CONFIG} names the class {name}, which is no autoencoder of diffusers")
        self.network = _loaded(kind, place, torch_dtype=dtype).to(device).eval().requires_grad_(False)
        self.device, self.dtype, self.stamp = device, dtype, _stamp(place)
        self.channels = int(self.config.get("in_channels", 3))
        self.video = any(parameter.ndim == 5 for parameter in self.network.parameters())

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) in [-1, 1] -> latents (N, c, h, w) float32, or (N, c, 1, h, w) of a video's
        autoencoder."""
        given = images.to(self.device, self.dtype)
        made: Tensor = self.network.encode(given[:, :, None] if self.video else given).latent_dist.mode()
        return made.float().cpu()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents as it gives them -> images (N, C, H, W) float32 in about [-1, 1]; the first of frames.

        Raises:
            DataError: they have another number of channels or dimensions.
        """
        wanted = self._latent_channels()
        if latents.ndim != (5 if self.video else 4) or (wanted and latents.shape[1] != wanted):
            size = "x".join(map(str, latents.shape[1:]))
            raise DataError(
                f"latents of {size} are not of this autoencoder, whose latents have {wanted} channels"
                f"{' and frames' if self.video else ''}: give the one that the run's data was encoded with"
            )
        made: Tensor = self.network.decode(latents.to(self.device, self.dtype)).sample
        return (made[:, :, 0] if self.video else made).float().cpu()

    def _latent_channels(self) -> int:
        """Channels of its latents, 0 if its configuration does not say."""
        return int(self.config.get("latent_channels", self.config.get("z_dim", 0)) or 0)

    def normalisation(self) -> tuple[list[float], list[float]] | None:
        """Mean and deviation of its latents by channel, as its configuration has them, if it does."""
        channels = self._latent_channels()
        mean, std = self.config.get("latents_mean"), self.config.get("latents_std")
        if mean and std:
            return list(mean), list(std)
        factor = self.config.get("scaling_factor")
        if not factor or not channels:
            return None
        return [float(self.config.get("shift_factor") or 0.0)] * channels, [1 / factor] * channels


class TextEncoder:
    """The last hidden states of a text encoder.

    Args:
        folder: with model and tokenizer, or a pipeline with folders ``text_encoder`` and ``tokenizer``.
        length: tokens of every caption, filled up or cut off.
        device, dtype: device and dtype of its arithmetic; its output keeps the dtype.

    Raises:
        ConfigError: transformers is missing.
        DataError: the folder is no text encoder, has no tokenizer, or no safetensors weights.
    """

    def __init__(self, folder: str, length: int, device: torch.device, dtype: torch.dtype) -> None:
        place = _inner(Path(folder), "text_encoder")
        config = _config(place, "a text encoder of transformers")
        library = _library("transformers", "text")
        library.utils.logging.disable_progress_bar()  # it would run into our own
        name = TEXT_ENCODERS.get(str(config.get("model_type")), "AutoModel")
        beside = Path(folder) / "tokenizer"
        tokens = beside if beside.is_dir() else place
        try:
            self.tokenizer: Any = library.AutoTokenizer.from_pretrained(str(tokens), local_files_only=True)
        except Exception as error:  # whatever the library raises
            raise DataError(
                f"{tokens} has no tokenizer that can be read ({first_line(error)}): save it there"
            ) from error
        self.network = _loaded(getattr(library, name), place).to(device, dtype).eval().requires_grad_(False)
        self.length, self.device, self.stamp = length, device, _stamp(place)
        self.cut = 0
        """Captions of which the end was cut off."""

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embeddings (N, L, D), zeros where no token is, and the mask (N, L), true where one is."""
        self.cut += sum(len(self.tokenizer(text)["input_ids"]) > self.length for text in captions)
        options = {"padding": "max_length", "truncation": True, "max_length": self.length, "return_tensors": "pt"}
        read = self.tokenizer(list(captions), **options)
        mask = read["attention_mask"]
        made = self.network(input_ids=read["input_ids"].to(self.device), attention_mask=mask.to(self.device))
        text: Tensor = made.last_hidden_state.cpu()
        return text * mask[..., None].to(text.dtype), mask.bool()


def _inner(folder: Path, name: str) -> Path:
    """The part of a pipeline, or the folder itself."""
    return folder / name if (folder / name).is_dir() else folder


def _config(folder: Path, kind: str) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} is not {kind}: it has no {CONFIG} that can be read ({first_line(error)})") from error
    if not isinstance(config, dict):
        raise DataError(f"{folder / CONFIG} is no object: save {kind} there")
    return config


def _library(name: str, extra: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"encode needs the extra packages of dbtrain[{extra}] ({error}): install them") from error


def _loaded(kind: Any, folder: Path, **options: Any) -> Any:
    """A network with the weights of a folder, all in safetensors files."""
    if not any(folder.glob("*.safetensors")):
        pickles = [file.name for file in sorted(folder.iterdir()) if file.suffix in (".bin", ".pt", ".ckpt", ".pth")]
        has = f"it has {pickles[0]}, a pickle, which is never read" if pickles else "it has no weights"
        raise DataError(f"{folder} has no .safetensors file ({has}): save it with save_pretrained")
    try:
        return kind.from_pretrained(str(folder), local_files_only=True, use_safetensors=True, **options)
    except Exception as error:  # whatever the libraries raise on foreign folders
        raise DataError(
            f"{folder} cannot be loaded ({first_line(error)}): save it again with save_pretrained"
        ) from error


def _stamp(folder: Path) -> str:
    """Changes with the configuration, and with names and sizes of the weights."""
    sizes = [[file.name, file.stat().st_size] for file in sorted(folder.glob("*.safetensors"))]
    return hashlib.sha256((folder / CONFIG).read_bytes() + json.dumps(sizes).encode()).hexdigest()
