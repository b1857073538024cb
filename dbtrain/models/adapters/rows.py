"""The architectures that are made of stacks of our own."""

from dbtrain.models.adapters.adapted import adapted
from dbtrain.models.adapters.dit import DiTStack
from dbtrain.models.adapters.llama import LlamaStack
from dbtrain.models.adapters.vit import ViTStack
from dbtrain.models.adapters.wan import WanStack

HfViT = adapted(ViTStack)
HfDiT = adapted(DiTStack)
HfLlama = adapted(LlamaStack)
HfWan = adapted(WanStack)
