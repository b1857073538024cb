import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dbtrain.config import load_config
from dbtrain.data.splits import mixed
from dbtrain.errors import DataError
from dbtrain.run.plan import load_data

CPU = torch.device("cpu")
LATENTS = 4 * torch.randn(50, 4, 3, 2, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(50) % 5


class Bomb:
    """Says so if anyone unpickles it."""

    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def load(path, **changes):
    data = {"source": "latents", "path": str(path), "classes": 5, **changes}
    return load_data(load_config(None, base={"name": "z", "model": {"arch": "dit"}, "data": data}))


def whole(split):
    return split.batch(torch.arange(len(split)), CPU)


def test_latents_are_read_from_safetensors_and_npy_alike(tmp_path):
    save_file({"latent": LATENTS, "label": LABELS, "other": torch.ones(2)}, tmp_path / "a.safetensors")
    np.save(tmp_path / "a.npy", LATENTS.numpy())
    np.save(tmp_path / "y.npy", LABELS.numpy().astype(np.uint8))
    one, two = load(tmp_path / "a.safetensors"), load(tmp_path / "a.npy", labels=str(tmp_path / "y.npy"))
    assert one.shape == two.shape and one.shape["image"] == (4, 3, 2) and one.shape["classes"] == 5
    assert [len(s) for s in (one.train, one.validation, one.test)] == [41, 4, 5]
    for a, b in zip((one.train, one.validation, one.test), (two.train, two.validation, two.test), strict=True):
        assert all(torch.equal(whole(a)[name], whole(b)[name]) for name in ("image", "label"))
    image = torch.cat([whole(s)["image"] for s in (one.train, one.validation, one.test)])
    assert torch.allclose(image / one.shape["latent_scale"], LATENTS[mixed(50)], atol=1e-5)
    assert torch.equal(torch.cat([whole(s)["label"] for s in (one.train, one.validation, one.test)]), LABELS[mixed(50)])


def test_latents_are_scaled_to_sigma_data_by_the_training_split_or_as_told(tmp_path):
    save_file({"latent": LATENTS.half(), "label": LABELS}, tmp_path / "a.safetensors")
    data = load(tmp_path / "a.safetensors")
    assert float(whole(data.train)["image"].std()) == pytest.approx(0.5, rel=1e-3)
    assert whole(data.train)["image"].dtype == torch.float32
    assert load(tmp_path / "a.safetensors", scale=0.25).shape["latent_scale"] == 0.25


def test_every_split_of_latents_sorted_by_class_has_several_classes(tmp_path):
    save_file({"latent": LATENTS.repeat(4, 1, 1, 1), "label": torch.arange(200) // 40}, tmp_path / "a.safetensors")
    data = load(tmp_path / "a.safetensors")
    assert [len(whole(s)["label"].unique()) for s in (data.train, data.validation, data.test)] == [5, 5, 5]
    again = load(tmp_path / "a.safetensors")
    assert torch.equal(whole(data.test)["label"], whole(again.test)["label"])


def refused(message, path, **changes):
    with pytest.raises(DataError, match=message) as caught:
        load(path, **changes)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_pickles_are_never_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.pt", "a.pkl", "a.npz", "a"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
        refused("never read", tmp_path / name)
    np.save(tmp_path / "a.npy", np.array([Bomb()], dtype=object))
    refused("cannot be read as a .npy file: .*allow_pickle", tmp_path / "a.npy", labels="y.npy")
    (tmp_path / "a.safetensors").write_bytes(pickle.dumps(Bomb()))
    refused("cannot be read as a .safetensors file", tmp_path / "a.safetensors")
    assert not Path("exploded").exists()


def planted(value, dtype=torch.float32):
    latents = LATENTS.to(dtype, copy=True)
    latents[7, 2, 1, 0] = value
    return latents


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -2.5])
def test_latents_that_are_all_equal_are_refused_unless_a_scale_is_given(tmp_path, value):
    file = tmp_path / "a.safetensors"
    save_file({"latent": torch.full((50, 4, 3, 2), value), "label": LABELS}, file)
    refused(f"training split are all {value:g}.*check the encoder.*data.scale", file)
    assert load(file, scale=1.0).shape["latent_scale"] == 1.0


def test_latents_whose_spread_float32_cannot_scale_are_refused(tmp_path):
    file = tmp_path / "a.safetensors"
    save_file({"latent": LATENTS.double() * 1e-44, "label": LABELS}, file)
    refused("data.scale", file)


def test_numpy_files_of_another_machine_are_read_and_what_are_no_numbers_refused(tmp_path):
    x, y = tmp_path / "x.npy", tmp_path / "y.npy"
    np.save(x, LATENTS.numpy())
    np.save(y, LABELS.numpy())
    plain = load(x, labels=str(y))
    np.save(x, LATENTS.numpy().astype(">f4"))
    np.save(y, np.asfortranarray(LABELS.numpy().astype(">u2")))
    assert load(x, labels=str(y)).content == plain.content
    for numbers in (np.array(list("abcde") * 10), np.array(["2020-01-01"] * 50, dtype="datetime64[D]")):
        np.save(y, numbers)
        with pytest.raises(DataError, match=f"{y} holds .*, not numbers: .*of classes those from 0"):
            load(x, labels=str(y))
    with y.open("wb") as file:
        for part in (LABELS.numpy(), LABELS.numpy()):
            np.save(file, part)
    with pytest.raises(DataError, match=f"{y} goes on after its array"):
        load(x, labels=str(y))


def test_labels_where_they_do_not_belong_are_refused(tmp_path):
    file, x = tmp_path / "a.safetensors", tmp_path / "x.npy"
    save_file({"latent": LATENTS, "label": LABELS}, file)
    np.save(x, LATENTS.numpy())
    refused("data.labels=y.npy is for latents in a .npy file: leave it out", file, labels="y.npy")
    refused("data.labels=.*a.safetensors must be a .npy file", x, labels=str(file))


def test_what_is_no_set_of_latents_is_refused(tmp_path):
    file = tmp_path / "a.safetensors"
    refused("cannot be read", file)
    cases = {
        "holds x; needed are latent and label": {"x": LATENTS},
        r"holds torch.float32 of shape \(50, 24\)": {"latent": LATENTS.flatten(1), "label": LABELS},
        "holds torch.int64": {"latent": LATENTS.long(), "label": LABELS},
        r"holds torch.float32 of shape \(50, 0, 3, 2\)": {"latent": LATENTS[:, :0], "label": LABELS},
        r"latent 7 \(the first is 0\) is nan in float32 at \(2, 1, 0\)": {"latent": planted(math.nan), "label": LABELS},
        r"latent 7 .* is -inf in float32": {"latent": planted(-math.inf).half(), "label": LABELS},
        r"latent 7 .* is inf in float32": {"latent": planted(1e39, torch.float64), "label": LABELS},
        "labels are whole numbers": {"latent": LATENTS, "label": LABELS.float()},
        r"labels are whole numbers of shape \(n,\), not torch.int64 of \(50, 1\)": {
            "latent": LATENTS,
            "label": LABELS[:, None],
        },
        "50 images and 49 labels": {"latent": LATENTS, "label": LABELS[1:]},
        "label -1 of sample 0 is out of range": {"latent": LATENTS, "label": LABELS - 1},
    }
    for message, tensors in cases.items():
        save_file(tensors, file)
        refused(message, file)
    save_file({"latent": LATENTS, "label": LABELS}, file)
    for changes, message in (({"classes": 3}, "label 3 of sample 3 is out of range"), ({"test": 0.999}, "empty")):
        with pytest.raises(DataError, match=message):
            load(file, **changes)
    np.save(tmp_path / "a.npy", LATENTS.numpy())
    refused("give a .npy file of the classes as data.labels", tmp_path / "a.npy")
