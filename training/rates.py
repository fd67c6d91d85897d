"""This file is where the learning rate of a step is: a function of the step and nothing else.

n steps of the run, w of them warm-up.
"""

import math

from training.recipe import Train

LOWEST = 1e-7  # where `polynomial` ends, as diffusers' does


def learning_rate(lr: float, step: int, train: Train) -> float:
    """The learning rate of step `step` (from 0) of a part whose full rate is `lr`.

    It rises linearly over the warm-up, and no step of it is wasted on a rate of 0; it is full at step w. From there
    `constant` stays, `linear` and `cosine` fall to 0 at step n, which is the first that is not taken any more, and
    `polynomial` (of power 1) to 1e-7.

    Source:
        diffusers.optimization, but for the warm-up, which there is step / w.
    """
    warmup = train.warmup_steps
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    left = 1.0 - min(1.0, (step - warmup) / max(1, train.steps - warmup))
    match train.lr_scheduler:
        case "constant":
            return lr
        case "linear":
            return lr * left
        case "cosine":
            return lr * 0.5 * (1.0 - math.cos(math.pi * left))
        case "polynomial":
            lowest = min(lr, LOWEST)
            return lowest + (lr - lowest) * left
