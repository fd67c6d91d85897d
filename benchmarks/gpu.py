"""This file is where training and drawing are measured at true sizes on a GPU, beside diffusers' scripts.

    python -m benchmarks.gpu [--full PATH/train_dreambooth.py] [--lora PATH/train_dreambooth_lora.py]
        [--bases sd15 sdxl] [--cases full-0 full-2 lora-0 lora-2 bank serve] [--steps 20] [--folder DIR] [--json]
    python -m benchmarks.gpu --tiny --device cpu     # the same code on tiny bases, to see that it works

Bases of random weights: bf16, one pair of subject and class, latents cached; `full` with the text encoder, at ZeRO 0
and 2 on one worker; the bank at K = 1, 4, 8; the serving engine at 1 to 16 images at once. Each case is a process. A
share is of the matrix rate that is measured first, a product of two bf16 matrices of 8192 squared; the engine draws in
fp32. The scripts are run unchanged on the same work (sd15 alone), in two lengths, so that their start does not count;
they encode images at every step, which is no part of the share.

Exit code 2 where there is no GPU, 1 when a case failed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.random_base import TINY, TRUE, write_base
from cluster.errors import UserError
from training.pipeline import BaseInfo, open_base
from training.png import encode_png

CASES = ("full-0", "full-2", "lora-0", "lora-2", "bank", "serve")
BANK, WIDTHS = (1, 4, 8), (1, 2, 4, 8, 16)
RANK = 4  # the peer's default
PEAK = "peak_bytes "  # how benchmarks.peer says what torch allocated

Row = dict[str, Any]


def tried(command: Sequence[str]) -> tuple[str, str, float]:
    """What a process said, why it failed (empty: it did not), and its wall seconds."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    took = time.perf_counter() - began
    lines = done.stderr.strip().splitlines() or ["it said nothing"]
    return done.stdout, lines[-1][:300] if done.returncode else "", took


def ours(case: str, folder: str, options: Mapping[str, Any]) -> list[Row]:
    """The rows of one of our cases."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "benchmarks.gpu_cases",
        case,
        folder,
        json.dumps(options),
    ]
    said, failed, _ = tried(command)
    rows: list[Row] = [{"error": failed}] if failed else json.loads(said.splitlines()[-1])
    return [{"case": case, "side": "ours", **row} for row in rows]


def theirs(script: Path, method: str, base: BaseInfo, work: Path, options: Mapping[str, Any]) -> Row:
    """A script of the peer on the same work: wall time of a step by the difference of two lengths of run."""
    row: Row = {"case": method, "side": "peer"}
    steps, took, peak = options["peer_steps"], list[float](), 0
    for length in (steps, 3 * steps):
        command = [
            *(sys.executable, "-m", "benchmarks.peer", str(script)),
            *(
                "--pretrained_model_name_or_path",
                str(base.path),
                "--output_dir",
                str(work / f"peer-{method}"),
            ),
            *("--instance_data_dir", str(work / "photos"), "--instance_prompt", "a photo of a zwx dog"),
            *("--class_data_dir", str(work / "class"), "--class_prompt", "a photo of a dog"),
            *("--with_prior_preservation", "--num_class_images", "8", "--prior_loss_weight", "1.0"),
            *("--resolution", str(base.image_size), "--center_crop"),
            *("--train_batch_size", str(options["pairs"]), "--max_train_steps", str(length)),
            *("--learning_rate", "1e-4", "--lr_scheduler", "constant", "--lr_warmup_steps", "0"),
            *("--mixed_precision", "bf16", "--checkpointing_steps", "1000000", "--seed", "0"),
            *(("--train_text_encoder",) if method == "full" else ("--rank", str(RANK))),
        ]
        said, failed, seconds = tried(command)
        if failed:
            return {**row, "error": failed}
        took.append(seconds)
        peak = max([peak, *(int(line[len(PEAK) :]) for line in said.splitlines() if line.startswith(PEAK))])
    step_s = (took[1] - took[0]) / (2 * steps)
    if step_s <= 0:
        return {**row, "error": f"{3 * steps} steps took no longer than {steps}: raise --peer-steps"}
    told = {"step_ms": 1000 * step_s, "images_per_s": 2 * options["pairs"] / step_s}
    return {**row, **told, **({"peak_mb": peak / 1e6} if peak else {})}


def pictures(work: Path, side: int) -> None:
    """Photos and class images of noise, for the peer."""
    noise = np.random.default_rng(0)
    for name, count in (("photos", 4), ("class", 8)):
        (work / name).mkdir()
        for number in range(count):
            pixels = noise.integers(0, 256, (side, side, 3), np.uint8)
            (work / name / f"{number}.png").write_bytes(encode_png(pixels, None))


def of_base(
    name: str, asked: argparse.Namespace, options: Mapping[str, Any], rate: float, folder: Path
) -> list[Row]:
    """Every row of a base; a kind that cannot be opened is one row that says why."""
    try:
        with tempfile.TemporaryDirectory() as small:  # before gigabytes are written for nothing
            open_base(str(write_base(Path(small) / name, TINY[name])))
    except UserError as error:
        why = f"such a base cannot be opened yet ({error.seen})"
        return [{"base": name, "case": "all", "side": "ours", "error": why}]
    place = folder / f"{'tiny-' if asked.tiny else ''}{name}"
    if not (place / "model_index.json").is_file():
        say(f"{name}: writing random weights into {place}")
        write_base(place, (TINY if asked.tiny else TRUE)[name], asked.device)
    rows: list[Row] = []
    base = open_base(str(place))
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        pictures(work, base.image_size)
        for case in asked.cases:
            say(f"{name}: {case}")
            rows += ours(case, str(place), options)
        for method, script in (("full", asked.full), ("lora", asked.lora)):
            if script and name == "sd15":
                say(f"{name}: {script.name}")
                rows.append(theirs(script, method, base, work, options))
    works = {row["case"]: row["tflop"] for row in rows if "tflop" in row and "width" not in row}
    for row in rows:
        # the peer trains the same, and beside it encodes; what that takes is no work that counts
        work_done = works.get(row["case"] if row["side"] == "ours" else f"{row['case']}-0")
        if row["case"] == "bank":
            work_done = works.get("lora-0", 0.0) * row["width"] or None
        if "step_ms" in row and work_done and "tflop_per_s" not in row:
            row |= {"tflop": work_done, "tflop_per_s": 1000 * work_done / row["step_ms"]}
        if "tflop_per_s" in row:
            row["share"] = row["tflop_per_s"] / rate
    return [{"base": name, **row} for row in rows]


def say(text: str) -> None:
    """Tell people how far it is."""
    print(text, file=sys.stderr, flush=True)


def table(rows: Sequence[Row]) -> list[str]:
    """The rows as Markdown, for RESULTS.md."""
    lines = [
        "| base | case | | step, ms | images/s | memory, MB | share of the matrix rate |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        unit = "images" if row["case"] == "serve" else "K"
        case = f"{row['case']}, {unit} = {row['width']}" if "width" in row else row["case"]
        if "error" in row:
            lines.append(f"| {row['base']} | {case} | {row['side']} | not measured: {row['error']} | | | |")
            continue
        share = f"{100 * row['share']:.1f} %" if "share" in row else ""
        memory = f"{row['peak_mb']:.0f}" if "peak_mb" in row else ""
        figures = f"{row['step_ms']:.1f} | {row['images_per_s']:.2f} | {memory} | {share}"
        lines.append(f"| {row['base']} | {case} | {row['side']} | {figures} |")
    return lines


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", type=Path, help="diffusers' examples/dreambooth/train_dreambooth.py")
    parser.add_argument("--lora", type=Path, help="diffusers' examples/dreambooth/train_dreambooth_lora.py")
    parser.add_argument("--bases", nargs="+", choices=list(TRUE), default=list(TRUE))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--steps", type=int, default=20, help="training steps that are measured")
    parser.add_argument(
        "--peer-steps",
        type=int,
        default=200,
        help="of a script's shorter run; enough to tell them from its start",
    )
    parser.add_argument("--draw-steps", type=int, default=25, help="denoising steps of an image")
    parser.add_argument("--pairs", type=int, default=1, help="pairs of subject and class in a training step")
    parser.add_argument("--folder", type=Path, help="keeps the bases (4 GB and 14 GB) for the next time")
    parser.add_argument("--tiny", action="store_true", help="tiny bases: whether it works, not how fast")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def no_gpu(as_json: bool) -> int:
    """Say that there is no GPU; the exit code."""
    error = UserError(
        "there is no GPU to measure", "torch sees no CUDA device", "to see it work: --tiny --device cpu"
    )
    print(
        json.dumps({"error": error.as_json()}) if as_json else error,
        file=sys.stdout if as_json else sys.stderr,
    )
    return error.exit_code


def main() -> int:
    """Measure what was asked for and print it; returns the exit code."""
    asked = arguments()
    if asked.device == "cuda" and not torch.cuda.is_available():
        return no_gpu(asked.json)
    options = {
        "device": asked.device,
        "steps": asked.steps,
        "peer_steps": asked.peer_steps,
        "draw_steps": asked.draw_steps,
        "pairs": asked.pairs,
        "rank": RANK,
        "bank": BANK,
        "widths": WIDTHS,
    }
    machine = torch.cuda.get_device_name() if asked.device == "cuda" else f"{os.cpu_count()} CPU cores"
    say("the matrix rate")
    [rate] = ours("rate", "", options)
    if "error" in rate:
        raise SystemExit(rate["error"])
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in asked.bases:
            rows += of_base(name, asked, options, rate["tflop_per_s"], asked.folder or Path(scratch))
    told = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine,
        "torch": torch.__version__,
        "tiny": asked.tiny,
        **options,
        "matrix_tflop_per_s": rate["tflop_per_s"],
        "rows": rows,
    }
    if asked.json:
        print(json.dumps(told))
    else:
        what = "tiny bases, whose figures mean nothing" if asked.tiny else "true sizes, random weights"
        print(f"{told['date']}, {machine}, torch {told['torch']}, {what}; bf16, {asked.pairs} pairs a step,")
        print(f"images of {asked.draw_steps} steps; bf16 matrices {rate['tflop_per_s']:.2f} TFLOP/s\n")
        print("\n".join(table(rows)))
    return int(any("error" in row for row in rows if row["case"] != "all"))


if __name__ == "__main__":
    sys.exit(main())
