"""Training on DeepSpeed: the one file that imports it.

`ZeroEngine` hides what differs between ZeRO stages, dtypes and world sizes behind five verbs: call, backward, step, save, load.
What it promises at every stage: gradients are the SUM over ranks of losses that are already normalised over the world; weights
and moments are updated in float32; the global gradient norm is reported; a step with a non-finite loss or gradient changes
nothing on any rank, is counted, and the third in a row stops the run.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import io
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import nn

from pyrlhf.engine import checkpoint
from pyrlhf.model.transformer import Transformer
from pyrlhf.ops._core import raise_faults
from pyrlhf.ops._memory import keep_freed_memory

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_MAX_SKIPPED_IN_A_ROW = 3
_TAG = "deepspeed"
_COUNTERS = ("steps", "skipped_steps", "skipped_in_a_row")


class TrainingDiverged(RuntimeError):
    """Three steps in a row had a non-finite loss or gradient."""


@dataclass(frozen=True)
class EngineConfig:
    """Where and how a model is trained.

    Args:
        device: "cuda" where there is one, else "cpu" ("auto"), or one of the two.
        dtype: dtype of weights and activations; masters, moments and accumulated gradients are float32 either way.
        zero_stage: what is sharded over ranks: 0 nothing, 1 optimizer states, 2 also gradients, 3 also weights.
        offload_optimizer: keep masters and moments in host memory (CUDA, ZeRO 1-3).
        tokens_per_microbatch: packed tokens of one forward; it changes memory and speed, never the result.
        offload_during_rollout: move masters and moments to host memory while the policy generates (CUDA, ZeRO 1-3; in bf16
            ZeRO 1 then runs as 2).
        exact: the policy is trained by the kernels that sample, in the same order, so that both see the same log-probs bit for bit
            (CPU, ZeRO 0-2). It takes longer.
        activation_checkpointing: training keeps each layer's input only and computes the layer again for its gradient: the same bits,
            less memory, the time of another forward.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["fp32", "bf16"] = "fp32"
    zero_stage: Literal[0, 1, 2, 3] = 0
    offload_optimizer: bool = False
    tokens_per_microbatch: int = 8192
    offload_during_rollout: bool = False
    exact: bool = False
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        _expect("device", self.device, ("auto", "cpu", "cuda"))
        _expect("dtype", self.dtype, tuple(_DTYPES))
        _expect("zero_stage", self.zero_stage, (0, 1, 2, 3))
        if self.tokens_per_microbatch < 1:
            raise ValueError(f"tokens_per_microbatch: expected at least 1, found {self.tokens_per_microbatch}")
        for name in ("offload_optimizer", "offload_during_rollout"):
            if getattr(self, name) and self.zero_stage == 0:
                raise ValueError(f"{name}: needs zero_stage 1, 2 or 3, found 0; raise zero_stage")
        if self.exact and self.zero_stage == 3:
            raise ValueError(
                "exact: needs zero_stage 0, 1 or 2, found 3; ZeRO 3 has no weights to share between forwards"
            )

    @property
    def device_type(self) -> str:
        """The device with "auto" resolved on this machine: "cpu" or "cuda"."""
        if self.device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device: expected a CUDA device for 'cuda', found none; use 'cpu' or 'auto'")
        return self.device


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule, a pure function of the step (`learning_rate`).

    Args:
        lr: peak learning rate.
        betas: decay of the first and second moment.
        eps: AdamW's epsilon; 1e-5 keeps the first updates of RL tame.
        weight_decay: applied to matrices, not to biases and norms.
        max_grad_norm: gradients are scaled down to this global norm; 0 turns clipping off.
        schedule: shape after warm-up.
        warmup_steps: steps of linear warm-up from `warmup_start * lr` to `lr`.
        warmup_start: fraction of lr at step 0 when there is a warm-up.
        final_lr_fraction: fraction of lr at the end of linear (default 0.0) or cosine (default 0.1).
    """

    lr: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-5
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    warmup_start: float = 0.1
    final_lr_fraction: float | None = None

    def __post_init__(self) -> None:
        _expect("schedule", self.schedule, ("constant", "linear", "cosine"))
        for name in ("lr", "eps", "weight_decay", "max_grad_norm", "warmup_steps", "warmup_start"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}: expected a finite number >= 0, found {value}")


def learning_rate(config: OptimizerConfig, step: int, total_steps: int | None) -> float:
    """Learning rate of the `step`-th update (the first is 0) out of `total_steps`."""
    if step < config.warmup_steps:
        return config.lr * (config.warmup_start + (1.0 - config.warmup_start) * step / config.warmup_steps)
    if config.schedule == "constant":
        return config.lr
    if total_steps is None:
        raise ValueError(f"total_steps: schedule {config.schedule!r} needs the number of updates, found None")
    progress = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    if config.schedule == "linear":
        final = 0.0 if config.final_lr_fraction is None else config.final_lr_fraction
        return config.lr * (1.0 - (1.0 - final) * progress)
    final = 0.1 if config.final_lr_fraction is None else config.final_lr_fraction
    return config.lr * (final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress)))


@dataclass(frozen=True)
class World:
    """The processes that train together, seen from one of them."""

    rank: int
    local_rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, value: torch.Tensor | float) -> Any:
        """Sum over ranks: a new tensor for a tensor, a float for a number (float64)."""
        if isinstance(value, torch.Tensor):
            total = value.detach().clone()
            if self.size > 1:
                dist.all_reduce(total)
            return total
        return float(self.sum(torch.tensor(float(value), dtype=torch.float64, device=self.device)))

    def max(self, value: int) -> int:
        """Largest of the ranks' integers."""
        if self.size == 1:
            return int(value)
        highest = torch.tensor(int(value), dtype=torch.int64, device=self.device)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        return int(highest)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's (picklable) value, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, compute: Callable[[], Any]) -> Any:
        """What `compute()` gives on the main rank, on every rank. All must call it.

        What it raises there is raised on all ranks (RuntimeError with its words on the others), so that nobody waits for one that left.
        """
        value, error = None, None
        if self.is_main:
            try:
                value = compute()
            except Exception as raised:
                error = raised
        value, words = self.gather((value, "" if error is None else f"{type(error).__name__}: {error}"))[0]
        if error is not None:
            raise error
        if words:
            raise RuntimeError(f"rank 0 failed: {words}")
        return value

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def init_world(config: EngineConfig, *, log: Path | None = None) -> World:
    """Join the processes of this run; call it once before making engines, again at will.

    Under a launcher (deepspeed, torchrun) RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are read from the
    environment; without one the world is this process alone, and no port is opened. gloo on CPU, nccl on CUDA.
    `log` is a file for what DeepSpeed and its friends have to say (see `quiet_logs`).
    """
    device_type = config.device_type
    quiet_logs(log)
    os.environ["DS_ACCELERATOR"] = device_type
    keep_freed_memory()
    rank, size, local_rank = (int(os.environ.setdefault(k, v)) for k, v in _ALONE.items())
    device = torch.device(device_type, local_rank) if device_type == "cuda" else torch.device("cpu")
    if device_type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        _init_process_group("nccl" if device_type == "cuda" else "gloo", rank, size)
    return World(rank, local_rank, size, device)


_ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
_LETTING_GO = 0.1  # seconds


def _init_process_group(backend: str, rank: int, size: int) -> None:
    if size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise ValueError(
                f"{missing[0]}: expected in the environment of rank {rank} of {size}, found none; use a launcher"
            )
        # One rank may generate or save for long while the others wait.
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=timedelta(hours=2))
    atexit.register(_leave)


def _leave() -> None:
    """Leave the group while there is an interpreter.

    Engines hold on to it, so gloo's threads live on. One that has yet to let go of the tensors of the last collective needs the
    interpreter for that and aborts the process if it comes too late: asleep, this thread lets them have both.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(_LETTING_GO)


_NOISY = ("DeepSpeed", "transformers", "datasets", "py.warnings")


def quiet_logs(path: Path | None = None) -> None:
    """Keep DeepSpeed off the terminal; with `path`, send what it, transformers, datasets and Python's warnings say there."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|deepspeed")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
        logging.captureWarnings(True)
        for name in _NOISY:
            _send(name, handler, logging.INFO)
    elif not logging.getLogger("DeepSpeed").handlers:  # an earlier call may have chosen a file
        _send("DeepSpeed", logging.NullHandler(), logging.ERROR)


def _send(name: str, handler: logging.Handler, level: int) -> None:
    logger = logging.getLogger(name)
    for old in list(logger.handlers):
        logger.removeHandler(old)
        old.close()
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False


@functools.cache
def _deepspeed() -> Any:
    """Import DeepSpeed (2.7 s) with its terminal output turned off and its compile-at-first-use op turned away."""
    log = logging.getLogger("DeepSpeed")
    handlers, level = list(log.handlers) or [logging.NullHandler()], log.level
    with _hushed(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed

        log.handlers[:] = handlers
        log.setLevel(level)
    # With two CPU ranks DeepSpeed would compile a shared-memory all-reduce (20 s) that only its inference kernels call.
    deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """What is printed inside goes to DeepSpeed's log."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            yield
    finally:
        if said.getvalue().strip():
            logging.getLogger("DeepSpeed").info(said.getvalue().strip())


@dataclass(frozen=True)
class StepReport:
    """What one `ZeroEngine.step` did.

    Attributes:
        grad_norm: global norm of the summed gradients before clipping; inf when it was not finite.
        lr: learning rate of this step.
        skipped: nothing was updated, on any rank.
        reason: why it was skipped, "" otherwise.
    """

    grad_norm: float
    lr: float
    skipped: bool = False
    reason: str = ""


class Extra(Protocol):
    """State saved and loaded beside an engine's own, on each rank (`ZeroEngine.extras`)."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class ZeroEngine:
    """A model on DeepSpeed: trained with an `OptimizerConfig`, frozen without one.

    The engine takes the model over: it is moved to the world's device and cast to the engine's dtype (buffers keep theirs), and under
    ZeRO 3 its weights are sharded in place. A frozen engine runs without autograd; it is sharded under ZeRO 3 and plain otherwise.

    Args:
        model: the module, with the same weights on every rank.
        world: what `init_world` returned.
        config: device, dtype, ZeRO stage.
        optimizer: None freezes the model.
        total_steps: number of updates of the whole run, for schedules that end.

    Attributes:
        steps: calls of `step` so far, skipped ones included.
        skipped_steps: those that were skipped.
        skipped_in_a_row: those since the last one that was not.
        extras: named states that `save` and `load` carry along.
    """

    def __init__(
        self,
        model: nn.Module,
        world: World,
        config: EngineConfig,
        optimizer: OptimizerConfig | None = None,
        total_steps: int | None = None,
    ) -> None:
        self.world, self.config, self.total_steps = world, config, total_steps
        self.device = world.device
        self.module: Any = model.requires_grad_(False).eval() if optimizer is None else model
        for trunk in (m for m in model.modules() if isinstance(m, Transformer)):
            trunk.checkpointing = config.activation_checkpointing
        self.extras: dict[str, Extra] = {}
        self.steps = self.skipped_steps = self.skipped_in_a_row = 0
        self._loss = torch.zeros((), device=self.device)
        self._optimizer_config = optimizer
        self._engine: Any = None
        if optimizer is not None:
            learning_rate(optimizer, optimizer.warmup_steps, total_steps)  # fail now if the schedule lacks its end
            self._engine = _initialize(_place(model, world, config), config, optimizer)
            if _bare(config) and world.size == 1:
                self._engine.enable_backward_allreduce = False  # it would copy all gradients to sum them with nobody's
        elif config.zero_stage == 3:
            self._engine = _initialize(_place(model, world, config), config, None)
        else:
            _place(model, world, config)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward."""
        forward = self.module if self._engine is None else self._engine
        if self._optimizer_config is None:
            with torch.no_grad():
                return forward(*args, **kwargs)
        return forward(*args, **kwargs)

    forward = __call__

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Add this rank's part of a world-normalised loss to the gradients; `last` marks the final one before `step`.

        After the last one the gradients are the sum over micro-batches and ranks.
        """
        self._require_optimizer("backward")
        detached = loss.detach()
        self._loss += detached
        # DeepSpeed averages over ranks, a sum is wanted. 0 * loss makes every gradient NaN when the loss is not finite,
        # so that one rank's bad loss is seen in the gradient norm of all.
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * (self.world.size + 0.0 * detached))

    def step(self) -> StepReport:
        """Clip, update, and clear the gradients. Skips if loss or gradient is not finite; raises `TrainingDiverged` at the third in a row."""
        optimizer = self._require_optimizer("step")
        lr = learning_rate(optimizer, self.steps, self.total_steps)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        norm = self._update_bare(optimizer.max_grad_norm) if _bare(self.config) else self._update_sharded()
        if self.world.device.type == "cuda":
            raise_faults(self.world.device)  # the norm has waited for the device already
        self.steps += 1
        reason = "" if math.isfinite(norm) else self._describe_skip()
        self._loss.zero_()
        self._count_skip(reason)
        return StepReport(norm, lr, bool(reason), reason)

    def _update_bare(self, max_norm: float) -> float:
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        norm = float(nn.utils.clip_grad_norm_(parameters, max_norm or math.inf))
        if math.isfinite(norm):
            self._engine.step()
        else:
            self._engine.zero_grad()
            norm = math.inf
        return norm

    def _update_sharded(self) -> float:
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return float(norm) if self._engine.was_step_applied() else math.inf

    def _describe_skip(self) -> str:
        finite_losses = self.world.sum(0.0 if bool(torch.isfinite(self._loss)) else 1.0) == 0
        return f"the {'gradient' if finite_losses else 'loss'} of step {self.steps - 1} is not finite"

    def _count_skip(self, reason: str) -> None:
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if reason else 0
        self.skipped_steps += bool(reason)
        if self.skipped_in_a_row >= _MAX_SKIPPED_IN_A_ROW:
            raise TrainingDiverged(
                f"{self.skipped_in_a_row} steps in a row were skipped: {reason}; lower the learning rate, or look at the last "
                "batches and rewards"
            )

    def _require_optimizer(self, verb: str) -> OptimizerConfig:
        if self._optimizer_config is None:
            raise ValueError(f"{verb}: this engine is frozen; make it with an OptimizerConfig to train")
        return self._optimizer_config

    @contextlib.contextmanager
    def unhooked(self) -> Iterator[None]:
        """The module runs free of DeepSpeed's hooks inside, which would gather and free each weight at its use (ZeRO 3)."""
        with _without_hooks(self.module, self.sharded):
            yield

    @property
    def trains(self) -> bool:
        """Whether there is an optimizer."""
        return self._optimizer_config is not None

    def offload_states(self) -> None:
        """ZeRO 1-3: move masters and moments to host memory, until `reload_states`."""
        if self.sharded:
            _move(self._states_of_shards(), "cpu")
            return
        from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum as States

        pinned = self.world.device.type == "cuda"
        self._engine.offload_states(include=[States.hp_params, States.optim_states], pin_memory=pinned)

    def reload_states(self) -> None:
        """Bring back what `offload_states` moved."""
        if self.sharded:
            _move(self._states_of_shards(), self.world.device)
        else:
            self._engine.reload_states()

    def _states_of_shards(self) -> list[torch.Tensor]:
        # DeepSpeed's own offload_states insists on its FusedAdam under ZeRO 3.
        optimizer = self._engine.optimizer
        moments = [t for state in optimizer.optimizer.state.values() for t in state.values()]
        return [t for t in [*optimizer.fp32_partitioned_groups_flat, *moments] if torch.is_tensor(t) and t.ndim]

    @property
    def sharded(self) -> bool:
        """Whether this rank holds a part of each weight only (ZeRO 3)."""
        return self._engine is not None and self.config.zero_stage == 3

    def release_whole_weights(self) -> None:
        """ZeRO 3: drop gathered weights, so that the next use gathers them from the shards again."""
        getattr(self._engine.optimizer, "parameter_offload", self._engine.optimizer).partition_all_parameters()

    def _whole(self, parameters: Sequence[nn.Parameter]) -> contextlib.AbstractContextManager[Any]:
        return _deepspeed().zero.GatheredParameters(list(parameters)) if self.sharded else contextlib.nullcontext()

    @torch.no_grad()
    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """The module's whole state on the CPU of rank 0, {} on the others. All ranks must call it. One weight is gathered at a time."""
        state: dict[str, torch.Tensor] = {}
        copies: dict[int, torch.Tensor] = {}  # tied weights stay tied
        for name, value in self.module.state_dict(keep_vars=True).items():
            if id(value) not in copies:
                with self._whole([value] if isinstance(value, nn.Parameter) else []):
                    copies[id(value)] = value.detach().to("cpu", copy=True) if self.world.is_main else torch.empty(0)
            state[name] = copies[id(value)]
        return state if self.world.is_main else {}

    def save(self, folder: Path, client_state: dict[str, Any]) -> None:
        """Write all that an identical continuation needs to `folder`, replacing it in one move. All ranks must call it.

        The same number of ranks, ZeRO stage and dtype can `load` it. `client_state` is kept per rank. Engines that must agree with
        each other are saved together by `checkpoint.save_snapshot`.
        """
        self._require_optimizer("save")
        with checkpoint.replacing(Path(folder), self.world) as partial:
            self._engine.save_checkpoint(str(partial), tag=_TAG, save_latest=False)
            state = {key: getattr(self, key) for key in _COUNTERS} | {"run": self._run(), "client": client_state}
            state["extras"] = {name: extra.state_dict() for name, extra in self.extras.items()}
            torch.save(state, partial / f"rank{self.world.rank}.pt")

    def load(self, folder: Path) -> dict[str, Any]:
        """Continue from what `save` wrote; returns the client state.

        ValueError if there is nothing, or if it was saved under another world size, ZeRO stage, dtype or set of extras.
        """
        self._require_optimizer("load")
        folder = Path(folder).resolve()
        file = folder / f"rank{self.world.rank}.pt"
        if not file.exists():
            raise ValueError(
                f"folder: expected the saved state of rank {self.world.rank} of {self.world.size} at {file}, found none"
            )
        state = torch.load(file, map_location="cpu", weights_only=False)
        if state["run"] != self._run():
            raise ValueError(
                f"folder: {folder} was saved with {state['run']}, this engine has {self._run()}; use the same"
            )
        with _hushed():
            self._engine.load_checkpoint(str(folder), tag=_TAG)
        for key in _COUNTERS:
            setattr(self, key, state[key])
        for name, extra in self.extras.items():
            extra.load_state_dict(state["extras"][name])
        return dict(state["client"])

    def _run(self) -> dict[str, Any]:
        config = {"world_size": self.world.size, "zero_stage": self.config.zero_stage, "dtype": self.config.dtype}
        return config | {"extras": sorted(self.extras)}

    def close(self) -> None:
        """Free DeepSpeed's buffers and hooks; neither the engine nor (ZeRO 3) the module can be used afterwards."""
        if self._engine is None:
            return
        self._engine.destroy()
        if self.sharded:
            # Something in DeepSpeed keeps a sharded model reachable for good, so its memory is given back by hand.
            for holder in (self._engine.optimizer, getattr(self._engine, "basic_optimizer", None)):
                if holder is not None:
                    vars(holder).clear()
            for parameter in self.module.parameters():
                parameter.data = getattr(parameter, "ds_tensor").data = parameter.new_empty(0)  # noqa: B009
        self._engine.optimizer = None
        self._engine = None


class Ema:
    """Exponential moving average of an engine's weights in float32: average = decay * average + (1 - decay) * weight.

    Under ZeRO 3 each rank averages the part it holds. Saved and loaded with the engine.
    """

    def __init__(self, engine: ZeroEngine, decay: float = 0.992) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay: expected a number in [0, 1), found {decay}")
        self.decay, self._engine = decay, engine
        self._weights = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
        self._average = {name: self._own(p).detach().float().clone() for name, p in self._weights.items()}
        engine.extras["ema"] = self

    def _own(self, parameter: nn.Parameter) -> torch.Tensor:
        """The part of a weight that this rank holds."""
        return getattr(parameter, "ds_tensor") if self._engine.sharded else parameter  # noqa: B009 (DeepSpeed adds it)

    @torch.no_grad()
    def update(self) -> None:
        """Take the current weights in; call it after each step."""
        for name, parameter in self._weights.items():
            self._average[name].lerp_(self._own(parameter).float(), 1.0 - self.decay)

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """The engine's weights are the average inside and exactly what they were afterwards. No `step` inside."""
        kept = {name: self._own(p).detach().clone() for name, p in self._weights.items()}
        self._write(self._average)
        try:
            yield
        finally:
            self._write(kept)

    @torch.no_grad()
    def _write(self, values: dict[str, torch.Tensor]) -> None:
        if self._engine.sharded:
            self._engine.release_whole_weights()
        for name, parameter in self._weights.items():
            self._own(parameter).copy_(values[name])

    def state_dict(self) -> dict[str, Any]:
        return {"decay": self.decay, "average": self._average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, average in self._average.items():
            average.copy_(state["average"][name])


def _place(model: nn.Module, world: World, config: EngineConfig) -> nn.Module:
    """Move a model to the device and cast its weights; buffers (rotary frequencies, reward scale) keep their dtype."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(world.device, _DTYPES[config.dtype])
    return model.to(world.device)


def _initialize(model: nn.Module, config: EngineConfig, optimizer: OptimizerConfig | None) -> Any:
    adamw = None if optimizer is None else _adamw(model, optimizer)
    sizes = [p.numel() for p in model.parameters()]
    bucket = max(max(sizes), min(sum(sizes), 50_000_000))
    settings = _deepspeed_settings(config, optimizer, bucket=-(-bucket // 64) * 64)  # DeepSpeed wants it even
    deepspeed = _deepspeed()
    gc.freeze()  # making a bf16 engine collects garbage ten times, over everything that was ever imported
    try:
        with _hushed():
            return deepspeed.initialize(model=model, optimizer=adamw, config=settings)[0]
    finally:
        gc.unfreeze()


def _adamw(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.ndim >= 2 and config.weight_decay > 0]
    rest = [p for p in parameters if p.ndim < 2 or config.weight_decay == 0]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    used = [group for group in groups if group["params"]]
    return torch.optim.AdamW(used, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def _deepspeed_settings(config: EngineConfig, optimizer: OptimizerConfig | None, bucket: int) -> dict[str, Any]:
    """DeepSpeed's configuration. `bucket` is how many numbers one collective moves, at least the largest weight's."""
    stage = config.zero_stage
    if config.dtype == "bf16" and stage == 0 and optimizer is not None:
        # Stage 0 would accumulate gradients in bfloat16. Stage 1 does the same arithmetic with float32 gradients and masters.
        stage = 1
    if config.dtype == "bf16" and stage == 1 and config.offload_during_rollout:
        stage = 2  # DeepSpeed cannot move the states of stage 1 in bfloat16; stage 2 shards gradients besides
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": config.device_type == "cuda",
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "stage3_param_persistence_threshold": 10_000,
    }
    if config.offload_optimizer and config.device_type == "cuda":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_print": None,
        "gradient_clipping": 0.0 if optimizer is None or _bare(config) else optimizer.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    if config.dtype == "bf16":
        settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def _bare(config: EngineConfig) -> bool:
    """Whether DeepSpeed hands the bare optimizer back (ZeRO 0, float32): norm, clipping and skipping are then done here."""
    return config.zero_stage == 0 and config.dtype == "fp32"


def _move(tensors: list[torch.Tensor], device: torch.device | str) -> None:
    """The tensors' memory to another device; who holds them sees it there."""
    for tensor in tensors:
        there = torch.empty_like(tensor, device=device, pin_memory=str(device) == "cpu" and tensor.is_cuda)
        tensor.data = there.copy_(tensor.detach())


@contextlib.contextmanager
def _without_hooks(model: nn.Module, sharded: bool) -> Iterator[None]:
    """Forward hooks of a sharded model put aside and put back: DeepSpeed's would free each weight after its first use."""
    kinds = ("_forward_pre_hooks", "_forward_hooks") if sharded else ()
    hooks = [(module, kind, getattr(module, kind)) for module in model.modules() for kind in kinds]
    for module, kind, found in hooks:
        setattr(module, kind, type(found)())
    try:
        yield
    finally:
        for module, kind, found in hooks:
            setattr(module, kind, found)


def _expect(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, found {value!r}")
