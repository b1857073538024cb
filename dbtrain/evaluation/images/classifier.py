"""The recipe of the classifier whose features compare images where no Inception weights are at hand.

A distance on its features is a Frechet *classifier* distance. It is never FID, and two such distances can be
compared only if one classifier made the features of both. So a classifier is trained once for a data set,
kept, and named by its hash.
"""

import hashlib
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from dbtrain.data.batching import EpochOrder
from dbtrain.data.splits import DataSet, Split
from dbtrain.errors import ShardError
from dbtrain.method.content import content_hash
from dbtrain.method.draws import derive_seed
from dbtrain.shards.checksummed_json import Fields
from dbtrain.shards.safetensors_file import as_file, unpack
from dbtrain.shards.storage.store import Store
from dbtrain.telemetry.counting import Count, counted, silent

KIND = "dbtrain classifier 1"
"""Name of the recipe; it changes with anything below that changes the weights."""

FITTING = "steps of the classifier that compares images, trained once for this data set"
STEPS, BATCH, PEAK_LR = 1000, 128, 2e-3


class Classifier(nn.Module):
    """Three 3x3 convolutions and the mean over positions; 128 features, then logits.

    Args:
        channels: channels of an image.
        classes: number of classes.
    """

    num_features = 128

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(64, self.num_features, 3, stride=2, padding=1),
            nn.GELU(),
        )
        self.head = nn.Linear(self.num_features, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W), as the data set makes them, to features (N, 128)."""
        features: Tensor = self.trunk(images).mean(dim=(2, 3))
        return features

    def logits(self, images: Tensor) -> Tensor:
        """(N, classes)."""
        logits: Tensor = self.head(self(images))
        return logits


@dataclass(frozen=True)
class Judge:
    """A trained classifier and what is known of it."""

    network: Classifier
    digest: str
    """Hash of its weights, 16 hexadecimal digits."""
    accuracy: float
    """Accuracy on the test split, measured when it was trained."""


def judge_of(data: DataSet, path: str | None, device: torch.device, count: Count = silent) -> Judge:
    """The classifier at `path`, or else the one of this data set,
    trained when it is asked for the first time.

    That one is kept below ``$XDG_CACHE_HOME/dbtrain`` (``~/.cache/dbtrain``),
    under a hash of recipe and training data.

    Raises:
        ShardError: the file at `path` is missing, damaged, or a classifier of other images.
    """
    image, classes = data.shape["image"], int(str(data.shape["classes"]))
    assert isinstance(image, tuple)
    network = Classifier(image[0], classes)
    if path is not None:
        store, name = Store(Path(path).parent), Path(path).name
    else:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        store, name = Store(Path(cache) / "dbtrain"), f"classifier-{_fingerprint(data.train)}.safetensors"
        if not store.exists(name):
            content = _trained(network, data, device, store.where(name), count)
            try:
                store.makedirs()
                store.write(name, content)
            except ShardError as error:
                print(f"{error}; this command goes on, and the next one trains the classifier again", file=sys.stderr)
            return _read(network, content, store.where(name))
    return _read(network.to(device), store.read(name), store.where(name))


def _fingerprint(train: Split) -> str:
    digest = hashlib.sha256(KIND.encode())
    for indices in torch.split(torch.arange(len(train)), 4096):
        batch = train.batch(indices, torch.device("cpu"))
        digest.update(content_hash(batch).encode())
    return digest.hexdigest()[:16]


def _trained(network: Classifier, data: DataSet, device: torch.device, where: str, count: Count) -> bytes:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(KIND, "init"))
        for part in network.modules():
            if isinstance(part, (nn.Conv2d, nn.Linear)):
                part.reset_parameters()
    fit(network.to(device), data.train, device, count)
    record = {"kind": KIND, "accuracy": accuracy_of(network, data.test, device)}
    return as_file(network.state_dict(), record, where)[:]


def fit(network: Classifier, train: Split, device: torch.device, count: Count = silent) -> None:
    """1,000 steps of 128 samples of AdamW, from 2e-3 to zero by a cosine;
    the order is that of one fixed seed."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK_LR)
    order = EpochOrder(len(train), BATCH, derive_seed(KIND, "order"))
    for step in counted(count, FITTING, range(STEPS)):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        batch = train.batch(order.indices(step, range(BATCH)), device)
        loss = functional.cross_entropy(network.logits(batch["image"]), batch["label"])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()


@torch.no_grad()
def accuracy_of(network: Classifier, split: Split, device: torch.device) -> float:
    """Share of a split's samples that the classifier names rightly."""
    right = 0
    for indices in torch.split(torch.arange(len(split)), 1024):
        batch = split.batch(indices, device)
        right += int((network.logits(batch["image"]).argmax(dim=1) == batch["label"]).sum())
    return right / len(split)


def _read(network: Classifier, content: bytes, where: str) -> Judge:
    tensors, record = unpack(content, where)
    expected = {name: tensor.shape for name, tensor in network.state_dict().items()}
    if record.get("kind") != KIND or {name: tensor.shape for name, tensor in tensors.items()} != expected:
        raise ShardError(
            f"{where} is no classifier of images of {network.trunk[0].in_channels} channel(s) in "
            f"{network.head.out_features} classes: remove it or give another as evaluation.classifier"
        )
    network.load_state_dict(tensors)
    return Judge(network.eval(), content_hash(tensors)[:16], Fields(record, where).number("accuracy"))
