"""Small originals of other libraries, saved and loaded as their users do, and our models of them."""

import torch
from torch import nn

from dbtrain.method.flow import FlowNoise
from dbtrain.method.gaussian import GaussianNoise
from dbtrain.method.levels import LogNormal
from dbtrain.method.noise_processes import noise_process
from dbtrain.method.parametrisation import PARAMETRISATIONS
from dbtrain.models.registry import architecture

DEPTH, CLASSES, VOCABULARY, SIDE = 3, 10, 27, 8
VIT = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "patch_size": 4}
DIT = {"num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 2, "out_channels": 2}
WAN = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 24, "text_dim": 8, "freq_dim": 16}
LLAMA = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24}
SETTINGS = {
    "hf_vit": {**VIT, "num_hidden_layers": DEPTH},
    "hf_dit": {**DIT, "num_layers": DEPTH},
    "hf_wan": {**WAN, "num_layers": DEPTH},
    "hf_wan_text": {**WAN, "num_layers": DEPTH},
    "hf_wan_film": {**WAN, "num_layers": DEPTH, "patch_size": [1, 2, 2]},
    "hf_llama": {**LLAMA, "num_hidden_layers": DEPTH, "bos_token_id": 1},
    "hf_llama_tied": {**LLAMA, "num_hidden_layers": DEPTH, "tie_word_embeddings": True},
}
CASES = tuple(SETTINGS)
TOKENS = 5
TEXT = (TOKENS, WAN["text_dim"])
"""Of the cases with captions; those of `hf_wan_film` are of videos of two frames."""
SHAPES = {"hf_wan_text": (1, SIDE, SIDE), "hf_wan_film": (1, 2, SIDE, SIDE)}


def arch_of(case: str) -> str:
    return case.removesuffix("_tied").removesuffix("_text").removesuffix("_film")


def original(case, folder, seed=0, **sizes):
    """A random network of the library's own class, after save_pretrained and from_pretrained."""
    torch.manual_seed(seed)
    network = _made(case, sizes)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    network.save_pretrained(folder)
    return type(network).from_pretrained(folder).eval()


def _made(case, sizes):
    settings = {**SETTINGS[case], **sizes}
    if case == "hf_vit":
        from transformers import ViTConfig, ViTForImageClassification

        data = {"image_size": SIDE, "num_channels": 1, "num_labels": CLASSES}
        return ViTForImageClassification(ViTConfig(**{**data, **settings}))
    if case in ("hf_llama", "hf_llama_tied"):
        from transformers import LlamaConfig, LlamaForCausalLM

        return LlamaForCausalLM(LlamaConfig(**{"vocab_size": VOCABULARY, **settings}))
    import diffusers

    if case == "hf_dit":
        data = {"in_channels": 1, "sample_size": SIDE, "num_embeds_ada_norm": CLASSES}
        return diffusers.DiTTransformer2DModel(**{**data, **settings})
    return diffusers.WanTransformer3DModel(**{"in_channels": 1, "out_channels": 1, **settings})


def block(case, layers=None, settings=None, parametrisation=None, device="cpu", **arguments):
    """A block's model, with the layers that it is told to hold."""
    kind = architecture(arch_of(case))
    keys = kind.completed({"arch": arch_of(case), "config": SETTINGS[case] if settings is None else settings})
    flow = kind.natural_noise == "flow"
    noise = _noise(kind, flow)
    name = kind.natural_parametrisation
    name = noise_process("flow").parametrisations[name] if flow else name
    own = parametrisation or PARAMETRISATIONS[name](0.5, "unit")
    outside = {"image": (1, SIDE, SIDE), "classes": CLASSES, "vocabulary": VOCABULARY}
    if case in SHAPES:
        outside = {"image": SHAPES[case], "text": TEXT}
    given = {"noise": noise, "parametrisation": own, **kind.from_shape(outside)}
    torch.manual_seed(1)
    if kind.codes:
        given["codebook"] = nn.functional.normalize(torch.randn(outside[kind.codes], 8), dim=1)
    keys = {name: value for name, value in keys.items() if name != "arch"}
    with torch.device(device):
        return kind(**keys, **given, layers=layers, **arguments)


def _noise(kind, flow):
    from dbtrain.method.flow import LogitNormal

    if flow:
        return FlowNoise(LogitNormal(0.0, 1.0, 1.0))
    return GaussianNoise(LogNormal(-1.2, 1.2, 0.0101, 80.0), 0.5, per_position=kind.per_position)


def batch(case):
    """Four samples of what the class is trained on."""
    torch.manual_seed(2)
    if case.startswith("hf_llama"):
        return {"tokens": torch.randint(VOCABULARY, (4, 12))}
    if case in SHAPES:
        mask = torch.arange(TOKENS) < torch.tensor([5, 2, 4, 1])[:, None]
        return {"image": torch.randn(4, *SHAPES[case]), "text": torch.randn(4, *TEXT), "mask": mask}
    return {"image": torch.randn(4, 1, SIDE, SIDE), "label": torch.tensor([3, 7, 0, 9])}
