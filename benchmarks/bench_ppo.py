"""One PPO update: responses, scores, log-probs and values, advantages, epochs of training; against TRL's PPOTrainer.

    python bench_ppo.py [float32 | bfloat16] [--rounds N] [--prompts N] [--new-tokens N] [--epochs N] [--microbatch N ...]

GPT-2-like models of 4 layers, width 256, vocabulary 8192, random weights made on the spot: policy, reference, critic and
reward model are all of that size, and TRL reads the same files. 64 prompts of 32 tokens, 64 new tokens each (nothing ends
a response), 4 epochs of one minibatch. Ours are the stage's own functions, with the numbers that it reports. TRL 0.24 with
transformers 4.57.6 runs in the interpreter that PYRLHF_BENCH_PEERS names (see peers/README.md), in float32 or with its
bfloat16 autocast, with all prompts in one forward of its training and with 8, its fastest in float32 (smaller temporaries):
--microbatch is its per_device_train_batch_size.

Targets on 2 cores: 3 times faster than TRL in float32, 3.5 times in bfloat16. Seen there: 25.6 s and 18.7 s an update of TRL.

    python bench_ppo.py [--small]     # on a GPU; --small: tiny models, anywhere

There: four models of Llama 3.2 1B's shape, bfloat16 with float32 masters, 128 prompts of 256 tokens, 256 new tokens each, one epoch
of 4 minibatches, 8192 tokens in a forward; against transformers' generate and plain PyTorch (padded_ppo.py) with as many tokens in
a forward. Aims: 4 times as fast, in half the memory. Of both, masters, moments and weights are the same 16 bytes and more a weight.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from common import DEVICE, ON_GPU, Candidate, NotMeasured, in_peers, llama_shape, once, report, with_random_weights
from padded_ppo import PaddedPPO, Settings
from transformers import LlamaConfig

from pyrlhf import CausalLM, ModelConfig
from pyrlhf.data import Tokenizer
from pyrlhf.engine import EngineConfig, HybridEngine, ZeroEngine, init_world
from pyrlhf.model import ScalarModel
from pyrlhf.rollout import Sampling
from pyrlhf.stages.actors import Actors, make_actors, model_scores, respond
from pyrlhf.stages.loop import Stopwatch, forget_peak_memory, peak_memory_gib
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
    """One update a run, as the stage does it; beside it the milliseconds of its phases, and their memory in the first run."""
    extra: dict[str, float] = {}
    numbers = itertools.count()

    def run() -> None:
        forget_peak_memory()
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
        for name, value in watch.numbers.items():
            kind, _, phase = name.partition("/")
            if kind == "seconds":
                extra[f"{phase}_ms"] = 1e3 * value
            else:
                extra.setdefault(f"{phase}_gib", value)
        extra.setdefault("peak_gib", max(value for name, value in extra.items() if name.endswith("_gib")))

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


# -- on a GPU ----------------------------------------------------------------------------------------------------------------


def llama_config(config: ModelConfig) -> LlamaConfig:
    """The same shape for transformers."""
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_positions,
        tie_word_embeddings=config.tied_embeddings,
    )


def make_on_device(model: ModelConfig, config: PPOConfig, budget: int) -> Actors:
    """Actors with random weights, made where they stay."""
    engine = EngineConfig(device=DEVICE.type, dtype="bf16", tokens_per_microbatch=budget)  # type: ignore[arg-type]
    world = init_world(engine)
    policy, reference = (with_random_weights(CausalLM(model, dtype=torch.bfloat16, device="meta")) for _ in range(2))
    value, judge = (with_random_weights(ScalarModel(model, dtype=torch.bfloat16, device="meta")) for _ in range(2))
    reference.load_state_dict(policy.state_dict())
    value.load_state_dict(judge.state_dict())
    steps = config.updates * config.minibatches * config.epochs
    reward = ZeroEngine(judge, world, engine)
    return Actors(
        HybridEngine(policy, engine, config.policy_optimizer, steps, world=world),
        ZeroEngine(value, world, engine, config.critic_optimizer, steps),
        ZeroEngine(reference, world, engine),
        reward,
        model_scores(reward, Tokenizer.train(["no text is read or written here"], 258), budget),
        world,
        budget,
        Sampling(config.max_new_tokens, eos_id=-1),
    )


def padded_updates(
    model: ModelConfig, settings: Settings, prompts: list[list[int]], rounds: int
) -> tuple[list[float], float]:
    """Milliseconds of updates the usual way, and the peak memory of the one before them, which is not timed, as in `ours`."""
    ppo = PaddedPPO(llama_config(model), settings, DEVICE, torch.bfloat16)
    asked = torch.tensor(prompts, device=DEVICE)
    forget_peak_memory()
    ppo.update(asked)
    peak = peak_memory_gib()
    return [once(lambda: ppo.update(asked)) for _ in range(rounds)], peak


def on_gpu(given: argparse.Namespace) -> None:
    """The usual way first, in a process that is over before ours begins: each has all of the device's memory."""
    count, length, new_tokens, budget = (8, 8, 8, 64) if given.small else (128, 256, 256, 8192)
    model = llama_shape(given.small)
    config = PPOConfig(
        updates=10_000, batch_size=count, minibatches=4, max_new_tokens=new_tokens, truncated="score", ema_decay=0.0
    )
    prompts = torch.randint(model.vocab_size, (count, length), generator=torch.Generator().manual_seed(0)).tolist()
    settings = Settings(new_tokens, config.minibatches, budget // (length + new_tokens))
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as alone:
        seen, peak = alone.submit(padded_updates, model, settings, prompts, given.rounds).result()
    times = itertools.cycle(seen)
    actors = make_on_device(model, config, budget)
    own = ours(actors, prompts, config)
    own.run()
    own.extra["times_less_memory"] = peak / own.extra["peak_gib"]
    candidates = {
        "pyrlhf": own,
        "transformers and padded torch": Candidate(times.__next__, extra={"peak_gib": peak}, part=lambda ms: ms),
    }
    case = (
        f"Llama, width {model.hidden_size}, {model.num_layers} layers, vocabulary {model.vocab_size}, bf16, {count} prompts of "
        f"{length}, {new_tokens} new tokens, {config.minibatches} minibatches"
    )
    aims = {"transformers and padded torch": 4.0, "times_less_memory": 2.0}
    report("ppo", case, candidates, "pyrlhf", aims=aims, rounds=given.rounds, budget=60.0, warm=False)
    actors.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("dtypes", nargs="*", default=list(SHORT))
    parser.add_argument("--small", action="store_true", help="what a GPU measures, on tiny models")
    parser.add_argument("--rounds", type=int, default=3, help="at least 2")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--microbatch", type=int, nargs="+", default=[64, 8], help="TRL's, divisors of --prompts")
    given = parser.parse_args()
    if ON_GPU or given.small:
        on_gpu(given)
    else:
        for dtype in given.dtypes:
            main(dtype, given)
