"""This file is where the peak memory of a training worker is estimated: nothing is loaded and nothing computed.

What lasts is counted from shapes. What a step needs for a moment is found by running the real module forward and back
on fake tensors, which have a size and no bytes, and watching which of them are alive together.
"""

import gc
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from training.conditioning import never_trained
from training.engine import LARGEST_BUCKET, zero_stage
from training.module import DreamBoothModule
from training.noise import noise_process
from training.objective import PairBatch
from training.optimizer_settings import state_bytes
from training.pipeline import BaseInfo, decode_latents, empty_vae
from training.recipe import Run
from training.shapes import count, trained_shapes

FP32 = 4  # bytes; parameters, gradients and moments are fp32 whatever the compute type
# What a worker holds before it loads a base, in bytes. On the CPU the resident memory of one with torch, diffusers,
# DeepSpeed and Ray imported and their first kernels made, measured by benchmarks/memory.py. On a GPU torch counts
# tensors alone, of which the libraries have a workspace (not measured: taken from cuBLAS's documentation).
LIBRARIES = {"cpu": 680_000_000, "cuda": 40_000_000}
# Activations that a CPU's heap holds beyond those alive, by gradient checkpointing: before glibc 2.38 it seldom finds
# a freed tensor's place again for one of the same size, and recomputing frees and makes many (benchmarks/memory.py).
FRAGMENTED = {False: 0.25, True: 1.0}


@dataclass(frozen=True)
class MemoryEstimate:
    """The peak memory of one worker in bytes: of its process on a CPU, as torch counts it on a GPU."""

    libraries: int
    """Held before a base is loaded."""
    base: int
    """The pristine base, resident, which the runs of a gang start from; the VAE too if samples are drawn."""
    weights: int
    """What is trained and what it is trained through, and its average: this worker's part."""
    optimizer: int
    """fp32 masters, moments and buffers that last: this worker's part."""
    step: int
    """What comes and goes, at its worst moment: activations, gradients, buffers of collectives, a checkpoint."""
    offloaded: int = 0
    """In the memory of the CPU, besides the rest on the GPU."""

    @property
    def peak(self) -> int:
        """All of it on the device."""
        return self.libraries + self.base + self.weights + self.optimizer + self.step


def estimate(base: BaseInfo, run: Run, device: str, world: int) -> MemoryEstimate:
    """Estimate the peak memory of each of `world` workers.

    Args:
        base: The base.
        run: The run.
        device: `cpu` or `cuda`; the latter is taken to have bf16.
        world: Workers.

    Raises:
        UserError: `train_run` would refuse what the run asks to train, or how.
    """
    shapes = trained_shapes(base, run.train)
    sizes = _Sizes.of(shapes, run, zero_stage(run.engine, run.train, world), world)
    draws = run.train.stop or (0 < run.validate_.every < run.train.steps and run.validate_.prompts)
    vae, drawing = _drawing(base) if draws else (0, 0)
    live = _live_in_step(base, run, device, world, shapes)
    lasting, offloaded = sizes.optimizer(device)
    return MemoryEstimate(
        libraries=LIBRARIES[device],
        base=sizes.base + vae,
        weights=sizes.weights(),
        optimizer=lasting,
        step=max(drawing, *sizes.moments(live)),
        offloaded=offloaded,
    )


@dataclass(frozen=True)
class _Peaks:
    """Most bytes of a forward and backward pass that are alive together."""

    alone: int
    """Without gradients of parameters."""
    with_gradients: int
    """With those that are there at the time."""


@dataclass(frozen=True)
class _Sizes:
    """Bytes of a run's parameters, and what follows from them for one worker.

    Source:
        DeepSpeed 0.19: `runtime/engine.py`, `runtime/zero/stage_1_and_2.py`, `runtime/zero/stage3.py`.
    """

    run: Run
    stage: int
    world: int
    base: int
    module: int
    """All that the module holds, frozen parameters too."""
    shared: int
    """Of them what a run of whole weights shares with the base: what is never trained."""
    trained: int
    state: int
    """Of the optimizer, for all that is trained."""

    @classmethod
    def of(cls, shapes: tuple[nn.Module, nn.Module], run: Run, stage: int, world: int) -> "_Sizes":
        """Of UNet and text encoder as they are trained."""
        trained = sum(count(part) for part in shapes)
        held = [count(part, trained=False) for part in shapes]
        module = sum(held) if count(shapes[1]) else held[0]  # an encoder that is not trained is left out
        base = sum(held) - (trained if run.train.method == "lora" else 0)
        tensors = [p.shape for part in shapes for p in part.parameters() if p.requires_grad]
        state = state_bytes(run.train.optimizer, tensors)
        shared = sum(p.numel() for p in never_trained(shapes[1])) if count(shapes[1]) else 0
        return cls(run, stage, world, base * FP32, module * FP32, shared * FP32, trained * FP32, state)

    @property
    def shard(self) -> int:
        """What is trained, this worker's part of it."""
        return self.trained // (self.world if self.stage else 1)

    @property
    def bucket(self) -> int:
        """What DeepSpeed reduces at once."""
        return min(self.trained, LARGEST_BUCKET * FP32)

    def weights(self) -> int:
        """The module's parameters beyond those that it shares with the resident base, and their average."""
        own = self.trained if self.run.train.method == "lora" else self.module - self.shared
        average = self.trained
        if self.stage == 3:
            own, average = self.module // self.world, self.shard
        return own + (average if self.run.train.ema_decay is not None else 0)

    def optimizer(self, device: str) -> tuple[int, int]:
        """Masters, moments and buffers that last: on the device, and in the memory of the CPU beside it."""
        offload = self.run.engine.offload
        masters = self.shard if self.stage in (1, 2) or offload else 0  # stage 3 updates its part in place
        staging = 2 * self.shard if offload else 0  # of the masters on their way back, and of their gradients
        buffers = self.bucket + self.shard if self.stage == 3 else 0  # of gradients, kept from step to step
        movable = masters + self.state * self.shard // self.trained + staging
        return (buffers, movable) if offload and device != "cpu" else (buffers + movable, 0)

    def moments(self, live: _Peaks) -> tuple[int, int, int, int]:
        """What is needed beyond what lasts at what may be the worst: backward, reduction, update, checkpoint."""
        accumulates = self.run.train.accumulation > 1
        if self.stage < 2:
            backward = live.alone + self.trained if accumulates else live.with_gradients
            backward += self.bucket if self.stage else 0
            reduction = self.trained + (self.bucket if self.stage or self.world > 1 else 0)
        elif self.stage == 2:
            kept = self.shard if accumulates else 0
            backward, reduction = live.alone + self.bucket + kept, 2 * self.bucket + kept
        else:  # parameters stay gathered from their first use until the backward pass is through
            backward, reduction = live.alone + self.module, self.module + self.bucket
        saves, copies = self.run.train.steps > self.run.checkpoint.every, 3 if self.stage > 0 else 0
        saves = saves or self.run.train.stop is not None
        update = 0
        if self.run.train.optimizer.name == "adamw-schedulefree":
            # gradients and what they are divided by; the average, and what stands in its place for so long
            update, copies = 2 * self.trained, 2
        return backward, reduction, update, copies * self.trained if saves else 0


def _live_in_step(
    base: BaseInfo, run: Run, device: str, world: int, shapes: tuple[nn.Module, nn.Module]
) -> _Peaks:
    """What is alive in the forward and backward pass of the largest micro-batch; uses up the shapes."""
    train, engine = run.train, run.engine
    pairs = -(-train.pairs_per_step // world)
    rows = -(-pairs // train.accumulation) * (2 if run.prior.weight > 0 else 1)
    lower = engine.precision == "bf16" or (engine.precision == "auto" and device == "cuda")
    schedule = noise_process(base.scheduler)
    with FakeTensorMode(allow_non_fake_inputs=True):
        unet, text_encoder = (part.to_empty(device="cpu") for part in shapes)
        prompts = torch.empty(2, base.prompt_ids, dtype=torch.int64)
        compute = torch.bfloat16 if lower else None
        module = DreamBoothModule(unet, text_encoder, prompts, schedule, run.prior.weight, compute).train()
        if engine.gradient_checkpointing:
            module.recompute_activations()
        if lower and device == "cuda":
            _norms_in_fp32(module)
        with Live([*module.parameters(), *module.buffers()]) as live:
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(live.take_gradient)  # type: ignore[no-untyped-call]
            with _no_collection():  # when it comes depends on what this process did before
                loss, _, _ = module(_empty_batch(base, rows))
                loss.backward()
    heap = int(live.peak * FRAGMENTED[engine.gradient_checkpointing]) if device == "cpu" else 0
    return _Peaks(live.peak + heap, live.peak_with_gradients + heap)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's collector of cycles from running."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def _drawing(base: BaseInfo) -> tuple[int, int]:
    """Bytes of the VAE, and of what is alive when it decodes an image."""
    vae = empty_vae(base)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        vae.to_empty(device="cpu")
        with Live([*vae.parameters(), *vae.buffers()]) as live:
            decode_latents(vae, _empty_batch(base, rows=1).latents, base.scaling_factor)
    return count(vae, trained=False) * FP32, live.peak


def _empty_batch(base: BaseInfo, rows: int) -> PairBatch:
    """A batch that has a size and no content."""
    latents = torch.empty(rows, base.latent_channels, base.latent_size, base.latent_size)
    numbers = torch.empty(rows, dtype=torch.int64)
    ids = torch.empty(rows, base.prompt_ids, dtype=torch.int64)
    sizes = torch.empty(rows, 6) if base.kind.sized else None
    return PairBatch(latents, latents, numbers, ids, numbers, torch.empty(rows), numbers, sizes=sizes)


def _norms_in_fp32(module: nn.Module) -> None:
    """Have norms compute in fp32, as autocast has them on a GPU and not on a CPU."""

    def widen(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(arg.float() for arg in args)

    for part in module.modules():
        if isinstance(part, nn.GroupNorm | nn.LayerNorm):
            part.register_forward_pre_hook(widen)


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches the bytes of tensors that operations make: how many are alive together at most.

    Args:
        known: Tensors that are there already and do not count.
    """

    peak: int
    """Most bytes, without gradients that `take_gradient` took."""

    def __init__(self, known: Sequence[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self.peak_with_gradients = 0
        self._now = self._gradients = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf.untyped_storage())
        return out

    def take_gradient(self, parameter: torch.Tensor) -> None:
        """A hook of a parameter whose gradient is ready: it is counted apart from here on."""
        assert parameter.grad is not None  # the hook runs when it is
        self._gradients += parameter.grad.nbytes
        parameter.grad = None

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self._now += size
        self.peak = max(self.peak, self._now)
        self.peak_with_gradients = max(self.peak_with_gradients, self._now + self._gradients)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self._now -= size
