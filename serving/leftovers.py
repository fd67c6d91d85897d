"""This file is where the ingress lets go of a subject: what it drew and kept of it, and photos that came for it."""

import math
import time
from dataclasses import dataclass

from cluster.storage import Storage
from serving.predictions import PredictionStore
from serving.presence import Presence
from serving.training_order import TrainingStore


@dataclass(frozen=True)
class Leftovers:
    """What went, and what did not."""

    removed: list[str]
    kept: list[str]


def erase_leftovers(storage: Storage, subject: str) -> Leftovers:
    """Remove images behind URLs, predictions, photos and requests of a subject.

    A prediction that is being drawn is given up by whoever draws it, which keeps no image of a subject that is gone.

    Args:
        storage: The root.
        subject: Its stored name.
    """
    removed, kept = [], []
    for tenant in storage.names("outputs"):
        folder = f"outputs/{tenant}/{subject}"
        removed += [f"{folder}/{name}" for name in storage.names(folder)]
        storage.remove(folder)
    predictions = PredictionStore(storage, Presence(storage, 1.0), time.time, math.inf)
    for prediction in predictions.of_subject(subject):
        if prediction.ended:
            predictions.remove(prediction)
            removed.append(prediction.folder)
        else:
            predictions.wish_cancelled(prediction)
            kept.append(f"{prediction.folder}: it is cancelled, and goes without images when it expires")
    trainings = TrainingStore(storage, time.time, math.inf)
    for tenant in storage.names("trainings"):
        cursor: str | None = ""
        while cursor is not None:
            page, cursor = trainings.page(tenant, cursor, 200)
            for training in (each for each in page if each.stored == subject):
                trainings.settle(training.id)
                storage.remove(f"trainings/{tenant}/{training.id}.json")
                removed.append(f"trainings/{tenant}/{training.id}.json")
    return Leftovers(removed, kept)
