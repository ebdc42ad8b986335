"""The ops: packed tensors in, packed tensors out, a plain-PyTorch ``<op>_ref`` of the same signature beside each."""

from __future__ import annotations

from pyrlhf.ops.activation import activation, activation_ref
from pyrlhf.ops.attention import attention, attention_ref
from pyrlhf.ops.decode_attention import decode_attention, decode_attention_ref
from pyrlhf.ops.gae import gae, gae_ref
from pyrlhf.ops.layer_norm import layer_norm, layer_norm_ref
from pyrlhf.ops.linear import linear, linear_ref
from pyrlhf.ops.linear_logprob import linear_logprob, linear_logprob_ref
from pyrlhf.ops.packed_linear import PackedWeight, pack_weight, packed_linear, packed_linear_ref
from pyrlhf.ops.ppo_loss import PPOLoss, PPOStats, ppo_loss, ppo_loss_ref
from pyrlhf.ops.ranking_loss import RankingStats, ranking_loss, ranking_loss_ref
from pyrlhf.ops.rms_norm import rms_norm, rms_norm_ref
from pyrlhf.ops.rotary import rotary, rotary_ref
from pyrlhf.ops.sample import sample, sample_ref, sampled_logprob, sampled_logprob_ref
from pyrlhf.ops.write_kv import write_kv, write_kv_ref

__all__ = [
    "PPOLoss",
    "PPOStats",
    "PackedWeight",
    "RankingStats",
    "activation",
    "activation_ref",
    "attention",
    "attention_ref",
    "decode_attention",
    "decode_attention_ref",
    "gae",
    "gae_ref",
    "layer_norm",
    "layer_norm_ref",
    "linear",
    "linear_logprob",
    "linear_logprob_ref",
    "linear_ref",
    "pack_weight",
    "packed_linear",
    "packed_linear_ref",
    "ppo_loss",
    "ppo_loss_ref",
    "ranking_loss",
    "ranking_loss_ref",
    "rms_norm",
    "rms_norm_ref",
    "rotary",
    "rotary_ref",
    "sample",
    "sample_ref",
    "sampled_logprob",
    "sampled_logprob_ref",
    "write_kv",
    "write_kv_ref",
]
