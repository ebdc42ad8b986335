"""The one transformer, its heads and its checkpoints."""

from pyrlhf.model.config import ModelConfig, preset_names
from pyrlhf.model.heads import CausalLM, LMHead, ScalarHead, ScalarModel
from pyrlhf.model.transformer import Attend, PackedAttention, Transformer

__all__ = [
    "Attend",
    "CausalLM",
    "LMHead",
    "ModelConfig",
    "PackedAttention",
    "ScalarHead",
    "ScalarModel",
    "Transformer",
    "preset_names",
]
