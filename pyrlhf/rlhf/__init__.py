"""The algorithm: losses, KL, and experience, step by step."""

from pyrlhf.rlhf.experience import Experience, Responses
from pyrlhf.rlhf.kl import KLController, kl_estimate
from pyrlhf.rlhf.losses import RankedBatch, language_model_loss, response_rows, reward_model_loss, whiten

__all__ = [
    "Experience",
    "KLController",
    "RankedBatch",
    "Responses",
    "kl_estimate",
    "language_model_loss",
    "response_rows",
    "reward_model_loss",
    "whiten",
]
