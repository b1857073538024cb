"""What an exported file holds besides the networks: every level goes to its block.

It is copied into the file together with what it imports from this package, and runs there without it.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from dbtrain.method.draws import Draws, derive_seed
from dbtrain.method.interface import Batch, Example, Target
from dbtrain.method.ranges import Ranges
from dbtrain.method.sampler import Evaluation, chain

FORMAT = "dbtrain export 1"
COMMON = "common.safetensors"
"""What all blocks have in common: the codebook, and stem and head where no block has its own."""
HASHES = "sha256"
"""Field of config.json: SHA-256 of every file of weights, by its name."""

ROUNDING = 1e-6
"""Share by which float32 may have moved a level."""

Read = Callable[[Path], dict[str, Tensor]]
"""Tensors of a safetensors file by name."""


class RoutedBlocks(nn.Module):
    """Blocks that each own a slice of the noise levels; one block alone answers at a level.

    The blocks are not one chain of layers: each starts from its own stem, applies its own layers, and ends
    with its own head. Block b owns the half-open slice (edges[b + 1], edges[b]].

    Args:
        networks: networks of the blocks, the noisiest first.
        noise: the noise process.
        config: content of config.json.
    """

    def __init__(self, networks: list[Any], noise: Any, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(networks)
        self.orders = [tuple(row["applies"]) for row in config["blocks"]]
        self.ranges = Ranges.from_hex(config["edges"])
        self.noise = noise
        self.config = config

    def block_of(self, level: "float | Tensor") -> Tensor:
        """Number of the block that owns each level, int64, decided in float64 on the exact edges.

        Levels outside of all slices belong to the nearest block.
        """
        return self.ranges.block_of(torch.as_tensor(level, dtype=torch.float64))

    def forward(self, noisy: Tensor, level: "float | Tensor", context: Tensor) -> Tensor:
        """Outputs, such as logits or images; each sample's comes from the block that owns its level.

        Args:
            noisy: (N, ...) codes, images, latents or token ids.
            level: one for all, or (N,), or (N, L) where each position has its own. Give a number or float64:
                an edge rounded to float32 may fall into the neighbouring slice.
            context: (N, ...) what the network may see, such as images, classes or the tokens before.

        Raises:
            ValueError: a level is outside of the range that was trained, or the positions of one sample are
                at levels of several blocks.
        """
        return self._by_owner(noisy, level, context, lambda block, output: output)

    def denoise(self, noisy: Tensor, level: "float | Tensor", context: Tensor) -> Tensor:
        """The denoised estimate: codes or images like `noisy`, or probabilities of tokens.

        Arguments and errors are those of `forward`.
        """
        return self._by_owner(noisy, level, context, lambda block, output: block.denoised(output))

    def _by_owner(
        self, noisy: Tensor, level: "float | Tensor", context: Tensor, read: Callable[[Any, Tensor], Tensor]
    ) -> Tensor:
        levels = torch.as_tensor(level, dtype=torch.float64, device=noisy.device)
        shape = (len(noisy), *self.noise.level_shape(Example(noisy, context, noisy)))
        levels = levels.expand(shape) if levels.ndim == 0 else levels
        self._check(levels)
        owners = self.ranges.block_of(levels).reshape(len(noisy), -1)
        if bool((owners != owners[:, :1]).any()):
            raise ValueError("positions of one sample are at levels of several blocks: ask for one slice at a time")
        parts: dict[int, tuple[Tensor, Tensor]] = {}
        for number in sorted(set(owners[:, 0].tolist())):
            rows = (owners[:, 0] == number).nonzero()[:, 0]
            one = len(rows) == len(noisy)
            given = (noisy, levels, context) if one else (noisy[rows], levels[rows], context[rows])
            parts[number] = rows, read(self.blocks[number], self.output(number, given[0], given[1].float(), given[2]))
        if len(parts) == 1:
            return next(iter(parts.values()))[1]
        order = torch.cat([rows for rows, _ in parts.values()]).argsort()
        return torch.cat([part for _, part in parts.values()])[order]

    def _check(self, levels: Tensor) -> None:
        """Refuse levels that no block was trained at; as rounded to float32 the ends are no such levels."""
        high, low = self.ranges.edges[0], self.ranges.edges[-1]
        outside = (levels > high * (1 + ROUNDING)) | (levels < low * (1 - ROUNDING)) | levels.isnan()
        if bool(outside.any()):
            raise ValueError(
                f"{self.config['level']} = {float(levels[outside][0]):g} is outside of the range that this model was "
                f"trained on, {low:g} to {high:g}: give a level in it"
            )

    def output(self, block: int, noisy: Tensor, level: Tensor, context: Tensor) -> Tensor:
        """What a block puts out at any level (N, ...) float32, whether it owns that or not."""
        network: Any = self.blocks[block]
        output: Tensor = network.predict(self.orders[block], noisy, level, context)
        return output

    def evaluations(self, batch: Batch, seed: int = 0, steps_per_block: "int | None" = None) -> list[Evaluation]:
        """Every evaluation along the chain down the levels, for a batch of N samples.

        Args:
            batch: N samples as the network's `example` reads them.
            seed: seed of the noise that the chain starts from, if it starts from noise.
            steps_per_block: levels in every slice; by default as many as in the run's evaluation.
        """
        section, network = self.config["evaluation"], self.blocks[0]
        example: Example = network.example(batch)  # type: ignore[operator]
        draws = drawn(example.clean, "evaluation", self.config["seed"], seed)
        start = self.noise.prior(tuple(example.clean.shape[1:]), draws)
        if section["start"] == "zero":
            start = self.noise.centre(start)
        levels = self.noise.schedule(self.ranges, steps_per_block or section["steps_per_block"])

        def denoise(block: int, noisy: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
            output = self.output(block, noisy, level, example.context)
            return output, self.blocks[block].denoised(output)  # type: ignore[operator]

        shape = self.noise.level_shape(example)
        return list(chain(denoise, self.noise, self.ranges, levels, start, level_shape=shape, draws=draws))

    def probabilities(self, batch: Batch, seed: int = 0) -> Tensor:
        """Probabilities (N, classes), or (N, L, tokens), read out of the chain as the run was evaluated."""
        made = [evaluation.output.float().softmax(dim=-1) for evaluation in self.evaluations(batch, seed)]
        readouts = {"chain": made[-1], "mean": torch.stack(made).mean(dim=0), "first": made[0]}
        return readouts[self.config["evaluation"]["readout"]]


def drawn(like: Tensor, purpose: str, run_seed: int, seed: int) -> Draws:
    """The randomness of a batch, a function of its arguments and of a sample's place in the batch."""
    key = torch.tensor(derive_seed(run_seed, purpose, seed), device=like.device)
    return Draws(key, torch.arange(len(like), device=like.device))


def read_blocks(
    folder: Path, read: Read, network: Any, noise: Any, parametrisation: Any, verify: bool = False
) -> RoutedBlocks:
    """The model of a folder.

    Args:
        folder: it holds config.json and the weights beside it.
        read: reads a safetensors file.
        network, noise, parametrisation: classes.
        verify: compare the SHA-256 of every file of weights with that in config.json first.

    Raises:
        ValueError: the folder holds something else, or a file of weights is not the one that was written.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("format") != FORMAT:
        raise ValueError(f"{folder / 'config.json'} is of format {config.get('format')!r}, this file reads {FORMAT!r}")
    if verify:
        check_weights(folder, config[HASHES])
    common = read(folder / COMMON) if config["common"] else {}
    made_noise = described_noise(noise, config["noise"])
    own = {name: tuple(value) if isinstance(value, list) else value for name, value in config["arguments"].items()}
    own |= {"noise": made_noise, "parametrisation": parametrisation(**config["parametrisation"]["arguments"])}
    if "codebook" in common:
        own["codebook"] = common.pop("codebook")
    built: dict[str, nn.Module] = {}
    for row in config["blocks"]:
        if row["file"] not in built:
            with torch.random.fork_rng(devices=[]):  # what is drawn here is overwritten
                make = network.baseline if config["baseline"] else network
                block = make(layers=range(*row["holds"]), **own)
            block.load_state_dict({**common, **read(folder / row["file"])}, strict=True)
            built[row["file"]] = block
    return RoutedBlocks([built[row["file"]] for row in config["blocks"]], made_noise, config).eval()


def check_weights(folder: Path, hashes: Mapping[str, str]) -> None:
    """Compare files with their SHA-256, each in full.

    Raises:
        ValueError: a file is another than the one that was written, such as one that was damaged on its way.
    """
    for name, expected in hashes.items():
        digest = hashlib.sha256()
        with (folder / name).open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
        if digest.hexdigest() != expected:
            raise ValueError(
                f"{folder / name} has the SHA-256 {digest.hexdigest()}, and config.json says {expected}: fetch it anew"
            )


def described_noise(kind: Any, described: Mapping[str, Any]) -> Any:
    """The noise process that config.json describes."""
    if "arguments" in described:
        return kind(**described["arguments"])
    target = Target(**described["target"])
    return kind.make(described["distribution"], SimpleNamespace(**described["settings"]), target)
