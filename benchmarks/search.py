"""This file is where it is measured whether the metrics order what is known, and whether a search finds a recipe.

    python -m benchmarks.search --work DIR [--trials 24] [--steps 200] [--json]

On the pocket base, with invented subjects whose photos anybody can draw again. First known cases: what the base draws
of the class, a run of few steps, one of the default recipe, one that trains five times as long without a prior, photos.
Then `raybooth tune` on three subjects, and the recipe it finds beside the default one on four others that took no part:
two of the same classes, two of classes it has not seen. The work folder keeps what is done: the same command goes on.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from cluster.storage import Storage
from orchestrator.gate import gained
from pocket.subject import subject_photos
from training.critic import Scores, worth
from training.scores import Estimate

SOUGHT = {"robot-1": "robot", "cup-2": "cup", "gift-3": "gift"}
HELD = {"robot-4": "robot", "cup-5": "cup", "fish-6": "fish", "mushroom-7": "mushroom"}
CASE = "robot-4"
SPACE = {
    "train": {
        "lr": {"low": 4e-4, "high": 6e-3, "log": True},
        "lora": {"rank": [8, 16, 32, 64]},
        "objective": {"weighting": ["none", "min_snr"]},
    },
    "prior": {"weight": [0.5, 1.0, 2.0]},
}
UNDER = 20  # steps


def write_photos(work: Path) -> None:
    """Four photos of each subject."""
    for name, noun in (SOUGHT | HELD).items():
        folder = work / "photos" / name
        folder.mkdir(parents=True, exist_ok=True)
        for number, photo in enumerate(subject_photos(noun, int(name.rpartition("-")[2]))):
            photo.save(folder / f"{number}.png")


def campaign(work: Path, name: str, subjects: Sequence[Mapping[str, Any]], steps: int) -> Path:
    """Write a manifest."""
    defaults = {
        "base": {"model": "pocket"},
        "train": {"steps": steps},
        "validate": {"every": 0},
        "checkpoint": {"every": steps},
    }
    path = work / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"name": name, "defaults": defaults, "subjects": list(subjects)}))
    return path


def subject(work: Path, name: str, called: str, **sections: Any) -> dict[str, Any]:
    """A subject's entry in a manifest, under a name that tells how it was trained."""
    noun = (SOUGHT | HELD)[name]
    return {"name": called, "class": noun, "images": str(work / "photos" / name), **sections}


def raybooth(work: Path, *arguments: str) -> dict[str, Any]:
    """Run the command; returns what `--json` says. Its bars are ours."""
    command = [sys.executable, "-m", "orchestrator", *arguments, "--storage", str(work / "root"), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments[:3])} ended with {done.returncode}: {done.stdout[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def scores_of(work: Path, name: str) -> dict[str, Scores]:
    """The scores of a campaign's subjects."""
    answer = raybooth(work, "evaluate", name, "-n", "2")
    return {
        one["subject"]: Scores.from_json(json.loads(Path(one["file"]).read_text()))
        for one in answer["subjects"]
    }


def cases(work: Path, steps: int) -> dict[str, dict[str, float]]:
    """What is found of known cases, from the least to the most trained."""
    entries = [
        subject(work, CASE, "under", train={"steps": UNDER}),
        subject(work, CASE, "good"),
        subject(work, CASE, "without-prior", prior={"weight": 0.0}),
        subject(work, CASE, "over", train={"steps": 5 * steps}, prior={"weight": 0.0}),
    ]
    raybooth(work, "campaign", "run", str(campaign(work, "cases", entries, steps)))
    found = scores_of(work, "cases")
    any_of = found["good"]
    table = {"base": {"dino": any_of.base["dino"].value}}
    for name in ("under", "good", "without-prior", "over"):
        one = found[name]
        table[name] = {key: value.value for key, value in one.metrics.items()}
        table[name]["drift"] = one.drift.value if one.drift else 0.0
    table["photos"] = {"dino": any_of.ceiling["dino"].value}
    return table


def order(table: Mapping[str, Mapping[str, float]]) -> dict[str, bool]:
    """Which known orders the metrics have."""
    likeness = [table[name]["dino"] for name in ("base", "under", "good", "photos")]
    return {
        "DINO: base < under-trained < good < photos": likeness == sorted(likeness),
        "PRES: good < without prior": table["good"]["pres"] < table["without-prior"]["pres"],
        "drift: good < over-trained": table["good"]["drift"] < table["over"]["drift"],
        "copies: good <= over-trained": table["good"]["copies"] <= table["over"]["copies"],
        "CLIP-T: over-trained < good": table["over"]["clip_t"] < table["good"]["clip_t"],
    }


def search(work: Path, trials: int, steps: int) -> dict[str, Any]:
    """The study, and what its recipe is worth on subjects that took no part."""
    (work / "space.yaml").write_text(yaml.safe_dump(SPACE))
    sought = [subject(work, name, name) for name in SOUGHT]
    manifest = campaign(work, "search", sought, steps)
    study = raybooth(
        work, "tune", str(manifest), "--space", str(work / "space.yaml"), "--trials", str(trials)
    )
    storage = Storage(str(work / "root"))
    records = [
        storage.read_json(f"studies/search/trials/{name}") for name in storage.names("studies/search/trials")
    ]
    starts = [seconds for record in records for row in record["rows"] for seconds in row.get("start_s", ())]
    scores: dict[str, dict[str, Scores]] = {}
    for name, more in (("default", ()), ("found", ("--recipe", "search"))):
        held = [subject(work, one, f"{name}-{one}") for one in HELD]
        path = campaign(work, name, held, steps)
        if more:  # the number of steps is the recipe's
            described = yaml.safe_load(path.read_text())
            del described["defaults"]["train"], described["defaults"]["checkpoint"]
            path.write_text(yaml.safe_dump(described))
        raybooth(work, "campaign", "run", str(path), *more)
        scores[name] = scores_of(work, name)
    pairs = [(scores["found"][f"found-{one}"], scores["default"][f"default-{one}"]) for one in HELD]
    gain = gained(pairs)
    assert gain is not None
    return {
        "values": study["values"],
        "step": study["step"],
        "trials": study["trials"],
        "share_of_grid": study["steps_spent"] / study["steps_of_grid"],
        "seconds": study["seconds"],
        "start_s": {"first": max(starts), "median": median(starts)},
        "gain_on_sought": study["gain"],
        "gain_on_held_out": gain.as_json(),
        "better": gain.low > 0,
        "held_out": {
            name: {one.removeprefix(f"{name}-"): round(worth(of), 4) for one, of in found.items()}
            for name, found in scores.items()
        },
        "page": study["page"],
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="a folder that is kept")
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    work: Path = arguments.work.resolve()
    write_photos(work)
    table = cases(work, arguments.steps)
    found = search(work, arguments.trials, arguments.steps)
    result = {"cases": table, "order": order(table), "search": found}
    print(json.dumps(result) if arguments.json else told(result))


def told(result: Mapping[str, Any]) -> str:
    """The same for people."""
    columns = ("dino", "clip_i", "clip_t", "pres", "drift", "div", "copies")
    lines = ["| case | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in result["cases"].items():
        lines.append(f"| {name} | " + " | ".join(f"{row[c]:.3f}" if c in row else "" for c in columns) + " |")
    lines += ["", *(f"{'yes' if holds else 'NO '}  {rule}" for rule, holds in result["order"].items()), ""]
    found = result["search"]
    gain = Estimate(**found["gain_on_held_out"])
    lines += [
        f"{found['trials']} trials in {found['seconds']:.0f} s, {found['share_of_grid']:.0%} of the grid's steps",
        "training began {median:.2f} s after a lease (median), {first:.1f} at most".format(
            **found["start_s"]
        ),
        f"best: {found['values']} at step {found['step']}",
        f"on subjects that took no part: {gain.value:+.3f} ({gain.low:+.3f} to {gain.high:+.3f}) beside the defaults",
        f"worth: {found['held_out']}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
