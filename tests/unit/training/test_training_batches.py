import pytest
import torch

from dbtrain.config import AugmentationConfig
from dbtrain.data.splits import LabelledImages
from dbtrain.errors import ConfigError
from dbtrain.run.batch_shape import cut_batch
from dbtrain.training.batches import Batches

CPU = torch.device("cpu")
SPLIT = LabelledImages(torch.arange(50, dtype=torch.uint8).reshape(50, 1, 1, 1), torch.arange(50), 50)


def step_of(workers, micro, step, seed=0, block=1):
    """All that the workers of a block train on in one step, in the order of the positions."""
    shape = cut_batch(24, workers, micro)
    feeds = [Batches(SPLIT, shape, seed, block, rank, CPU) for rank in range(workers)]
    cuts = [cut for batches in feeds for cut in batches.micro_batches(step)]
    assert len(cuts) == workers * shape.accumulation
    assert {int(key) for _, key, _ in cuts} == {int(cuts[0][1])}
    labels, positions = torch.cat([b["label"] for b, _, _ in cuts]), torch.cat([p for _, _, p in cuts])
    return labels, positions, int(cuts[0][1])


@pytest.mark.parametrize(("workers", "micro"), [(1, 24), (1, 4), (2, None), (3, 2), (4, 3), (24, 1)])
@pytest.mark.parametrize("step", [0, 2, 31])
def test_workers_and_micro_batches_together_train_on_the_batch_of_one_worker(workers, micro, step):
    labels, positions, key = step_of(workers, micro, step)
    expected, _, expected_key = step_of(1, None, step)
    assert torch.equal(labels, expected) and positions.tolist() == list(range(24)) and key == expected_key


def test_steps_blocks_and_seeds_have_batches_and_noise_of_their_own():
    seen = [step_of(1, None, *arguments) for arguments in ((0, 0, 1), (1, 0, 1), (0, 1, 1), (0, 0, 2))]
    assert len({key for _, _, key in seen}) == 4
    assert len({tuple(labels.tolist()) for labels, _, _ in seen}) == 4


def test_dropout_is_seeded_by_step_and_not_by_what_ran_before():
    batches = Batches(SPLIT, cut_batch(24, 2, 6), 0, 1, 0, CPU)

    def dropout(step):
        return [torch.rand(8) for _ in batches.micro_batches(step)]

    first, other = dropout(5), dropout(6)
    again = dropout(5)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], other[0])


def test_images_are_shifted_and_mirrored_by_the_step_and_not_by_the_layout():
    pixels = torch.arange(1, 1201, dtype=torch.int16).to(torch.uint8).reshape(50, 1, 4, 6)
    images = LabelledImages(pixels, torch.arange(50), 50)
    chosen = AugmentationConfig(shift=1, flip=True)

    def step(number, workers=1, block=1):
        shape = cut_batch(24, workers, None)
        feeds = [Batches(images, shape, 0, block, rank, CPU, chosen) for rank in range(workers)]
        batches = [b for batches in feeds for b, _, _ in batches.micro_batches(number)]
        return torch.cat([b["image"] for b in batches]), torch.cat([b["label"] for b in batches])

    changed, labels = step(3)
    assert torch.equal(step(3, workers=3)[0], changed)
    assert not torch.equal(step(3, block=0)[0], changed)
    kinds = set()
    for new, old in zip(changed, images.batch(labels, CPU)["image"], strict=True):
        padded = torch.nn.functional.pad(old, [1] * 4, value=-1.0)
        cuts = {(y, x): padded[:, y : y + 4, x : x + 6] for y in range(3) for x in range(3)}
        found = [(at, m) for at, cut in cuts.items() for m in (0, 1) if torch.equal(cut.flip(-1) if m else cut, new)]
        assert len(found) == 1
        kinds.add(found[0])
    assert len({at for at, _ in kinds}) > 5 and {m for _, m in kinds} == {0, 1}
    with pytest.raises(ConfigError, match="is for images"):
        Batches(object(), cut_batch(2, 1, None), 0, 0, 0, CPU, chosen)


@pytest.mark.parametrize(
    ("arguments", "shape"), [((24, 1, None), (1, 1, 24)), ((24, 2, 4), (2, 3, 4)), ((24, 3, 8), (3, 1, 8))]
)
def test_an_effective_batch_is_workers_times_accumulation_times_micro_batch(arguments, shape):
    cut = cut_batch(*arguments)
    assert (cut.workers, cut.accumulation, cut.micro_batch) == shape and cut.batch_size == 24


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((24, 5, None), "training.batch_size=24 cannot be shared by 5 workers"),
        ((24, 2, 5), "micro_batch=5 does not divide a worker's share of 12 samples"),
        ((24, 2, 24), "micro_batch=24 does not divide a worker's share of 12"),
    ],
)
def test_a_batch_that_cannot_be_cut_evenly_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        cut_batch(*arguments)


@pytest.mark.parametrize(("workers", "micro"), [(1, 24), (1, 4), (2, None), (3, 2)])
def test_a_measurement_sees_the_same_samples_and_noise_however_it_is_cut_and_whenever_it_is_made(workers, micro):
    shape = cut_batch(24, workers, micro)
    feeds = [Batches(SPLIT, shape, 0, 1, rank, CPU) for rank in range(workers)]
    for _ in range(2):
        cuts = [cut for batches in feeds for cut in batches.fixed(SPLIT)]
        assert {len(positions) for _, _, positions in cuts} == {shape.micro_batch}
        labels = torch.cat([batch["label"] for batch, _, _ in cuts])
        assert (
            torch.cat([p for _, _, p in cuts]).tolist() == list(range(len(labels))) and len(set(labels.tolist())) > 23
        )
        assert labels.tolist() == [position * 50 // len(labels) for position in range(len(labels))]
        assert len({int(key) for _, key, _ in cuts}) == 1
    training_key = next(iter(feeds[0].micro_batches(0)))[1]
    assert int(cuts[0][1]) != int(training_key)


def test_a_validation_split_that_is_smaller_than_a_batch_is_seen_more_than_once():
    few = SPLIT.part(0, 7)
    (batch, _, _) = next(iter(Batches(SPLIT, cut_batch(24, 1, None), 0, 1, 0, CPU).fixed(few)))
    assert sorted(set(batch["label"].tolist())) == list(range(7)) and len(batch["label"]) == 24
