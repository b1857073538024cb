import hashlib
import json
import math
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from dbtrain.errors import ShardError
from dbtrain.shards.format import (
    Identity,
    check_identity,
    decode,
    decode_codebook,
    encode_codebook,
    tensor_hash,
)
from dbtrain.shards.format import encode as encode_content
from dbtrain.shards.safetensors_file import as_file
from dbtrain.shards.side_by_side import content_sha256
from dbtrain.shards.storage import content

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.uint8, torch.bool]


def encode(*given):
    """A whole shard file in memory."""
    return encode_content(*given)[:]


def refused(data, match="."):
    with pytest.raises(ShardError, match=match) as caught:
        decode(data, where="w.safetensors")
    assert "\n" not in str(caught.value) and "w.safetensors" in str(caught.value)
    return str(caught.value)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=5),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=5, max_size=5),
    step=st.integers(0, 2**40),
    run=st.text(st.characters(blacklist_categories=("Cs",)), min_size=1, max_size=10),
    role=st.sampled_from(["model", "ema", "optim"]),
    seed=st.integers(0, 2**31),
)
def test_round_trip(make, shapes, dtypes, step, run, role, seed):
    generator = torch.Generator().manual_seed(seed)
    prefix = "exp_avg/" if role == "optim" else ""
    tensors = {
        f"{prefix}layers.{2 + i % 2}.p{i}": torch.randint(0, 256, shape, generator=generator).to(dtype)
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=False))
    }
    who = make.identity(run=run)
    data = encode(tensors, who, step, role)
    assert data == encode(dict(reversed(tensors.items())), who, step, role)
    shard = decode(data, where="w")
    assert (shard.identity, shard.step, shard.role) == (who, step, role)
    assert make.same(shard.tensors, tensors)
    assert load(data).keys() == tensors.keys()


OLD_BYTES = (8031, "686b211bad7e60465dc0da1ae9f2128ac1a86e55c25589fabbba764879f0f8c9")
OLD_BYTES_OF_SIZES = (5416, "dc80fc9b9541f286dde95fce7eaf041c2b5476ea769a82e2b5c2978a6d6af2a6")
"""Size and SHA-256 of two files as version 0.2 wrote them, which packed a file in memory by the library."""
KINDS = [
    "bool uint8 int8 int16 float16 bfloat16 int32 float32 float64 int64",
    "float8_e4m3fn float8_e5m2 uint16 uint32 uint64 complex64",
]


def test_the_bytes_are_those_that_the_versions_before_wrote(make):
    kinds = [getattr(torch, kind) for kind in " ".join(KINDS).split()]
    shapes = [(3, 5), (), (0, 2), (7,)]
    tensors = {
        f"exp_avg/layers.{2 + j % 2}.größe.{(7 * i + j) % 11}.{i}": (torch.arange(math.prod(shape)) % 2)
        .to(kind)
        .reshape(shape)
        for i, kind in enumerate(kinds)
        for j, shape in enumerate(shapes)
    }
    many = {f"layers.2.w{i}": torch.linspace(-1, 1, 15 * i).reshape(3, 5, i) for i in range(1, 12)}
    for data, old in (
        (encode(tensors, make.identity(), 7, "optim"), OLD_BYTES),
        (encode(many, make.identity(), 20000, "model"), OLD_BYTES_OF_SIZES),
    ):
        assert (len(data), hashlib.sha256(data).hexdigest()) == old
    assert make.same(decode(encode(tensors, make.identity(), 7, "optim"), where="w").tensors, tensors)
    assert load(encode(many, make.identity(), 20000, "model")).keys() == many.keys()


def test_a_file_in_pieces_is_the_file(make, monkeypatch):
    """However it is taken: in order, by place with the head last, or by slices that do not divide it evenly."""
    monkeypatch.setattr(content, "PIECE", 37)
    made = encode_content({f"layers.2.w{i}": torch.rand(3, i) for i in range(5)}, make.identity(), 1, "model")
    data, by_place = made[:], bytearray(len(made))
    places = []
    for at, piece in made.as_known():
        by_place[at : at + len(piece)] = piece
        places.append(at)
    assert places[-1] == 0 and places[0] > 0
    assert bytes(by_place) == b"".join(made.in_order()) == data
    assert b"".join(made[at : at + 101] for at in range(0, len(made), 101)) == data
    assert content_sha256(made) == hashlib.sha256(data).hexdigest()


def test_nan_payload_and_strides_survive(make):
    bits = torch.tensor([0x7FC00001, -1, 0x7F800000], dtype=torch.int32).view(torch.float32)
    wide = torch.arange(12.0).reshape(3, 4).t()
    tied = torch.arange(4.0)
    tensors = {"layers.2.a": bits, "layers.2.b": wide, "layers.2.c": tied, "layers.3.c": tied}
    found = decode(encode(tensors, make.identity(), 1, "model"), where="w").tensors
    assert torch.equal(found["layers.2.a"].view(torch.int32), bits.view(torch.int32))
    assert torch.equal(found["layers.2.b"], wide) and torch.equal(found["layers.3.c"], tied)


def test_bytes_do_not_depend_on_the_process(tmp_path):
    code = (
        "import torch,hashlib\nfrom dbtrain.shards.format import *\n"
        "i=Identity('r',0,1,(0,9),((0.1).hex(),(2.0).hex()),'c','')\n"
        "t={f'layers.{k}.w':torch.full((2,),float(k)) for k in range(9)}\n"
        "print(sha256(encode(t,i,3,'model')[:]))"
    )
    hashes = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONPATH": ".", "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in (1, 2)
    }
    assert len(hashes) == 1 and len(hashes.pop()) == 65


@pytest.mark.parametrize(
    "changes",
    [
        {"block": 3},
        {"block": -1},
        {"blocks": 0},
        {"layers": (4, 4)},
        {"layers": (-1, 4)},
        {"run": ""},
        {"levels": ("0x1p1", "0x1p0")},
        {"levels": ("-0x1p0", "0x1p0")},
        {"levels": ("nan", "0x1p0")},
        {"levels": ("0x1p0", "inf")},
        {"levels": ("zero", "one")},
    ],
)
def test_an_identity_is_valid(make, changes):
    with pytest.raises(ShardError, match=next(iter(changes)).removesuffix("s")):
        make.identity(**changes)


def test_the_difference_is_named_with_both_values(make):
    for field, value in {"run": "other", "architecture_hash": "d" * 64, "block": 2, "layers": (0, 9)}.items():
        with pytest.raises(ShardError) as caught:
            check_identity(make.identity(**{field: value}), make.identity(), "f.safetensors")
        text = str(caught.value)
        assert text.count(" is ") == 1 and field in text and repr(value) in text
        assert repr(getattr(make.identity(), field)) in text and "f.safetensors" in text
    assert check_identity(make.identity(), make.identity(), "f") is None


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("layers.4.w", "model"),
        ("layers.1.w", "model"),
        ("blocks.0.stem.w", "model"),
        ("stem.w", "model"),
        ("codebook.codes", "model"),
        ("layers.x.w", "model"),
        ("layers.2.w", "optim"),
        ("/layers.2.w", "optim"),
        ("exp_avg/layers.9.w", "optim"),
        ("layers.²", "model"),
    ],
)
def test_a_shard_holds_only_names_of_its_block(make, name, role):
    with pytest.raises(ShardError, match="tensor"):
        encode({name: torch.zeros(1)}, make.identity(), 1, role)


def test_bad_calls(make):
    good = {"layers.2.w": torch.zeros(2)}
    for step, role in ((-1, "model"), (True, "model"), (1, "weights")):
        with pytest.raises(ShardError, match="step"):
            encode(good, make.identity(), step, role)
    with pytest.raises(ShardError, match="dense"):
        encode({"layers.2.w": torch.eye(2).to_sparse()}, make.identity(), 1, "model")


def record(make, **changes):
    who = {k: getattr(make.identity(), k) for k in Identity.__dataclass_fields__}
    who |= changes.pop("identity", {})
    return {"kind": "shard", "step": 1, "role": "model", "identity": who, **changes}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"step": -1}, "step"),
        ({"step": "1"}, "step"),
        ({"step": True}, "step"),
        ({"role": "x"}, "role"),
        ({"kind": "codebook"}, "codebook"),
        ({"identity": {"layers": [1]}}, "layers"),
        ({"identity": {"layers": [4, 2]}}, "layers"),
        ({"identity": {"block": 1.0}}, "block"),
        ({"identity": {"levels": [1, 2]}}, "levels"),
        ({"identity": {"run": None}}, "run"),
        ({"identity": {"layers": [0, 1]}}, "not of block"),
    ],
)
def test_well_sealed_nonsense_is_refused(make, changes, match):
    refused(as_file({"layers.2.w": torch.zeros(2)}, record(make, **changes), "w")[:], match)


def test_missing_record_keys(make):
    for key in ("kind", "step", "role", "identity"):
        fields = record(make)
        del fields[key]
        refused(as_file({"layers.2.w": torch.zeros(2)}, fields, "w")[:], f"{key} is missing")


def test_pickles_and_zips_are_refused_by_name(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "m.pt")
    assert "zip" in refused((tmp_path / "m.pt").read_bytes(), "never reads those")
    for protocol in (2, 3, 4, 5):
        assert "pickle" in refused(pickle.dumps({"a": 1}, protocol=protocol), "never reads those")
    refused(pickle.dumps({"a": 1}, protocol=0))


def test_a_header_length_that_looks_like_a_pickle_is_read(make):
    # lengths 0x0280, 0x0380, ... begin with the bytes of a pickle
    seen = False
    for extra in range(0, 400, 8):
        who = make.identity(run="r" * (1 + extra))
        data = encode({"layers.2.w": torch.zeros(1)}, who, 1, "model")
        seen |= data[0] == 0x80 and data[1] in range(2, 6)
        assert decode(data, where="w").identity == who
    assert seen


def test_hostile_files(make):
    plain = save({"layers.2.w": torch.zeros(2)})
    refused(plain, "did not write it")
    refused(save({"layers.2.w": torch.zeros(2)}, {"format": "pt"}), "did not write it")
    refused(b"")
    refused(b"\xff" * 8)
    refused((2**63).to_bytes(8, "little") + b"{}", "header")
    refused((10).to_bytes(8, "little") + b"{}", "header")
    deep = b"[" * 200_000
    refused(len(deep).to_bytes(8, "little") + deep, "JSON")
    digits = b'{"a":' + b"9" * 9000 + b"}"
    refused(len(digits).to_bytes(8, "little") + digits)
    good = encode({"layers.2.a": torch.zeros(2), "layers.2.b": torch.ones(2)}, make.identity(), 1, "model")
    length = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + length])
    header["layers.2.b"]["data_offsets"] = [4, 12]  # overlaps layers.2.a
    text = json.dumps(header).encode()
    refused(len(text).to_bytes(8, "little") + text + good[8 + length :])
    refused(good[:-1])
    refused(good + b"\0")
    header = json.loads(good[8 : 8 + length])
    for change in (
        {"dtype": "F99"},
        {"shape": [2, True]},
        {"shape": [2**70, 0]},
        {"shape": [4]},
        {"data_offsets": [0]},
        {"data_offsets": [0, -8]},
        {"data_offsets": [8, 16]},
        {"more": 1},
    ):
        entry = {**header["layers.2.a"], **change}
        text = json.dumps({**header, "layers.2.a": entry}).encode()
        refused(len(text).to_bytes(8, "little") + text + good[8 + length :], "damaged")
    text = json.dumps({**header, "layers.2.a": {"dtype": "F32", "shape": [2**70, 0], "data_offsets": [0, 0]}}).encode()
    refused(len(text).to_bytes(8, "little") + text + good[8 + length :])


def test_version(make):
    good = encode({"layers.2.w": torch.zeros(2)}, make.identity(), 1, "model")
    from dbtrain.shards import safetensors_file as container

    container_version, container.FORMAT_VERSION = container.FORMAT_VERSION, 2
    try:
        refused(good, "version 1, this dbtrain reads 2")
    finally:
        container.FORMAT_VERSION = container_version


@pytest.mark.parametrize("flip", range(4))
def test_every_flipped_bit_is_noticed(make, flip):
    tensors = {"layers.2.a": torch.arange(4.0), "layers.3.b": torch.ones(2, dtype=torch.bfloat16)}
    good = encode(tensors, make.identity(), 7, "model")
    for place in range(flip, len(good), 4):
        bad = bytearray(good)
        bad[place] ^= 1 << (place % 8)
        try:
            shard = decode(bytes(bad), where="w")
        except ShardError:
            continue
        # only what has no meaning may change: blanks, the case of a hex digit in an escape, the format note
        assert (shard.identity, shard.step, shard.role) == (make.identity(), 7, "model")
        assert make.same(shard.tensors, tensors)


def test_codebook():
    codes = torch.randn(5, 3)
    assert torch.equal(decode_codebook(encode_codebook(codes), "c"), codes)
    assert tensor_hash(codes) == tensor_hash(codes.clone()) != tensor_hash(codes.reshape(3, 5))
    assert tensor_hash(codes) != tensor_hash(-codes) and len(tensor_hash(codes)) == 64
    for bad in (codes.double(), codes[0], codes[:0], codes / 0):
        with pytest.raises(ShardError, match="codebook"):
            encode_codebook(bad)


def test_a_shard_is_no_codebook_and_the_other_way(make):
    refused(encode_codebook(torch.ones(2, 2)), "codebook")
    with pytest.raises(ShardError, match="not a codebook"):
        decode_codebook(encode({"layers.2.w": torch.zeros(2)}, make.identity(), 1, "model"), "c")
