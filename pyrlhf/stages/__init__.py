"""The stages of training, each a config and a loop: generate, pretrain, sft, reward, ppo."""

from pyrlhf.stages.generate import GenerateConfig, write_samples
from pyrlhf.stages.ppo import PPOConfig, train_ppo
from pyrlhf.stages.pretrain import PretrainConfig, train_pretrain
from pyrlhf.stages.reward import RewardConfig, train_reward
from pyrlhf.stages.sft import SFTConfig, train_sft

__all__ = [
    "GenerateConfig",
    "PPOConfig",
    "PretrainConfig",
    "RewardConfig",
    "SFTConfig",
    "train_ppo",
    "train_pretrain",
    "train_reward",
    "train_sft",
    "write_samples",
]
