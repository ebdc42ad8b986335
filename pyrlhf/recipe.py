"""A run from one YAML file: its stages in order, finished ones skipped, an interrupted one resumed, and round again.

Every stage has a folder with ``started.json`` (what it was asked to do) and, once finished, ``done.json`` (its result).
Both hold a digest of everything that the stage depends on, so a changed recipe never mixes with old results.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from pyrlhf.data import DataConfig, Tokenizer, read_texts
from pyrlhf.engine import EngineConfig, World, init_world
from pyrlhf.metrics import Metrics
from pyrlhf.model import CausalLM, ModelConfig, preset_names
from pyrlhf.report import write_report
from pyrlhf.rounds import RankingConfig, collect_rankings, load_labeller
from pyrlhf.settings import SettingsError, load_settings, plain
from pyrlhf.stages.generate import GenerateConfig, write_samples
from pyrlhf.stages.ppo import PPOConfig, train_ppo
from pyrlhf.stages.pretrain import PretrainConfig, train_pretrain
from pyrlhf.stages.reward import RewardConfig, train_reward
from pyrlhf.stages.sft import SFTConfig, train_sft
from pyrlhf.terminal import is_main_process, say

Stage = Literal["generate", "pretrain", "sft", "reward", "ppo"]
STAGES: tuple[str, ...] = get_args(Stage)


class RunError(RuntimeError):
    """A run that cannot go on; the message says what to do."""


@dataclass
class ModelSource:
    """The start model; exactly one of these.

    Args:
        path: Hugging Face folder.
        preset: name of a published shape (gpt2, gpt3-small, llama-...), with new weights.
        config: fields of pyrlhf.ModelConfig, with new weights; vocab_size and special tokens come from the tokenizer.
    """

    path: str = ""
    preset: str = ""
    config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.preset and self.preset not in preset_names():
            near = difflib.get_close_matches(self.preset, preset_names(), n=1)
            raise ValueError(
                f"preset: expected one of {', '.join(preset_names())}, found {self.preset!r}{_meant(near)}"
            )
        names = [f.name for f in dataclasses.fields(ModelConfig)]
        for name in self.config:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                raise ValueError(f"config: unknown field {name!r}{_meant(near)}")

    @property
    def given(self) -> list[str]:
        return [name for name in ("path", "preset", "config") if getattr(self, name)]


@dataclass
class TokenizerConfig:
    """The tokenizer; by default the start model's.

    Args:
        path: Hugging Face folder.
        train: texts to train a byte-level BPE on.
        vocab_size: tokens of a tokenizer that is trained.
        add_bos: whether prompts begin with BOS; "auto" does as the tokenizer does by itself.
    """

    path: str = ""
    train: DataConfig | None = None
    vocab_size: int = 2048
    add_bos: Literal["auto"] | bool = "auto"

    def __post_init__(self) -> None:
        if self.path and self.train is not None:
            raise ValueError("give `path` or `train`, not both")


@dataclass
class Recipe:
    """A run.

    Args:
        output: folder of everything that the run writes.
        stages: stages to run, in this order.
        seed: of all random choices.
        rounds: times to train the policy; each further round ranks its samples and trains reward model and policy on.
        labeller: "package.module:function" that gets (prompt: str, responses: list[str]) and returns a score for each
            response, higher better; the recipe's folder is searched too. Without one, a further round waits for a file
            of rankings made by people.
        tensorboard: also write TensorBoard events.
        ranking: the samples that are ranked between rounds.
        model: the start model.
        tokenizer: the tokenizer.
        engine: where and how models are trained.
        generate: the generate stage.
        pretrain: the pretrain stage.
        sft: the sft stage.
        reward: the reward stage.
        ppo: the ppo stage.
    """

    output: str
    stages: list[Stage]
    seed: int = 0
    rounds: int = 1
    labeller: str | None = None
    tensorboard: bool = False
    ranking: RankingConfig = field(default_factory=RankingConfig)
    model: ModelSource = field(default_factory=ModelSource)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)

    def __post_init__(self) -> None:
        if not self.stages or len(set(self.stages)) != len(self.stages):
            raise ValueError(f"stages: expected some of {', '.join(STAGES)}, each at most once, found {self.stages}")
        if len(self.model.given) != 1:
            found = " and ".join(self.model.given) or "none"
            raise ValueError(f"model: expected exactly one of path, preset and config, found {found}")
        if not self.model.path and not self.tokenizer.path and self.tokenizer.train is None:
            raise ValueError("tokenizer: a model with new weights needs tokenizer.path or tokenizer.train")
        if self.rounds < 1:
            raise ValueError(f"rounds: expected at least 1, found {self.rounds}")
        if self.rounds > 1 and not {"reward", "ppo"} <= set(self.stages):
            raise ValueError(f"rounds: {self.rounds} rounds need the stages reward and ppo, found {self.stages}")


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, with ``key=value`` overrides. Raises SettingsError listing every mistake."""
    folder = str(Path(path).absolute().parent)
    if folder not in sys.path:
        sys.path.append(folder)  # a labeller or reward function may lie beside its recipe
    return load_settings(Recipe, Path(path), overrides)


# ---- the plan -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One stage in one round; ``rank`` collects the rankings between rounds."""

    name: str
    round: int
    folder: Path

    @property
    def title(self) -> str:
        return self.name if self.round == 1 else f"{self.name} (round {self.round})"


def plan(recipe: Recipe) -> list[Step]:
    """The steps of a run, in order."""
    output = Path(recipe.output)
    steps = [Step(name, 1, output / f"{i:02d}-{name}") for i, name in enumerate(recipe.stages, 1)]
    for r in range(2, recipe.rounds + 1):
        steps += [Step(name, r, output / f"round-{r}" / name) for name in ("rank", "reward", "ppo")]
    return steps


@dataclass
class State:
    """What the finished steps have made so far.

    Attributes:
        base: the start model, or what pretraining or SFT made of it: what SFT, reward model and PPO start from.
        policy: PPO's newest result.
        reward: the newest reward model.
        rankings: all rankings so far, from the second round on.
        unfinished: the stage that should have made ``base`` but has not (when later stages are run alone).
    """

    base: Path | None = None
    policy: Path | None = None
    reward: Path | None = None
    rankings: Path | None = None
    unfinished: str = ""

    def after(self, step: Step, result: Path | None) -> None:
        if step.name in ("pretrain", "sft"):
            self.base = result
            self.unfinished = step.name if result is None else ""
        elif step.name == "reward":
            self.reward = result
        elif step.name == "rank":
            self.rankings = result
        elif step.name == "ppo":
            self.policy = result


def run_recipe(recipe: Recipe, only: str | None = None, *, fresh: bool = False) -> Path:
    """Run a recipe's stages that are not finished yet; returns the output folder.

    Args:
        recipe: what to run.
        only: run this stage alone, on what the earlier ones have left.
        fresh: forget what this run has made before (with ``only``: that stage and all after it).

    Raises:
        RunError: results in the output folder belong to other settings, or an input is missing.
        rounds.RankingsNeeded: people must rank a file before the next round.
    """
    if only is not None and only not in recipe.stages:
        raise SettingsError(f"stage `{only}` is not among the recipe's stages: {', '.join(recipe.stages)}")
    run = _Run(recipe)
    steps = plan(recipe)
    if fresh:
        run.forget(steps[[s.name for s in steps].index(only) :] if only else steps, with_start=only is None)
    state = State()
    for step in steps:
        digest, settings = run.describe(step)
        result = run.finished(step.folder, digest, settings, step.title)
        if result is not None:
            if only is None or step.name == only:
                say(f"{step.title}: finished before, in {step.folder}")
        elif only is None or step.name == only:
            if only is not None and step.round > 1 and not run.ready(step, state):
                break
            result = run.execute(step, state, digest, settings)
        state.after(step, result)
    if is_main_process():
        report = write_report(Path(recipe.output), plain(recipe))
        say(f"report: {report}")
    return Path(recipe.output)


class _Run:
    """A recipe on its way: the world, the tokenizer and the start model, made when first needed."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.output = Path(recipe.output)
        self.labeller = load_labeller(recipe.labeller) if recipe.labeller is not None else None
        self._digest = ""
        self._world: World | None = None
        self._tokenizer: Tokenizer | None = None

    # -- markers

    def describe(self, step: Step) -> tuple[str, dict[str, Any]]:
        """The step's settings and a digest over them and all steps before it.

        Devices, ranks, ZeRO stage and memory budgets are left out: they change nothing but rounding.
        """
        recipe = self.recipe
        settings: dict[str, Any] = {
            "stage": step.name,
            "round": step.round,
            "seed": recipe.seed,
            "dtype": recipe.engine.dtype,
            "model": plain(recipe.model),
            "tokenizer": plain(recipe.tokenizer),
        }
        own = recipe.ranking if step.name == "rank" else getattr(recipe, step.name)
        settings[step.name] = plain(own)
        text = json.dumps([self._digest, settings], sort_keys=True)
        self._digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return self._digest, settings

    def finished(self, folder: Path, digest: str, settings: Mapping[str, Any], title: str) -> Path | None:
        """The result of a finished step, None if there is work to do.

        Raises RunError when the folder holds a step of other settings.
        """
        started = _read_marker(folder / "started.json")
        if started is None:
            return None
        if started["digest"] != digest and _untouched(folder):
            return None  # it failed before it made anything: the new settings may mend that
        if started["digest"] != digest:
            changed = _differences(started["settings"], settings) or ["an earlier stage"]
            raise RunError(
                f"{folder} holds the stage {title} with other settings; changed since: {'; '.join(changed)}. "
                "Run with --fresh to make it anew (with --stage: that stage and what follows), change these back, or "
                "choose another `output`."
            )
        done = _read_marker(folder / "done.json")
        if done is None:
            return None
        result = folder / done["result"]
        if not result.exists():
            raise RunError(f"{folder / 'done.json'} names {result}, which is gone; run with --fresh to make it anew")
        return result

    def mark(self, folder: Path, name: str, **values: Any) -> None:
        if is_main_process():
            folder.mkdir(parents=True, exist_ok=True)
            partial = folder / f"{name}.partial"
            partial.write_text(json.dumps(values, indent=1, ensure_ascii=False), encoding="utf-8")
            os.replace(partial, folder / name)

    def forget(self, steps: Sequence[Step], *, with_start: bool) -> None:
        """Remove the folders of these steps; only folders that a run has made are touched."""
        folders = [step.folder for step in steps] + ([self.output / "start"] if with_start else [])
        if is_main_process():
            for folder in folders:
                if (folder / "started.json").exists():
                    say(f"removing {folder}")
                    shutil.rmtree(folder)
        self.world.barrier()

    # -- what steps need

    @property
    def world(self) -> World:
        if self._world is None:
            self._world = init_world(self.recipe.engine, log=self.output / "log.txt")
        return self._world

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            config = self.recipe.tokenizer
            folder = config.path or str(
                self._trained_tokenizer() if config.train is not None else self.recipe.model.path
            )
            self._tokenizer = Tokenizer.from_pretrained(folder, add_bos=config.add_bos)
        return self._tokenizer

    def _trained_tokenizer(self) -> Path:
        config = self.recipe.tokenizer
        assert config.train is not None
        folder = self.output / "start" / "tokenizer"
        data = config.train

        def make() -> None:
            texts, _ = read_texts(data)
            say(f"tokenizer: training {config.vocab_size} tokens on {len(texts)} texts")
            Tokenizer.train((text.text for text in texts), config.vocab_size).save(folder)

        self._make_once(folder, {"tokenizer": plain(config)}, "tokenizer", make)
        return folder

    def start_model(self) -> Path:
        """The folder of the start model; one with new weights is written first."""
        source = self.recipe.model
        if source.path:
            return Path(source.path)
        tokenizer = self.tokenizer
        folder = self.output / "start" / "model"
        settings = {"model": plain(source), "tokenizer": plain(self.recipe.tokenizer), "seed": self.recipe.seed}

        def make() -> None:
            config = new_model_config(source, tokenizer)
            say(f"start model: {config.parameter_count():,} new parameters")
            CausalLM(config, seed=self.recipe.seed).save_pretrained(folder, tokenizer=tokenizer)

        self._make_once(folder, settings, "start model", make)
        return folder

    def _make_once(self, folder: Path, settings: dict[str, Any], title: str, make: Callable[[], None]) -> None:
        """Let the main rank make what `folder` is to hold, unless it is there; what fails there fails on all ranks."""
        digest = _digest(settings)

        def unless_finished() -> None:
            if self.finished(folder, digest, settings, title) is None:
                self.mark(folder.parent, "started.json", digest="", settings={})
                self.mark(folder, "started.json", digest=digest, settings=settings)
                make()
                self.mark(folder, "done.json", digest=digest, result=".")

        self.world.from_main(unless_finished)

    def ready(self, step: Step, state: State) -> bool:
        """Whether a later round's step has its inputs (used when one stage is run alone)."""
        return state.policy is not None and {"reward": state.rankings, "ppo": state.reward}[step.name] is not None

    # -- running

    def execute(self, step: Step, state: State, digest: str, settings: Mapping[str, Any]) -> Path:
        """Run one step in its folder; returns its result."""
        resuming = (step.folder / "started.json").exists() and not _untouched(step.folder)
        self.world.barrier()  # every rank has looked before the main one writes
        self.mark(step.folder, "started.json", digest=digest, settings=settings)
        say(f"{step.title}: {'going on' if resuming else 'starting'} in {step.folder}")
        metrics = Metrics(step.folder, step.name, is_main=self.world.is_main, tensorboard=self.recipe.tensorboard)
        began = time.monotonic()
        try:
            result = self._call(step, state, metrics)
        finally:
            metrics.close()
        self.world.barrier()  # the result is written before anybody reads it
        relative = os.path.relpath(result, step.folder)
        self.mark(step.folder, "done.json", digest=digest, result=relative, seconds=round(time.monotonic() - began, 1))
        return result

    def _call(self, step: Step, state: State, metrics: Metrics) -> Path:
        recipe = self.recipe
        # A round has its own seed: the same prompts get new samples, in a new order.
        seed = recipe.seed + 1_000_003 * (step.round - 1)
        common: dict[str, Any] = {
            "tokenizer": self.tokenizer,
            "engine": recipe.engine,
            "seed": seed,
            "folder": step.folder,
            "metrics": metrics,
        }
        if step.name == "generate":
            return write_samples(recipe.generate, model=state.policy or self._base(step, state), **common)
        if step.name == "pretrain":
            return train_pretrain(recipe.pretrain, model=self._base(step, state), **common)
        if step.name == "sft":
            reward = Path(recipe.sft.reward_model) if recipe.sft.reward_model else state.reward
            return train_sft(recipe.sft, model=self._base(step, state), reward_model=reward, **common)
        if step.name == "reward":
            config = self._reward_config(step, state)
            return train_reward(config, model=Path(config.model or self._base(step, state)), **common)
        if step.name == "rank":
            return collect_rankings(
                recipe.ranking,
                policy=_needed(state.policy, step, "ppo"),
                ppo=recipe.ppo,
                reward=recipe.reward,
                earlier=state.rankings,
                labeller=self.labeller,
                world=self.world,
                **common,
            )
        return self._ppo(step, state, common)

    def _base(self, step: Step, state: State) -> Path:
        if state.unfinished:
            raise RunError(
                f"{step.title}: the stage {state.unfinished} has to finish first; run without --stage, "
                f"or with --stage {state.unfinished}"
            )
        if state.base is None:
            state.base = self.start_model()
        return state.base

    def _reward_config(self, step: Step, state: State) -> RewardConfig:
        """In later rounds the reward model learns from the old rankings and the new ones together."""
        config = self.recipe.reward
        if step.round == 1:
            return config
        return replace(config, data=DataConfig(path=str(_needed(state.rankings, step, "rank"))))

    def _ppo(self, step: Step, state: State, common: Mapping[str, Any]) -> Path:
        """PPO from the base model, in later rounds from the last policy; the reference stays the same in all rounds."""
        config = self.recipe.ppo
        start = Path(config.policy or self._base(step, state))
        reward = Path(config.reward_model) if config.reward_model and step.round == 1 else state.reward
        if reward is None and not config.reward_function:
            raise RunError(
                f"{step.title}: there is no reward model. Let the stage reward finish before, or set ppo.reward_model "
                "or ppo.reward_function"
            )
        return train_ppo(
            config,
            policy=start if step.round == 1 else _needed(state.policy, step, "ppo"),
            reference=Path(config.reference or start),
            reward=None if config.reward_function else reward,
            **common,
        )


def new_model_config(source: ModelSource, tokenizer: Tokenizer) -> ModelConfig:
    """The shape of a model with new weights that fits the tokenizer."""
    special = {"vocab_size": tokenizer.vocab_size, "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
    if source.preset:
        return ModelConfig.preset(source.preset, **special)
    return ModelConfig.from_dict({**special, **source.config})


def _meant(near: Sequence[str]) -> str:
    return f"; did you mean {near[0]!r}?" if near else ""


def _needed(path: Path | None, step: Step, by: str) -> Path:
    if path is None:
        raise RunError(f"{step.title}: the step {by} has to finish first; run without --stage")
    return path


def _digest(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _read_marker(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    marker: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return marker


def _untouched(folder: Path) -> bool:
    """Whether a stage has left nothing but notes: no checkpoint to go on from, no result."""
    return {path.name for path in folder.iterdir()} <= {"started.json", "metrics.jsonl", "samples.jsonl", "tensorboard"}


def _differences(old: Any, new: Any, key: str = "") -> list[str]:
    """``key: old -> new`` for every value that differs."""
    if isinstance(old, dict) and isinstance(new, Mapping):
        names = [*old, *(name for name in new if name not in old)]
        return [d for n in names for d in _differences(old.get(n), new.get(n), f"{key}.{n}" if key else n)]
    return [] if old == new else [f"{key}: {old!r} -> {new!r}"]
