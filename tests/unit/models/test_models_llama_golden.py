"""The parts of Llama's layer beside those of Hugging Face's transformers, with the same weights in both."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from dbtrain.models.llama import KVCache, LlamaBlock, SwiGLU, View, rotate

DIM, HEADS, HIDDEN, SLOTS = 24, 3, 40, 11
CONFIG = LlamaConfig(
    hidden_size=DIM,
    intermediate_size=HIDDEN,
    num_attention_heads=HEADS,
    num_key_value_heads=HEADS,
    num_hidden_layers=1,
    rms_norm_eps=1e-6,
    max_position_embeddings=4096,
    attn_implementation="eager",
)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def turns(x, positions):
    """Cosines and sines of transformers for these positions."""
    return LlamaRotaryEmbedding(CONFIG)(x, positions[None])


@pytest.mark.parametrize("start", [0, 1, 3000])
def test_rotary_positions_turn_as_in_llama(start):
    positions = torch.arange(start, start + SLOTS)
    q, k = normal(2, HEADS, SLOTS, DIM // HEADS), normal(2, HEADS, SLOTS, DIM // HEADS, seed=1)
    wanted = apply_rotary_pos_emb(q, k, *turns(q, positions))
    # at large positions the angles themselves are rounded
    close = CLOSE if start < 100 else {"rtol": 1e-3, "atol": 2e-3}
    torch.testing.assert_close(rotate(q, positions), wanted[0], **close)
    torch.testing.assert_close(rotate(k, positions), wanted[1], **close)


def test_the_first_pair_turns_fastest_and_by_one_radian_a_position():
    x = torch.zeros(1, 1, 1, 8)
    x[..., 0] = 1  # the pair of elements 0 and 4
    turned = rotate(x, torch.tensor([1]))[0, 0, 0]
    assert turned[0] == pytest.approx(0.5403023) and turned[4] == pytest.approx(0.8414710)  # cos 1, sin 1
    y = torch.zeros(1, 1, 1, 8)
    y[..., 3] = 1  # the slowest pair: 10,000^(-3/4) radians a position
    turned = rotate(y, torch.tensor([1]))[0, 0, 0]
    assert turned[7] == pytest.approx(0.001, rel=1e-5)


def test_rms_norm_is_that_of_llama():
    ours, theirs = nn.RMSNorm(DIM, eps=1e-6, elementwise_affine=False), LlamaRMSNorm(DIM, eps=1e-6)
    layer = LlamaBlock(DIM, HEADS, HIDDEN, 8)
    for x in (normal(2, SLOTS, DIM), 1e-4 * normal(2, SLOTS, DIM), 100 + normal(2, SLOTS, DIM)):
        for norm in (ours, layer.norm1, layer.norm2):
            torch.testing.assert_close(norm(x), theirs(x), **CLOSE)


def swiglu(theirs, ours):
    ours.gate_in.weight.copy_(torch.cat([theirs.gate_proj.weight, theirs.up_proj.weight]))
    ours.out.weight.copy_(theirs.down_proj.weight)


@torch.no_grad()
def test_swiglu_is_that_of_llama():
    torch.manual_seed(0)
    theirs, ours = LlamaMLP(CONFIG), SwiGLU(DIM, HIDDEN)
    swiglu(theirs, ours)
    x = normal(2, SLOTS, DIM)
    torch.testing.assert_close(ours(x), theirs(x), **CLOSE)


@pytest.fixture
def layers():
    """Llama's layer of transformers, and ours with its weights, whose gates let everything through unscaled."""
    torch.manual_seed(0)
    theirs, ours = LlamaDecoderLayer(CONFIG, 0).eval(), LlamaBlock(DIM, HEADS, HIDDEN, 8).eval()
    with torch.no_grad():
        attention = theirs.self_attn
        ours.attention.qkv.weight.copy_(
            torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
        )
        ours.attention.out.weight.copy_(attention.o_proj.weight)
        swiglu(theirs.mlp, ours.mlp)
        ours.modulation.bias.view(4, DIM)[[1, 3]] = 1.0
    return theirs, ours


@torch.no_grad()
@pytest.mark.parametrize("start", [0, 5])
def test_a_whole_layer_is_that_of_llama(layers, start):
    theirs, ours = layers
    x, positions = normal(2, SLOTS, DIM), torch.arange(start, start + SLOTS)
    blind = torch.full((SLOTS, SLOTS), -torch.inf).triu(1)[None, None]
    wanted = theirs(x, attention_mask=blind, position_embeddings=turns(x, positions))
    wanted = wanted[0] if isinstance(wanted, tuple) else wanted
    found = ours(x, torch.zeros(2, SLOTS, 8), View(positions, None, True, SLOTS))
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert (wanted - x).abs().max() > 0.01, "the layer does something"


@torch.no_grad()
def test_with_a_cache_slot_by_slot_it_is_too(layers):
    theirs, ours = layers
    x, cache, found = normal(2, SLOTS, DIM), KVCache(), []
    for slot in range(SLOTS):
        view = View(torch.tensor([slot]), None, False, 1)
        found.append(ours(x[:, slot : slot + 1], torch.zeros(2, 1, 8), view, cache))
        cache.length += 1
    blind = torch.full((SLOTS, SLOTS), -torch.inf).triu(1)[None, None]
    wanted = theirs(x, attention_mask=blind, position_embeddings=turns(x, torch.arange(SLOTS)))
    torch.testing.assert_close(torch.cat(found, dim=1), wanted[0] if isinstance(wanted, tuple) else wanted, **CLOSE)
