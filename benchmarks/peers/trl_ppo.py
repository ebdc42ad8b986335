"""TRL's PPOTrainer on the CPU; one update a line (see channel.py).

    python trl_ppo.py FOLDER --prompts N --prompt-tokens N --new-tokens N --epochs N --minibatches N --microbatch N --threads N [--bf16]

FOLDER/policy is a causal model, FOLDER/reward a model of one label: policy and reference start from the one, reward model
and value model from the other. Responses have no stop token, so all of them are as long as they can be, and prompts are as
long as each other: nothing is padded. An update ends where the trainer calls `on_step_end`, after its own statistics.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from typing import Any

import torch
import trl.trainer.ppo_trainer as ppo
from channel import Channel
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl import PPOConfig, PPOTrainer

UPDATES = 1000  # more than anybody asks for


class Watch(TrainerCallback):
    """Waits before each update until it is asked for and answers when it is over; knows what generation took of it."""

    def __init__(self, channel: Channel) -> None:
        self.channel, self.generation = channel, 0.0
        generate = ppo.batch_generation

        def timed(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            out = generate(*args, **options)
            self.generation = time.perf_counter() - began
            return out

        ppo.batch_generation = timed

    def on_train_begin(self, *args: Any, **options: Any) -> None:
        self.channel.wait()

    def on_step_end(self, *args: Any, **options: Any) -> None:
        self.channel.answer(rollout_ms=1e3 * self.generation)
        self.channel.wait()


def tokenizer(size: int) -> PreTrainedTokenizerFast:
    """The trainer asks for one; the last id pads, the one before it would end a sequence."""
    words = WordLevel({str(i): i for i in range(size)}, unk_token="0")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), unk_token="0", eos_token=str(size - 2), pad_token=str(size - 1)
    )


def main(given: argparse.Namespace) -> None:
    channel = Channel()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    policy, reference = (AutoModelForCausalLM.from_pretrained(f"{given.folder}/policy") for _ in range(2))
    reward, value = (AutoModelForSequenceClassification.from_pretrained(f"{given.folder}/reward") for _ in range(2))
    size = policy.config.vocab_size
    prompts = torch.randint(size - 2, (given.prompts, given.prompt_tokens)).tolist()
    data = Dataset.from_dict({"input_ids": prompts})
    with tempfile.TemporaryDirectory() as folder:
        settings = PPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=given.bf16,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            num_sample_generations=0,
            gradient_checkpointing=False,
            total_episodes=UPDATES * given.prompts,
            per_device_train_batch_size=given.microbatch,
            gradient_accumulation_steps=given.prompts // given.microbatch,
            num_mini_batches=given.minibatches,
            num_ppo_epochs=given.epochs,
            local_rollout_forward_batch_size=given.prompts,
            response_length=given.new_tokens,
            temperature=1.0,
            learning_rate=1e-5,
        )
        trainer = PPOTrainer(
            args=settings,
            processing_class=tokenizer(size),
            model=policy,
            ref_model=reference,
            reward_model=reward,
            value_model=value,
            train_dataset=data,
            eval_dataset=data,
            callbacks=[Watch(channel)],
        )
        trainer.train()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    for name in ("prompts", "prompt-tokens", "new-tokens", "epochs", "minibatches", "microbatch", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--bf16", action="store_true")
    main(parser.parse_args())
