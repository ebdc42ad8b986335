"""One PPO update as it is usually written, for bench_ppo.py: transformers and plain PyTorch, batches of one padded shape.

Four models of one Llama shape with random weights, bfloat16, the two that are trained with float32 masters: what pyrlhf's update
holds. Responses come from `generate` with its KV cache. Log-probs come from the logits of every position, advantages from a loop
over the tokens, gradients are accumulated over micro-batches. Prompts are as long as each other and nothing ends a response, so
that not a token is padding: its best case.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel


@dataclass(frozen=True)
class Settings:
    """Of PPO, with the meaning that they have in `pyrlhf.stages.PPOConfig`."""

    new_tokens: int
    minibatches: int
    microbatch: int  # sequences of a forward
    kl_coef: float = 0.02
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2
    value_clip: float = 0.2
    lr: float = 1e-5
    max_grad_norm: float = 1.0


class Scalar(nn.Module):
    """The trunk with one number a token."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.trunk, self.head = LlamaModel(config), nn.Linear(config.hidden_size, 1)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        hidden = self.trunk(tokens, attention_mask=mask, use_cache=False).last_hidden_state
        return self.head(hidden).squeeze(-1).float()


class Trained:
    """AdamW on float32 masters of a bfloat16 model."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self.model, self.limit = model, settings.max_grad_norm
        self.masters = [p.detach().float() for p in model.parameters()]
        self.optimizer = torch.optim.AdamW(self.masters, lr=settings.lr, betas=(0.9, 0.95), eps=1e-5, fused=True)

    def step(self) -> None:
        for master, p in zip(self.masters, self.model.parameters(), strict=True):
            assert p.grad is not None
            master.grad, p.grad = p.grad.float(), None
        nn.utils.clip_grad_norm_(self.masters, self.limit)
        self.optimizer.step()
        with torch.no_grad():
            for master, p in zip(self.masters, self.model.parameters(), strict=True):
                p.copy_(master)
                master.grad = None


class PaddedPPO:
    def __init__(self, config: LlamaConfig, settings: Settings, device: torch.device, dtype: torch.dtype) -> None:
        self.settings = settings
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                self.policy, self.reference = LlamaForCausalLM(config), LlamaForCausalLM(config)
                self.critic, self.reward = Scalar(config), Scalar(config)
        finally:
            torch.set_default_dtype(before)
        self.reference.load_state_dict(self.policy.state_dict())
        self.critic.load_state_dict(self.reward.state_dict())
        for model in (self.reference, self.reward):
            model.requires_grad_(False).eval()
        self.trained = [Trained(model, settings) for model in (self.policy, self.critic)]
        self.policy.generation_config.eos_token_id = None

    def update(self, prompts: Tensor) -> float:
        """One update on prompts int64 [B, P]; returns the sum of its minibatches' losses."""
        start, how = prompts.shape[1], self.settings
        with torch.no_grad():
            tokens = self.respond(prompts)
            old, ref, values, scores = (
                torch.cat(parts)
                for parts in zip(*(self.look(t, start) for t in tokens.split(how.microbatch)), strict=True)
            )
        rewards = -how.kl_coef * (old - ref)
        rewards[:, -1] += scores
        advantages = self.advantages(rewards, values)
        returns = advantages + values
        losses = []
        for chosen in torch.randperm(len(tokens), device=tokens.device).chunk(how.minibatches):
            whitened = (advantages[chosen] - advantages[chosen].mean()) * (advantages[chosen].var() + 1e-8).rsqrt()
            data = (tokens[chosen], old[chosen], values[chosen], whitened, returns[chosen])
            for micro in zip(*(x.split(how.microbatch) for x in data), strict=True):
                loss = self.loss(*micro, start) * (len(micro[0]) / len(chosen))
                loss.backward()
                losses.append(loss.detach())
            for trained in self.trained:
                trained.step()
        return float(torch.stack(losses).sum())

    def respond(self, prompts: Tensor) -> Tensor:
        how = {
            "do_sample": True,
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 1.0,
            "max_new_tokens": self.settings.new_tokens,
        }
        self.policy.eval()
        tokens = self.policy.generate(prompts, attention_mask=torch.ones_like(prompts), pad_token_id=0, **how)
        self.policy.train()
        if tokens.shape[1] != prompts.shape[1] + self.settings.new_tokens:
            raise RuntimeError(
                f"expected {self.settings.new_tokens} new tokens, found {tokens.shape[1] - prompts.shape[1]}"
            )
        return tokens

    def look(self, tokens: Tensor, start: int) -> tuple[Tensor, ...]:
        """Log-probs of policy and reference and values [b, N], and the score of each [b]."""
        mask = torch.ones_like(tokens)
        logprobs = [self.logprobs(model, tokens, mask, start) for model in (self.policy, self.reference)]
        return *logprobs, self.critic(tokens, mask)[:, start - 1 : -1], self.reward(tokens, mask)[:, -1]

    def logprobs(self, model: nn.Module, tokens: Tensor, mask: Tensor, start: int) -> Tensor:
        logits = model(tokens, attention_mask=mask, use_cache=False).logits[:, start - 1 : -1]
        return logits.float().log_softmax(-1).gather(2, tokens[:, start:, None])[..., 0]

    def advantages(self, rewards: Tensor, values: Tensor) -> Tensor:
        how, steps, last = self.settings, [], torch.zeros_like(rewards[:, 0])
        for t in reversed(range(rewards.shape[1])):
            following = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
            last = rewards[:, t] + how.gamma * following - values[:, t] + how.gamma * how.lam * last
            steps.append(last)
        return torch.stack(steps[::-1], dim=1)

    def loss(
        self, tokens: Tensor, old: Tensor, old_values: Tensor, advantages: Tensor, returns: Tensor, start: int
    ) -> Tensor:
        how, mask = self.settings, torch.ones_like(tokens)
        logprobs = self.logprobs(self.policy, tokens, mask, start)
        values = self.critic(tokens, mask)[:, start - 1 : -1]
        ratio = (logprobs - old).exp()
        policy = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - how.clip, 1 + how.clip)).mean()
        near = values.clamp(old_values - how.value_clip, old_values + how.value_clip)
        return policy + 0.5 * torch.max((values - returns) ** 2, (near - returns) ** 2).mean()
