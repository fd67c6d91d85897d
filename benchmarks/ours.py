"""This file is where our training loop is run alone, without Ray, on the work the peer's script is given.

`python -m benchmarks.ours --base B --photos DIR --class-images DIR --class NOUN --steps N [--method M]
[--vae frozen|trained]`

It is the loop, the engine and the module of a gang's rank. What Ray adds is start-up, which `raybooth train` reports.
`--vae trained` is no mode of ours: it also runs and trains the VAE, to measure what freezing it saves.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from training.batches import Batches
from training.cuts import crops
from training.dataplan import DataPlan
from training.defaults import with_defaults
from training.engine import TrainingEngine, zero_stage
from training.intake import read_photos
from training.lease import LatentTable, Lease
from training.loop import ResidentBase, build_module
from training.module import DreamBoothModule
from training.objective import PairBatch
from training.pipeline import encode_image, load_tokenizer, load_vae, open_base, token_ids
from training.recipe import Data, Run


class WholeModule(nn.Module):
    """UNet, text encoder and VAE encoder trained together: the fine-tuning that freezing the VAE is compared with."""

    def __init__(
        self, module: DreamBoothModule, vae: nn.Module, image_size: int, scaling_factor: float
    ) -> None:
        super().__init__()
        self.module, self.vae = module, vae.train().requires_grad_(True)
        self.size, self.scaling_factor = image_size, scaling_factor

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The module's groups; the VAE's encoder is trained at the UNet's learning rate."""
        groups = dict(self.module.parameter_groups())
        groups["unet"] = [*groups["unet"], *self.vae.encoder.parameters()]  # type: ignore[union-attr,operator]
        return groups

    def forward(self, batch: PairBatch) -> Any:
        """The loss, with latents made from pixels inside."""
        pixels = torch.rand(len(batch.latents), 3, self.size, self.size) * 2 - 1
        mean, _ = encode_image(self.vae, pixels)
        fields = {**vars(batch), "latents": mean * self.scaling_factor}
        return self.module(PairBatch(**fields))


def table(base: Any, folder: Path) -> LatentTable:
    """The latents of every image in a folder."""
    vae, means, stds = load_vae(base), [], []
    with torch.inference_mode():
        for photo in read_photos([str(folder)], base.image_size).photos:
            [pixels] = crops(photo.png, base.image_size, Data())
            image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None].float() / 127.5 - 1
            mean, std = encode_image(vae, image)
            means.append(mean[0].numpy())
            stds.append(std[0].numpy())
    return LatentTable(np.stack(means), np.stack(stds))


def main() -> None:
    """Train `--steps` steps and save the weights, as the peer's script does."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="pocket")
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--class-images", type=Path, required=True)
    parser.add_argument("--class", dest="noun", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--method", default="full")
    parser.add_argument("--vae", choices=["frozen", "trained"], default="frozen")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    spec = {
        "base": {"model": options.base},
        "subject": {"name": "bench", "class": options.noun, "images": [str(options.photos)]},
        "train": {"method": options.method, "steps": options.steps, "pairs_per_step": 1},
        "engine": {"precision": "fp32"},
    }
    run = Run.model_validate(with_defaults(spec))
    base = open_base(options.base)
    prompts = [f"a photo of zwx {options.noun}", f"a photo of {options.noun}"]
    ids = token_ids(load_tokenizer(base), prompts, base.token_limit)
    subject, of_class = table(base, options.photos), table(base, options.class_images)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    resident = ResidentBase.load(options.base, base.revision, torch.device("cpu"))
    lease = Lease(
        run.model_dump(by_alias=True), "bench", "v1", base.model, base.revision, "", [], [], *ids.tolist(), {}
    )
    stage = zero_stage(run.engine, run.train, 1)
    module: Any = build_module(resident, run, lease, stage)
    plan = DataPlan(0, len(subject), len(of_class), 1, 1000, run.prior.weight)
    batches = Batches(plan, (subject, of_class), ids, base.scaling_factor, 0, 1, 1, torch.device("cpu"))
    if options.vae == "trained":
        module = WholeModule(module, load_vae(base), base.image_size, base.scaling_factor)
    engine = TrainingEngine(module, run.train, stage, 1)
    for step in range(options.steps):
        engine.step(step, list(batches.of_step(step)))
    options.out.mkdir(parents=True, exist_ok=True)
    torch.save({name: p.detach() for name, p in module.named_parameters()}, options.out / "weights.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
