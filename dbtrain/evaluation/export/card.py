"""The README.md of an exported folder: what was trained on what, how well it does, and how to use it."""

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from dbtrain import __version__
from dbtrain.data.tokenizers import TOKENIZER_FILE
from dbtrain.shards.manifest import Manifest
from dbtrain.shards.merged_directory import UNFINISHED

USES: Mapping[str, str] = {
    "classify": "probabilities = classify(model, images)  # (N, C, H, W) -> (N, classes)",
    "sample": "images = sample(model, torch.arange(8))  # class numbers (N,) -> (N, C, H, W)",
    "generate": "tokens = generate(model, prompt, length=64)  # (N, P) int64 -> (N, 64)",
    "unmask": "tokens = unmask(model, prompt, length=64)  # (N, P) int64 -> (N, 64)",
}
"""A line of code for each function that a file may offer."""
CAPTIONED = "images = sample(model, with_mask(text, mask))  # embeddings (N, L, D), true for each token (N, L)"
"""The same for `sample` of a model that is told captions."""


def card(
    config: Mapping[str, Any],
    manifest: Manifest,
    able: Sequence[str],
    scores: Mapping[str, Any] | None,
    tokenizer: bool,
    kinds: Mapping[str, str],
) -> str:
    """The text of the card.

    Args:
        config: content of config.json.
        manifest: manifest of the merged model, without paths of the machine that trained it.
        able: functions that the file offers besides `load`.
        scores: content of evaluation.json, if the run was evaluated.
        tokenizer: whether the file of the tokenizer lies beside it.
        kinds: names of the classes of network, noise and parametrisation.
    """
    parts = [
        _front(config),
        _loading(able, config["network"]["needs"], "text" in config["shape"]),
        _routing(config),
        _training(config, manifest, kinds),
        _text(config, tokenizer),
        _figures(scores, config["evaluation"]["readout"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def plain_card(
    config: Mapping[str, Any],
    manifest: Manifest,
    loading: str,
    scores: Mapping[str, Any] | None,
    kinds: Mapping[str, str],
) -> str:
    """The text of the card of plain folders.

    Args:
        config: content of config.json.
        manifest: the same as in :func:`card`.
        loading: how the folders are loaded.
        scores: the same as in :func:`card`.
        kinds: names of the classes of noise and parametrisation.
    """
    figures = _figures(scores, "")
    parts = [_front(config), loading, _routing(config), _training(config, manifest, kinds), figures]
    return "\n\n".join(parts) + "\n"


def _front(config: Mapping[str, Any]) -> str:
    blocks = len(config["blocks"])
    lines = [
        f"# {config['run']}",
        "",
        f"A {config['network']['class']} of {config['blocks'][-1]['holds'][1]} layers in {blocks} blocks, each of "
        "which was trained by itself to denoise on its own slice of the noise levels (DiffusionBlocks), with dbtrain "
        f"{__version__}.",
    ]
    if config["method"] != "diffusion_blocks":
        lines += ["", f"It was trained by `method={config['method']}`."]
    if progress := config.get("unfinished"):
        lines += ["", f"**The training is not finished: {progress}.**"]
    return "\n".join(lines)


def _loading(able: Sequence[str], needs: Mapping[str, str], captions: bool) -> str:
    names = ", ".join(["load", *able, *(("with_mask",) if captions else ())])
    uses = [CAPTIONED if name == "sample" and captions else USES[name] for name in able]
    code = "\n".join([
        "import torch", f"from modeling import {names}", "", "model = load()  # of the folder of modeling.py", *uses,
        "estimate = model.denoise(noisy, level, context)",
    ])  # fmt: skip
    others = [f"{name} (it was exported with {version})" for name, version in needs.items()]
    packages = " and ".join(filter(None, ["PyTorch", *others, "safetensors"]))
    return (
        f"## How to load it\n\nIt needs {packages}, and not dbtrain. In this folder, or with it in "
        f"`sys.path`:\n\n```python\n{code}\n```\n\n`model.denoise` asks the block that owns the level of each sample; "
        "`model(noisy, level, context)` gives what the network itself puts out. The docstrings in `modeling.py` say "
        "the shapes. Classes that apply all layers in a chain compute nonsense from these weights: every block has a "
        "stem and a head of its own."
    )


def _routing(config: Mapping[str, Any]) -> str:
    """Which block answers at which levels."""
    edges = [float.fromhex(edge) for edge in config["edges"]]
    level = config["level"]
    lines = ["## Which block answers", "", f"| block | layers | {level} above | {level} up to | steps | weights |"]
    lines.append("|---:|---|---:|---:|---:|---|")
    for number, row in enumerate(config["blocks"]):
        layers = " ".join(map(str, row["applies"]))
        weights = f"{row['file']}{', averaged' if row['averaged'] else ''}"
        low, high = edges[number + 1], edges[number]
        lines.append(f"| {number} | {layers} | {low:.6g} | {high:.6g} | {row['steps']} | {weights} |")
    exact = "The exact edges are the hexadecimal floats in config.json; a level is compared with them in float64."
    return "\n".join([*lines, "", exact])


def _training(config: Mapping[str, Any], manifest: Manifest, kinds: Mapping[str, str]) -> str:
    """Data and training, without what only concerns the machine."""
    data, training = manifest.config["data"], manifest.config["training"]
    lines = [f"- Data: source `{data['source']}`{_named(data)}"]
    if manifest.data_hash:
        lines.append(f"- SHA-256 of the data's content: `{manifest.data_hash}`")
    lines += [f"- Shape of the data: `{config['shape']}`", *_scale(config)]
    if config["class_names"]:
        lines.append(f"- Classes: {', '.join(config['class_names'])}")
    lines.append(f"- Samples of one step: {training['batch_size']}; seed {config['seed']}")
    lines.append(f"- Noise: `{kinds['noise']}`; the network's input, output and time: `{kinds['parametrisation']}`")
    return "\n".join(["## Training", "", *lines])


def _scale(config: Mapping[str, Any]) -> list[str]:
    """Lines that say in which numbers pictures or latents go in and come out."""
    if "image" not in config["shape"]:
        return []
    if "latent_scale" not in config["shape"]:
        return ["- Pixels are numbers from -1 (black) to 1 (white)."]
    return ["- Latents go in scaled (by channel: less `latent_mean`, divided by `latent_std`, times `latent_scale`)."]


def _named(data: Mapping[str, Any]) -> str:
    """What the data is called, without the folders that it lies in."""
    path = data.get("path")
    if not isinstance(path, str):
        return ""
    of_hub = str(data["source"]).startswith("hf")
    return f", `{path if of_hub else PurePath(path).name}`"


def _text(config: Mapping[str, Any], file_is_there: bool) -> str:
    name = config["tokenizer"]
    if name is None:
        return ""
    kinds = {
        "letters": "Token 0 is the space, 1 to 26 are the letters a to z.",
        "bytes": "Tokens are the bytes of UTF-8.",
    }
    missing = f"Tokens are those of the Hugging Face tokenizer `{name}`, which was not at hand when this was exported."
    there = f"`tokenizers.Tokenizer.from_file('{TOKENIZER_FILE}')` makes tokens of text."
    return f"## Tokens\n\n{kinds.get(name) or (there if file_is_there else missing)}"


def _figures(scores: Mapping[str, Any] | None, readout: str) -> str:
    """The table of the last evaluation of the run."""
    if scores is None:
        return "## Figures\n\nThese weights were not evaluated before they were exported."
    splits = scores["scores"]
    readouts = dict.fromkeys(name for split in splits.values() for name in split)
    lines = [f"| {scores['metric']} by readout | {' | '.join(splits)} |", f"|---|{'---:|' * len(splits)}"]
    for name in readouts:
        values = [f"{split[name]:.4f}" if name in split else "-" for split in splits.values()]
        lines.append(f"| {name} | {' | '.join(values)} |")
    known = scores.get(UNFINISHED)
    note = f"\n\nThey are of blocks that were not done: {known}." if known else ""
    read = f" The functions of `modeling.py` read out `{readout}`." if readout in readouts else ""
    about = f"By `dbtrain eval`, with every readout and its controls (docs/concepts.md of dbtrain).{read}"
    return "\n".join(["## Figures", "", about, "", *lines]) + note
