"""One PPO update: responses, scores, log-probs and values, advantages, epochs of training; against TRL's PPOTrainer.

    python bench_ppo.py [float32 | bfloat16] [--rounds N] [--prompts N] [--new-tokens N] [--epochs N] [--microbatch N ...]

GPT-2-like models of 4 layers, width 256, vocabulary 8192, random weights made on the spot: policy, reference, critic and
reward model are all of that size, and TRL reads the same files. 64 prompts of 32 tokens, 64 new tokens each (nothing ends
a response), 4 epochs of one minibatch. Ours are the stage's own functions, with the numbers that it reports. TRL 0.24 with
transformers 4.57.6 runs in the interpreter that PYRLHF_BENCH_PEERS names (see peers/README.md), in float32 or with its
bfloat16 autocast, with all prompts in one forward of its training and with 8, its fastest in float32 (smaller temporaries):
--microbatch is its per_device_train_batch_size.

Targets on 2 cores: 3 times faster than TRL in float32, 3.5 times in bfloat16. Seen there: 25.6 s and 18.7 s an update of TRL.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from common import Candidate, NotMeasured, in_peers, report

from pyrlhf import CausalLM, ModelConfig
from pyrlhf.data import Tokenizer
from pyrlhf.engine import EngineConfig, init_world
from pyrlhf.model import ScalarModel
from pyrlhf.stages.actors import Actors, make_actors, respond
from pyrlhf.stages.loop import Stopwatch
from pyrlhf.stages.ppo import PPOConfig, describe, make_experience, update

PROMPT_TOKENS = 32
SHORT = {"float32": "fp32", "bfloat16": "bf16"}


def make_models(folder: Path) -> ModelConfig:
    config = ModelConfig(vocab_size=8192, hidden_size=256, num_layers=4, num_heads=4)
    CausalLM(config, seed=0).save_pretrained(folder / "policy")
    ScalarModel(config, seed=1).save_pretrained(folder / "reward")
    return config


def make(folder: Path, config: PPOConfig, dtype: str) -> Actors:
    engine = EngineConfig(device="cpu", dtype=SHORT[dtype])  # type: ignore[arg-type]
    actors = make_actors(
        config,
        policy=folder / "policy",
        reference=folder / "policy",
        reward=folder / "reward",
        longest_prompt=PROMPT_TOKENS,
        tokenizer=Tokenizer.train(["no text is read or written here"], 258),
        engine=engine,
        seed=0,
        world=init_world(engine),
    )
    return replace(actors, sampling=replace(actors.sampling, stop_ids=(), eos_id=-1))


def ours(actors: Actors, prompts: list[list[int]], config: PPOConfig) -> Candidate:
    """One update a run, as the stage does it; beside it the milliseconds of its phases."""
    extra: dict[str, float] = {}
    numbers = itertools.count()

    def run() -> None:
        step, watch = next(numbers), Stopwatch()
        responses = respond(actors.policy, prompts, actors.sampling, first_id=step * config.batch_size)
        watch.lap("rollout")
        if responses.tokens != config.batch_size * config.max_new_tokens:
            raise RuntimeError(f"expected {config.max_new_tokens} tokens a response, found {responses.tokens} in all")
        experience = make_experience(actors, responses, config, kl_coef=config.kl_coef)
        watch.lap("experience")
        describe(experience)
        update(actors, experience, None, config, seed=0, step=step)
        watch.lap("training")
        extra.update({f"{name.partition('/')[2]}_ms": 1e3 * seconds for name, seconds in watch.numbers.items()})

    return Candidate(run, extra=extra)


def theirs(folder: Path, given: argparse.Namespace, microbatch: int, bf16: bool) -> Candidate:
    extra: dict[str, float] = {}
    sizes = {"prompts": given.prompts, "prompt-tokens": PROMPT_TOKENS, "new-tokens": given.new_tokens}
    sizes |= {"epochs": given.epochs, "minibatches": 1, "microbatch": microbatch}
    sizes |= {"threads": torch.get_num_threads()}
    options = [str(word) for name, value in sizes.items() for word in (f"--{name}", value)]
    run = in_peers("trl_ppo.py", folder, *options, *(["--bf16"] if bf16 else []))
    return Candidate(lambda: extra.update(run()), extra=extra)


def main(dtype: str, given: argparse.Namespace) -> None:
    config = PPOConfig(
        updates=10_000,  # more than are run
        batch_size=given.prompts,
        minibatches=1,
        epochs=given.epochs,
        max_new_tokens=given.new_tokens,
        truncated="score",
    )
    with tempfile.TemporaryDirectory() as name:
        folder, absent = Path(name), {}
        vocabulary = make_models(folder).vocab_size
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(vocabulary, (given.prompts, PROMPT_TOKENS), generator=generator).tolist()
        actors = make(folder, config, dtype)
        candidates = {"pyrlhf": ours(actors, prompts, config)}
        for microbatch in given.microbatch:
            peer = f"TRL 0.24{', bf16 autocast' if dtype == 'bfloat16' else ''}, {microbatch} in a forward"
            try:
                candidates[peer] = theirs(folder, given, microbatch, dtype == "bfloat16")
            except NotMeasured as why:
                absent[peer] = str(why)
        case = (
            f"4 layers, width 256, vocabulary {vocabulary}, {given.prompts} prompts of {PROMPT_TOKENS}, {given.new_tokens} new "
            f"tokens, {given.epochs} epochs, {dtype}"
        )
        report("ppo", case, candidates, "pyrlhf", absent=absent, rounds=given.rounds, warm=False)
        actors.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("dtypes", nargs="*", default=list(SHORT))
    parser.add_argument("--rounds", type=int, default=3, help="at least 2")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--microbatch", type=int, nargs="+", default=[64, 8], help="TRL's, divisors of --prompts")
    given = parser.parse_args()
    for dtype in given.dtypes:
        main(dtype, given)
