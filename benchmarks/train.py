"""This file is where one subject's training is measured beside the diffusers DreamBooth script.

`python -m benchmarks.train --peer PATH/train_dreambooth.py [--steps 20] [--rounds 3] [--json]`

Same base, photos and class images, full method with text encoder and prior preservation, one pair per step, fp32, one
thread. Both are whole processes, run in turn; a step costs the difference of two lengths of run, so that start-up does
not count. CPU time is used because it does not depend on what else the machine does; medians over rounds.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from pocket.subject import SUBJECT_CLASS, write_photos
from training.draw import Drawer
from training.pipeline import open_base
from training.png import encode_png
from training.request import DrawRequest
from training.studio import Studio

CLASS_IMAGES = 8


@dataclass(frozen=True)
class Spent:
    """What a process used."""

    cpu_s: float
    peak_mib: float


def measure(command: Sequence[str]) -> Spent:
    """Run a process to its end at one thread; its CPU seconds and peak resident memory."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{said.read().decode()[-3000:]}")
    return Spent(used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


def peer_command(script: Path, base: Path, work: Path, steps: int) -> list[str]:
    """The peer's own command line for the same work."""
    noun = SUBJECT_CLASS
    return [
        *(sys.executable, "-m", "benchmarks.peer", str(script)),
        *("--pretrained_model_name_or_path", str(base), "--output_dir", str(work / "peer")),
        *("--instance_data_dir", str(work / "photos"), "--instance_prompt", f"a photo of zwx {noun}"),
        *("--class_data_dir", str(work / "class"), "--class_prompt", f"a photo of {noun}"),
        *("--with_prior_preservation", "--num_class_images", str(CLASS_IMAGES), "--train_text_encoder"),
        *("--resolution", "64", "--center_crop", "--train_batch_size", "1", "--max_train_steps", str(steps)),
        *("--learning_rate", "1e-4", "--lr_scheduler", "constant", "--lr_warmup_steps", "0"),
        *("--mixed_precision", "no", "--checkpointing_steps", "1000000", "--seed", "0"),
    ]


def our_command(work: Path, steps: int, *more: str) -> list[str]:
    """Our loop for the same work."""
    return [
        *(sys.executable, "-m", "benchmarks.ours", "--photos", str(work / "photos")),
        *("--class-images", str(work / "class"), "--class", SUBJECT_CLASS),
        *("--steps", str(steps), "--out", str(work / "ours"), *more),
    ]


def prepare(work: Path) -> None:
    """The photos and the class images that both sides read."""
    write_photos(work / "photos")
    (work / "class").mkdir()
    drawer = Drawer(open_base("pocket"))
    asked = [DrawRequest(f"a photo of a {SUBJECT_CLASS}", seed, steps=10) for seed in range(CLASS_IMAGES)]
    for number, image in enumerate(drawer.draw(asked)):
        (work / "class" / f"{number}.png").write_bytes(encode_png(image, None))


def guidance_ratio(rounds: int) -> float:
    """CPU time of guidance in two forwards over that of guidance in one, same images, by the median."""
    import torch

    from training.conditioning import Conditioning, predict

    torch.set_num_threads(1)
    studio = Studio(open_base("pocket"))
    base = studio.base
    x = torch.randn(2, base.latent_channels, base.latent_size, base.latent_size)
    text = torch.randn(2, base.token_limit, studio.unet.config.cross_attention_dim)  # type: ignore[union-attr]
    told, steps = Conditioning(text), torch.tensor([500, 500])

    def one() -> None:
        predict(studio.unet, x, steps, told)

    def two() -> None:
        for row in range(2):
            predict(studio.unet, x[row : row + 1], steps[row : row + 1], told[row : row + 1])

    with torch.inference_mode():
        times = [(cpu_of(two), cpu_of(one)) for _ in range(10 * rounds)]
    return median(t for t, _ in times[rounds:]) / median(o for _, o in times[rounds:])


def cpu_of(work: Callable[[], None]) -> float:
    """CPU seconds of this process for a piece of work."""
    began = time.process_time()
    work()
    return time.process_time() - began


def run(peer: Path, steps: int, rounds: int) -> dict[str, Any]:
    """All figures."""
    long = 3 * steps
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        prepare(work)
        base = open_base("pocket").path
        spent: dict[str, list[Spent]] = {
            "peer": [],
            "peer_long": [],
            "ours": [],
            "ours_long": [],
            "whole": [],
        }
        commands = {
            "peer": peer_command(peer, base, work, steps),
            "ours": our_command(work, steps),
            "peer_long": peer_command(peer, base, work, long),
            "ours_long": our_command(work, long),
            "whole": our_command(work, steps, "--vae", "trained"),
        }
        for number in range(rounds):
            for name, command in commands.items():  # in turn, so that a busy neighbour hits all alike
                spent[name].append(measure(command))
            print(f"round {number + 1} of {rounds} done", file=sys.stderr, flush=True)
    figures: dict[str, Any] = {"steps": [steps, long], "rounds": rounds, "load": os.getloadavg()}
    for side in ("peer", "ours"):
        pairs = list(zip(spent[side], spent[f"{side}_long"], strict=True))
        step_s = median((b.cpu_s - a.cpu_s) / (long - steps) for a, b in pairs)
        figures[side] = {
            "step_ms": round(1000 * step_s, 1),
            "startup_s": round(median(a.cpu_s for a, _ in pairs) - steps * step_s, 1),
            "peak_mib": round(median(b.peak_mib for _, b in pairs)),
        }
    figures["step_ratio"] = round(figures["peer"]["step_ms"] / figures["ours"]["step_ms"], 2)
    # what importing alone takes says nothing about a method, and is most of the memory of so small a model
    imports = measure([sys.executable, "-c", "import benchmarks.ours, deepspeed"]).peak_mib
    whole, frozen = (median(s.peak_mib for s in spent[name]) - imports for name in ("whole", "ours"))
    figures["imports_peak_mib"] = round(imports)
    figures["whole_model_over_imports_mib"] = round(whole)
    figures["vae_frozen_over_imports_mib"] = round(frozen)
    figures["guidance_two_over_one"] = round(guidance_ratio(rounds), 2)
    return figures


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--peer", type=Path, required=True, help="diffusers' examples/dreambooth/train_dreambooth.py"
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    figures = run(options.peer, options.steps, options.rounds)
    if options.json:
        print(json.dumps(figures))
        return
    print(f"{'':<6}{'step, CPU ms':>14}{'start-up, CPU s':>18}{'peak, MiB':>12}")
    for side in ("peer", "ours"):
        f = figures[side]
        print(f"{side:<6}{f['step_ms']:>14}{f['startup_s']:>18}{f['peak_mib']:>12}")
    print(f"a step of ours is {figures['step_ratio']}x cheaper (goal 1.25)")
    print(
        f"over the {figures['imports_peak_mib']} MiB of the libraries, training takes "
        f"{figures['vae_frozen_over_imports_mib']} MiB, and with the VAE's encoder trained too "
        f"{figures['whole_model_over_imports_mib']} MiB"
    )
    print(f"guidance in two forwards costs {figures['guidance_two_over_one']}x that in one")
    print(f"load average {figures['load'][0]:.1f}")


if __name__ == "__main__":
    main()
