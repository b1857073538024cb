"""`dbtrain encode`: pictures and captions by small random encoders, as `save_pretrained` writes them."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from dbtrain import cli
from dbtrain.config import load_config
from dbtrain.encoding.encoders import PictureEncoder
from dbtrain.errors import ConfigError
from dbtrain.run.merge import merge
from dbtrain.run.plan import load_data
from dbtrain.run.run import Run
from tests.unit.small_runs import commit, settled

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

CAPTIONS = ["a red cat", "a dog", "the blue sky over a red dog", "cat", "a cat and a dog", "sky", "blue"]
WORDS = ["[PAD]", "[UNK]", *sorted({word for text in CAPTIONS for word in text.split()})]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """A pipeline's folder with an autoencoder, a text encoder and a tokenizer."""
    root = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=3, scaling_factor=0.25,
    ).save_pretrained(root / "vae")  # fmt: skip
    config = transformers.T5Config(vocab_size=len(WORDS), d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    transformers.T5EncoderModel(config).save_pretrained(root / "text_encoder")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(root / "tokenizer")
    return root


def picture(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = torch.randint(0, 256, (20 * 16 * 3,), generator=torch.Generator().manual_seed(seed))
    Image.frombytes("RGB", (20, 16), bytes(data.tolist())).save(path)


@pytest.fixture
def captioned(tmp_path):
    folder = tmp_path / "pictures"
    for number, caption in enumerate(CAPTIONS):
        picture(folder / f"{number}.png", number)
        (folder / f"{number}.txt").write_text(caption + "\n")
    return folder


def run(*arguments):
    result = CliRunner().invoke(cli.app, ["encode", *map(str, arguments)])
    return result.exit_code, " ".join(result.output.split()), result


def line(source, encoders, to, *more):
    size = ("--size", 16, "--tokens", 5, "--per-file", 3, "--batch", 2)
    return (source, "--vae", encoders, "--text", encoders, "--to", to, *size, *more)


def parts(folder):
    return [load_file(file) for file in sorted(folder.glob("part-*.safetensors"))]


def test_latents_and_embeddings_are_those_of_the_libraries(captioned, encoders, tmp_path):
    code, told, _ = run(*line(captioned, encoders, tmp_path / "to"))
    assert code == 0, told
    assert f"7 samples in {tmp_path / 'to'}" in told.replace("/ ", "/")
    assert "data.mean=[0,0,0] data.std=[4,4,4]" in told and "warning: 1 captions have more than 5 tokens" in told
    made = parts(tmp_path / "to")
    assert [len(part["latent"]) for part in made] == [3, 3, 1] and made[0]["latent"].shape[1:] == (3, 8, 8)
    vae = diffusers.AutoencoderKL.from_pretrained(encoders / "vae")
    read = Image.open(captioned / "4.png").crop((2, 0, 18, 16))  # the middle, whose height is right already
    pixels = torch.frombuffer(bytearray(read.tobytes()), dtype=torch.uint8).reshape(16, 16, 3).permute(2, 0, 1)
    with torch.no_grad():
        wanted = vae.encode((pixels.float() / 127.5 - 1)[None]).latent_dist.mode()
    assert torch.allclose(made[1]["latent"][1], wanted[0], atol=1e-4)
    model = transformers.T5EncoderModel.from_pretrained(encoders / "text_encoder")
    ids = torch.tensor([[WORDS.index(word) for word in CAPTIONS[4].split()]])
    with torch.no_grad():
        text = model(input_ids=ids).last_hidden_state
    assert torch.allclose(made[1]["text"][1], text[0], atol=1e-5) and made[1]["mask"][1].all()
    short = made[0]["text"][1]  # of two words
    assert made[0]["mask"][1].tolist() == [True] * 2 + [False] * 3 and not short[2:].any() and short[:2].any()


def test_what_it_writes_is_data_to_train_on(captioned, encoders, tmp_path):
    assert run(*line(captioned, encoders, tmp_path / "to"))[0] == 0
    data = {
        "source": "encoded",
        "path": str(tmp_path / "to"),
        "cache": str(tmp_path / "cache"),
        "test": 0.2,
        "validation": 0.2,
    }
    loaded = load_data(load_config(None, base={"name": "z", "model": {"arch": "dit"}, "data": data}))
    assert loaded.shape["image"] == (3, 8, 8) and loaded.shape["text"] == (5, 12)
    assert set(loaded.train.batch(torch.arange(2), torch.device("cpu"))) == {"image", "text", "mask"}


def test_a_command_that_was_stopped_goes_on_and_ends_with_the_same_bytes(captioned, encoders, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(*line(captioned, encoders, whole))[0] == 0
    real, calls = PictureEncoder.__call__, []

    def stopping(self, images):
        calls.append(len(images))
        if len(calls) == 4:  # in the second file
            raise KeyboardInterrupt
        return real(self, images)

    monkeypatch.setattr(PictureEncoder, "__call__", stopping)
    assert run(*line(captioned, encoders, broken))[0] == 130
    assert sorted(path.name for path in broken.iterdir()) == ["encode.json", "part-00000.safetensors"]
    assert run(*line(captioned, encoders, broken))[0] == 0
    assert calls == [2, 1, 2, 1, 2, 1, 1]  # the first file was not encoded again
    for path in whole.iterdir():
        assert path.read_bytes() == (broken / path.name).read_bytes()


def test_a_command_that_encoded_nothing_binds_nobody(captioned, encoders, tmp_path):
    to, damaged = tmp_path / "to", captioned / "0.png"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:40])
    code, told, _ = run(*line(captioned, encoders, to))
    assert code == 1 and "0.png" in told and [path.name for path in to.iterdir()] == ["encode.json"]
    damaged.write_bytes(whole)
    assert run(*line(captioned, encoders, to, "--tokens", 6))[0] == 0


def test_another_command_does_not_go_on_in_the_folder(captioned, encoders, tmp_path):
    to = tmp_path / "to"
    assert run(*line(captioned, encoders, to))[0] == 0
    code, told, _ = run(*line(captioned, encoders, to, "--tokens", 6))
    assert code == 2 and "was begun with tokens=5, and this command has tokens=6" in told
    (captioned / "0.txt").write_text("another caption")
    code, told, _ = run(*line(captioned, encoders, to))
    assert code == 2 and "was begun with pictures=" in told
    code, told, _ = run(*line(captioned, encoders, captioned))
    assert code == 2 and "is not empty and has no encode.json" in told


def test_folders_of_classes_get_labels(encoders, tmp_path):
    for number in range(6):
        picture(tmp_path / "pets" / ("cat" if number % 3 else "dog") / f"{number}.png", number)
    code, told, _ = run(tmp_path / "pets", "--vae", encoders / "vae", "--to", tmp_path / "to", "--size", "16x8")
    assert code == 0 and "data.classes=2" in told
    [part] = parts(tmp_path / "to")
    assert part["label"].tolist() == [0, 0, 0, 0, 1, 1] and part["latent"].shape == (6, 3, 8, 4)
    assert json.loads((tmp_path / "to" / "encode.json").read_text())["classes"] == ["cat", "dog"]


def test_captions_of_a_metadata_file(captioned, encoders, tmp_path):
    lines = [{"file_name": f"{n}.png", "text": CAPTIONS[n]} for n in (5, 1)]
    (captioned / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert run(*line(captioned, encoders, tmp_path / "to"))[0] == 0
    [part] = parts(tmp_path / "to")
    assert part["mask"].sum(dim=1).tolist() == [1, 2]
    (captioned / "metadata.jsonl").write_text('{"file_name": "9.png", "text": "a"}\n')
    assert "names 9.png, which is not there" in run(*line(captioned, encoders, tmp_path / "other"))[1]
    (captioned / "metadata.jsonl").write_text('{"file_name": "1.png"}\n')
    assert (
        "line 1: each line is an object with file_name and text" in run(*line(captioned, encoders, tmp_path / "o"))[1]
    )


def test_what_is_missing_or_a_pickle_is_refused_by_name(captioned, encoders, tmp_path):
    def refused(message, *arguments):
        code, told, result = run(*arguments)
        assert code in (1, 2) and message in told and "Traceback" not in result.output, told

    to = tmp_path / "to"
    (captioned / "3.txt").unlink()
    refused("3.png has no caption: write 3.txt beside it", *line(captioned, encoders, to))
    (captioned / "3.txt").write_text("cat")
    refused("is not an autoencoder of diffusers: it has no config.json", *line(captioned, tmp_path, to))
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text((encoders / "vae" / "config.json").read_text())
    (pickled / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04.")
    message = "has no .safetensors file (it has diffusion_pytorch_model.bin, a pickle, which is never read)"
    refused(message, captioned, "--vae", pickled, "--text", encoders, "--to", to)
    wrong = encoders / "text_encoder"
    refused("which is no autoencoder of diffusers", captioned, "--vae", wrong, "--text", encoders, "--to", to)
    refused("lies in no folder of a class", captioned, "--vae", encoders, "--to", to)
    refused("neither a number of pixels nor two", *line(captioned, encoders, to, "--size", "large"))
    (captioned / "2.png").write_bytes(b"hello")
    refused("2.png cannot be read as a picture", *line(captioned, encoders, to))


def sampled(*arguments):
    result = CliRunner().invoke(cli.app, ["sample", *map(str, arguments)])
    assert "Traceback" not in result.output
    return result.exit_code, " ".join(result.output.split())


def test_samples_of_captions_are_drawn_and_decoded_or_it_is_said_what_does_not_fit(
    captioned, encoders, tmp_path, monkeypatch
):
    assert run(*line(captioned, encoders, tmp_path / "to"))[0] == 0
    config = {"num_attention_heads": 1, "attention_head_dim": 12, "ffn_dim": 16, "freq_dim": 16, "num_layers": 2}
    data = {"source": "encoded", "path": str(tmp_path / "to"), "cache": str(tmp_path), "validation": 0.2, "test": 0.2}
    base = {"noise": {}, "data": data, "model": {"arch": "hf_wan", "config": config}}
    made = settled(tmp_path, **base)
    commit(made)
    merge(Run(made))
    monkeypatch.chdir(tmp_path)
    told = ("--vae", encoders, "--text", encoders, "--caption", "a red dog", "--caption", "sky")
    few = (made.url, "--count", 5, "--steps", 2, "--out", "made.png")
    code, said = sampled(*few, *told)
    assert code == 0 and "5 samples" in said, said
    sheet = np.asarray(Image.open("made.png"))
    assert (
        sheet.shape[0] == 2 * (64 + 2) and (sheet[-66:, -66:] == 255).all()
    )  # of five pictures the last place is empty
    assert sheet[:64, -66:].std() > 0 and sheet[:64, :10].min() < 128  # a picture, and its caption
    first = sheet[:64, -132:].copy()
    code, said = sampled(*few, "--vae", encoders, "--text", encoders, "--caption", CAPTIONS[2], "--caption", "sky")
    assert code == 0 and "warning: 1 captions have more than 5 tokens and were cut off" in said
    assert not np.array_equal(np.asarray(Image.open("made.png"))[:64, -132:], first)
    array = (made.url, "--count", 3, "--steps", 2, "--out", "made.npy")
    assert sampled(*array, "--vae", encoders)[0] == 0 and np.load("made.npy").shape == (3, 3, 16, 16)
    assert sampled(*array)[0] == 0 and np.load("made.npy").shape == (3, 3, 8, 8)

    code, said = sampled(*few, "--caption", "sky")
    assert code == 2 and "--text FOLDER and --caption belong together" in said
    wide = transformers.T5Config(vocab_size=len(WORDS), d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    transformers.T5EncoderModel(wide).save_pretrained(tmp_path / "wide" / "text_encoder")
    shutil.copytree(encoders / "tokenizer", tmp_path / "wide" / "tokenizer")
    code, said = sampled(*few, "--text", "wide", "--caption", "sky")
    assert code == 2 and "embeddings of width 16, and toy is trained on those of width 12" in said
    diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), block_out_channels=(4,),
        norm_num_groups=2, latent_channels=2,
    ).save_pretrained("other")  # fmt: skip
    code, said = sampled(*few, "--vae", "other")
    assert code == 1 and "latents of 3x8x8 are not of this autoencoder, whose latents have 2 channels" in said
    classes = settled(tmp_path, name="classes", **{**base, "data": {"source": "digits"}})
    commit(classes)
    merge(Run(classes))
    code, said = sampled(classes.url, "--text", encoders, "--caption", "sky")
    assert code == 2 and "--caption is for runs whose data has captions, and classes is trained on" in said
    other = {**base, "model": {"arch": "hf_dit", "config": {"num_layers": 2}}, "name": "dit"}
    with pytest.raises(ConfigError, match="DiTTransformer2DModel is told classes of an image, and the data has text"):
        Run(settled(tmp_path, **other)).plan.model(0)
    base["model"] = {"arch": "hf_wan", "config": {**config, "text_dim": 99}}
    with pytest.raises(ConfigError, match=r"text_dim=99, and the data has .* embeddings of width 12"):
        Run(settled(tmp_path, **base, name="wide")).plan.model(0)
