"""Settings that cannot work are refused when they are made, by name."""

from __future__ import annotations

from typing import Any

import pytest

from pyrlhf.stages import GenerateConfig, PPOConfig, PretrainConfig, RewardConfig, SFTConfig

WRONG: list[tuple[type, dict[str, Any], str]] = [
    *(
        (PPOConfig, {name: 0}, name)
        for name in ("updates", "batch_size", "samples_per_prompt", "minibatches", "epochs")
    ),
    *((PPOConfig, {name: 0}, name) for name in ("max_prompt_tokens", "max_new_tokens", "ptx_per_episode", "clip")),
    *((PPOConfig, {name: -1.0}, name) for name in ("kl_coef", "entropy_coef", "ptx_coef", "ema_decay", "lam", "gamma")),
    *((PPOConfig, {name: -1}, name) for name in ("critic_warmup", "eval_every", "sample_every", "save_every")),
    *((PPOConfig, {name: 0.0}, name) for name in ("temperature", "value_clip", "reward_clip", "rollout_correction")),
    *((PPOConfig, {name: 1.5}, name) for name in ("gamma", "lam", "ema_decay")),
    *((PPOConfig, {name: "nonsense"}, name) for name in ("truncated", "kl_penalty", "too_long", "keep")),
    (PPOConfig, {"dual_clip": 1.0}, "dual_clip"),
    (PPOConfig, {"ptx_tokens": 1}, "ptx_tokens"),
    (PPOConfig, {"kl_coef": float("nan")}, "kl_coef"),
    (PPOConfig, {"kl_target": 0.0}, "kl_target"),
    (PPOConfig, {"kl_horizon": 0}, "kl_horizon"),
    (PPOConfig, {"batch_size": 10, "samples_per_prompt": 4}, "batch_size"),
    (PPOConfig, {"batch_size": 4, "minibatches": 5}, "minibatches"),
    (PPOConfig, {"updates": 3, "critic_warmup": 3}, "critic_warmup"),
    *(
        (config, {name: 0}, name)
        for config in (PretrainConfig, SFTConfig, RewardConfig)
        for name in ("epochs", "batch_size")
    ),
    *((config, {"save_every": -1}, "save_every") for config in (PretrainConfig, SFTConfig, RewardConfig)),
    (PretrainConfig, {"context": 1}, "context"),
    (SFTConfig, {"max_new_tokens": 0}, "max_new_tokens"),
    (RewardConfig, {"calibrate": "gain"}, "calibrate"),
    *((GenerateConfig, {name: 0}, name) for name in ("count", "batch_size", "max_new_tokens")),
    (GenerateConfig, {"count": 5, "held_out": 5}, "held_out"),
]


@pytest.mark.parametrize(("config", "settings", "name"), WRONG)
def test_a_wrong_setting_is_named_with_what_was_found(config: type, settings: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}: expected .*found {settings[name]!r}"):
        config(**settings)


@pytest.mark.parametrize("config", [PPOConfig, PretrainConfig, SFTConfig, RewardConfig, GenerateConfig])
def test_the_defaults_are_allowed(config: type) -> None:
    config()
