"""This file is where it is told cheaply that a run surely fits: a bound on its memory that needs no models.

`training/memory.py` finds what a run takes by running its modules on fake tensors, for which everything is imported
that a worker imports. Where there is many times that room, as mostly for small bases, the shapes of weights will do.
"""

import math

from training.memory import FP32, FRAGMENTED, LIBRARIES
from training.pipeline import BaseInfo
from training.recipe import Run
from training.shapes import weight_shapes

COPIES = 16  # of all parameters: base, masters, moments, gradients, average, buffers, a checkpoint; at most 15 at once
OUTPUTS = 8  # tensors of the size of a layer's output that are alive for it: norms, activations, residuals, gradients
HEAD = 8  # channels of the smallest head of attention; Stable Diffusion's have 40 and more


def memory_ceiling(base: BaseInfo, run: Run, device: str) -> int:
    """Bytes that no worker of a run exceeds, on its device and in the memory of the CPU together.

    It takes every layer to see the latents at their full size and every row to be one worker's.
    """
    parts = {part: weight_shapes(base, part) for part in base.kind.parts}
    parameters = 1.1 * sum(
        math.prod(shape) for shapes in parts.values() for shape in shapes.values()
    )  # and biases
    rows, unet = 2 * run.train.pairs_per_step, parts[base.kind.denoiser]
    # the transformer of SD3 sees text and latents in one sequence
    places = base.latent_size**2 + (base.text_tokens if base.kind.flow else 0)
    kept = (
        rows
        * OUTPUTS
        * (
            places * sum(shape[0] for shape in unet.values())
            + base.text_tokens * sum(shape[0] for part in base.kind.texts for shape in parts[part].values())
        )
    )
    scores = (
        rows
        * OUTPUTS
        * sum(
            shape[0] / HEAD * places * max(places, base.text_tokens)
            for name, shape in unet.items()
            if name.endswith("to_q.weight")
        )
    )
    draws = OUTPUTS * base.image_size**2 * sum(shape[0] for shape in parts["vae"].values())
    heap = 1 + max(FRAGMENTED.values())
    return LIBRARIES[device] + int(FP32 * (COPIES * parameters + heap * (kept + scores + draws)))
