"""This file is where an optimizer step happens; it is the door to DeepSpeed.

DeepSpeed sees one fp32 module: masters are fp32 at every ZeRO stage, and a lower compute type is the module's own
autocast. Clipping is DeepSpeed's where it shards gradients (stages 1-3) and ours at stage 0, where it would not tell
the norm.
"""

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

from cluster.errors import UserError
from training.average import Average
from training.changes import course, in_force, prior_course
from training.checkpoint import State, Tensors
from training.imports import without
from training.module import NEW_TOKENS, TEXT_ENCODER, UNET, DreamBoothModule
from training.objective import PairBatch
from training.optimizer_settings import refuse_sharding
from training.optimizers import MOMENTS, ScheduleFreeAverage, bring_back, make_optimizer, remembered
from training.rates import learning_rate
from training.recipe import Engine, Train
from training.wish import Wish

# Elements in one reduction, DeepSpeed's default; smaller models need no more than theirs.
LARGEST_BUCKET = 500_000_000


@cache
def _deepspeed(device: str) -> Any:
    """The deepspeed module for a type of device, imported without what costs seconds and is not used here."""
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # its muon optimizer would import inductor, 2-3 s
    with without("mlflow"):  # its autotuner would import mlflow, 1 s and 100 MB
        import deepspeed
        import deepspeed.ops
    if device == "cpu":
        deepspeed.ops.__compatible_ops__ = {}  # else it compiles shared-memory collectives, 90 s the first time
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed


@dataclass(frozen=True)
class StepReport:
    """What a step came to. The figures stay on the device until somebody reads them."""

    step: int
    """Steps done, this one included."""
    figures: torch.Tensor
    """float32 [6], over all ranks: loss of the subject, loss of the class, gradient norm before clipping, how many
    ranks wish a checkpoint, how many to leave, how many to drop the run."""
    lr: float
    """What the optimizer took, also where it finds it by itself."""
    lr_text: float | None
    """`None` when the text encoder is not trained."""


def zero_stage(engine: Engine, train: Train, world: int) -> int:
    """The ZeRO stage of a run: `auto` is 0 for one worker or LoRA, where sharding only adds a copy, else 2.

    Raises:
        UserError: The optimizer is to be offloaded at stage 0, which cannot, or is one that cannot be sharded.
    """
    refuse_sharding(train.optimizer, engine.zero_stage, engine.offload)
    if engine.zero_stage == "auto":
        alone = world == 1 or train.method == "lora" or not train.optimizer.is_sharded
        return 0 if alone and not engine.offload else 2
    if engine.offload and engine.zero_stage == 0:
        raise UserError(
            "engine.offload needs a sharded optimizer",
            "engine.zero_stage is 0",
            "set engine.zero_stage to auto, 1, 2 or 3, or engine.offload to false",
        )
    return engine.zero_stage


def compute_type(engine: Engine, device: torch.device) -> torch.dtype | None:
    """The autocast type of a run on `device`, `None` for fp32: `auto` is bf16 on a GPU that has it."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if engine.precision == "bf16" or (engine.precision == "auto" and has_bf16) else None


class TrainingEngine:
    """A module, its optimizer and the collectives between them. Every method is called by all ranks together.

    Args:
        module: Trained in place; its parameters are on the device.
        train: Optimizer, learning rates, clipping, weight decay, averaging.
        stage: ZeRO stage.
        micro_batches: Batches per step.
        state: What to go on from; `None` starts as the module is.
        offload: Keep masters and moments in the memory of the CPU and update there; stages 1 to 3.

    The process group exists already; whoever made it ends it.
    """

    def __init__(
        self,
        module: DreamBoothModule,
        train: Train,
        stage: int,
        micro_batches: int,
        state: State | None = None,
        offload: bool = False,
    ) -> None:
        self.module = module
        self._train, self._limit = train, train.max_grad_norm
        self._stage = stage
        self._world = dist.get_world_size()
        self._named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._restore = state
        if state:
            _load_parameters(self._named, state.parameters)  # before DeepSpeed copies them
        groups = module.parameter_groups()
        self._course, self._prior_course = course(train), prior_course(train, module.prior_weight)
        lrs = _rates(train)
        stops = {TEXT_ENCODER: train.text_encoder.stop_after, NEW_TOKENS: train.new_tokens.stop_after}
        self._groups = list(groups)
        self._stops = [stops.get(name) for name in groups]
        self._parameters = [p for parameters in groups.values() for p in parameters]
        self._moments = MOMENTS.get(train.optimizer.name)
        _describe_group()
        bucket = min(LARGEST_BUCKET, sum(p.numel() for p in self._parameters))
        self._linear = nn.functional.linear
        self._deepspeed = _deepspeed(self._parameters[0].device.type)  # tells others too to compile nothing
        self._optimizer = make_optimizer(
            train.optimizer,
            [{"params": parameters, "lr": lrs[name]} for name, parameters in groups.items()],
            train.weight_decay,
        )
        self._engine, *_ = self._deepspeed.initialize(
            model=module,
            optimizer=self._optimizer,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": micro_batches,
                "gradient_clipping": (train.max_grad_norm or 0.0) if stage else 0.0,
                "zero_optimization": {
                    "stage": stage,
                    "reduce_bucket_size": bucket,
                    "allgather_bucket_size": bucket,
                    **({"offload_optimizer": {"device": "cpu", "pin_memory": True}} if offload else {}),
                },
                "zero_force_ds_cpu_optimizer": False,  # its own is compiled, minutes the first time
                "zero_allow_untested_optimizer": self._moments
                is not None,  # by DeepSpeed; by our tests it is
                "timers": {"throughput": {"enabled": False}},  # it waits for the device at every step
                "steps_per_print": None,
            },
        )
        saved = state.average if state else None
        self._average: Average | ScheduleFreeAverage | None = None
        if train.optimizer.name == "adamw-schedulefree":
            self._average = ScheduleFreeAverage(self._optimizer, self._named, saved)
        elif train.ema_decay:
            self._average = Average(self._named, train.ema_decay, saved)
        if stage == 0:
            # DeepSpeed's walks the tree of modules: 3 % of a step
            self._engine.zero_grad = self._optimizer.zero_grad
        if stage == 0 and self._world == 1:
            self._engine.enable_backward_allreduce = False  # it would copy every gradient twice for nothing

    def step(self, step: int, batches: Sequence[PairBatch], wish: Wish = Wish.NONE) -> StepReport:
        """Step `step` (from 0): this rank's micro-batches forward and back, then one update.

        Args:
            step: Decides the learning rates, and what else `train.changes` changes.
            batches: As many as the engine was made for, on the device.
            wish: This rank's, told to all with the figures.
        """
        if self._restore:
            self._restore_moments(self._restore, batches)
        now = in_force(self._course, step)
        full = _rates(now)
        lrs = [
            # decay is by the rate too, so nothing of what has stopped moves any more
            0.0 if stop is not None and step >= stop else learning_rate(full[name], step, self._train)
            for name, stop in zip(self._groups, self._stops, strict=True)
        ]
        self._take(now)
        at_first, self.module.prior_weight = self.module.prior_weight, in_force(self._prior_course, step)
        found = self._optimizer.param_groups[0].get("d", 1.0)  # Prodigy's rate, which ours are a part of
        figures = self._update(batches, lrs, wish)
        self.module.prior_weight = at_first  # a validation's is always the same
        if self._average is not None:
            self._average.update(step)
        by_group = {name: found * lr for name, lr in zip(self._groups, lrs, strict=True)}
        return StepReport(step + 1, figures, by_group[UNET], by_group.get(TEXT_ENCODER))

    def state(self, step: int) -> State:
        """Parameters, moments and average, whole and fp32, the same on every rank; valid until the next step."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        others: Tensors = {}
        if self._stage == 0:
            held, keys = self._optimizer.state, self._moments or ()
            parameters = {name: p.detach() for name, p in self._named.items()}
            moments = [{name: held[p][key] for name, p in self._named.items()} for key in keys]
            others = remembered(self._optimizer, self._named) if self._moments is None else {}
        else:
            self._link_moments()
            parameters = {name: safe_get_full_fp32_param(p) for name, p in self._named.items()}
            moments = [
                {name: safe_get_full_optimizer_state(p, key) for name, p in self._named.items()}
                for key in self._moments or ()
            ]
        first, second = [*moments, {}, {}][:2]
        return State(step, parameters, first, second, self._whole_average(), others)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """A context in which the module holds the weights that would be published and computes no gradient.

        Afterwards everything is what it was, to the bit.
        """
        self._forget_order()
        self.module.eval()
        with torch.no_grad(), self._average.in_place() if self._average else nullcontext():
            yield
        self.module.train()
        self._forget_order()

    def gathered(self) -> AbstractContextManager[Any]:
        """A context in which the module's parameters are whole on every rank."""
        return self._gathered(self.module.parameters())

    def load(self, weights: Tensors) -> None:
        """Put other weights into the trained parameters, which are whole, to be published; no step follows."""
        _load_parameters(self._named, weights)

    def close(self) -> None:
        """Take DeepSpeed's hooks off the module and let go of its buffers, so that nothing of this run is left."""
        self._engine.destroy()
        nn.functional.linear = (
            self._linear
        )  # which stage 3 puts its own in the place of, for all that comes after

    def _take(self, now: Train) -> None:
        """Have the next update decay and clip as these settings say."""
        self._limit = now.max_grad_norm
        if self._stage:
            self._engine.optimizer.clip_grad = now.max_grad_norm or 0.0
        for group in self._optimizer.param_groups:
            group["weight_decay"] = now.weight_decay

    def _update(self, batches: Sequence[PairBatch], lrs: Sequence[float], wish: Wish) -> torch.Tensor:
        """One optimizer step at the given learning rates; returns the figures of a `StepReport`."""
        for group, lr in zip(self._optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr
        figures = torch.zeros(6, device=batches[0].latents.device)
        if wish:
            figures[2 + wish] = 1.0
        for number, batch in enumerate(batches, start=1):
            loss, subject, of_class = self._engine(batch)
            # the parts of micro-batches and ranks add up, DeepSpeed would average over ranks
            self._engine.backward(loss * self._world, scale_wrt_gas=False)
            figures[:2] += torch.stack((subject, of_class))
            if number < len(batches):
                self._engine.step()  # counts the micro-batch
        norm = self._clip() if self._stage == 0 else None
        self._engine.step()
        if self._world > 1:
            dist.all_reduce(figures)
        figures[2] = self._engine.get_global_grad_norm() if norm is None else norm
        return figures

    def _clip(self) -> torch.Tensor:
        """Have the gradients scaled down to the largest norm allowed; returns their norm before.

        The fused optimizer divides by `grad_scale` as it reads a gradient, which saves a pass over all of them.
        """
        norm = nn.utils.get_total_norm(p.grad for p in self._parameters if p.grad is not None)
        limit = self._limit
        if limit is not None and isinstance(self._optimizer, torch.optim.AdamW):
            # 1e-6 as torch's and DeepSpeed's
            self._optimizer.grad_scale = ((norm + 1e-6) / limit).clamp(min=1.0)  # type: ignore[attr-defined]
        elif limit is not None:
            nn.utils.clip_grads_with_norm_(self._parameters, limit, norm)
        return norm

    def _gathered(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[Any]:
        if self._stage < 3:
            return nullcontext()
        gather = self._deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=None)
        return cast(AbstractContextManager[Any], gather)

    def _whole_average(self) -> Tensors | None:
        if self._average is None:
            return None
        with self.evaluating(), self._gathered(self._named.values()):
            return {name: p.detach().clone() for name, p in self._named.items()}

    def _forget_order(self) -> None:
        """Let ZeRO-3 learn anew in which order modules run, from which it fetches parameters ahead."""
        if self._stage == 3:
            coordinator = self._engine.optimizer.parameter_offload.get_param_coordinator()
            if not coordinator.is_invalid_trace():
                coordinator._invalidate_trace()

    def _link_moments(self) -> None:
        """Let DeepSpeed find the moments of every parameter group; by itself it looks once, after the first group."""
        if self._stage in (1, 2):
            self._engine.optimizer._hp_optimizer_states_linked = False
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _restore_moments(self, state: State, batches: Sequence[PairBatch]) -> None:
        """Bring back the moments; a step with learning rate 0, which changes no parameter, makes room for them."""
        from deepspeed.utils import safe_set_full_optimizer_state

        self._restore = None
        self._update(batches, [0.0] * len(self._groups), Wish.NONE)
        if self._moments is None:
            bring_back(self._optimizer, self._named, state.optimizer)
            return
        self._link_moments()
        for key, saved in zip(self._moments, (state.first_moments, state.second_moments), strict=False):
            for name, p in self._named.items():
                if self._stage == 0:
                    self._optimizer.state[p][key].copy_(saved[name])
                else:
                    safe_set_full_optimizer_state(p, saved[name].to(p.device), key)
        for kept in self._optimizer.state.values():
            if "step" in kept:
                kept["step"].fill_(state.step)


def _rates(train: Train) -> dict[str, float]:
    """The full learning rate of each part."""
    return {UNET: train.lr, TEXT_ENCODER: train.text_encoder.lr, NEW_TOKENS: train.new_tokens.lr}


def _load_parameters(named: Mapping[str, nn.Parameter], saved: Mapping[str, torch.Tensor]) -> None:
    if set(named) != set(saved):
        raise AssertionError(f"a checkpoint of this run holds other parameters: {set(named) ^ set(saved)}")
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(saved[name])


def _describe_group() -> None:
    """Tell DeepSpeed of the process group that exists; it would ask MPI otherwise."""
    os.environ.setdefault("RANK", str(dist.get_rank()))
    os.environ.setdefault("WORLD_SIZE", str(dist.get_world_size()))
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "0")
