"""A study: what it decides, what its page shows, and that it goes on where it was broken off."""

import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.errors import UserError
from cluster.storage import Storage
from orchestrator.importance import importances
from orchestrator.plots import bars, curves, scatter
from orchestrator.progress import Lines
from orchestrator.space import parse_space
from orchestrator.spec import parse_run
from orchestrator.study import rungs, searching
from orchestrator.study_spec import StudySpec
from orchestrator.tuning import front, run_study
from pocket.subject import subject_photos
from training.recipe import Run


def record(dino: float, clip_t: float, drift: float, **values: Any) -> dict[str, Any]:
    row = {"dino": dino, "clip_t": clip_t, "drift": drift, "step": 9, "steps_spent": 9}
    return {"values": values, "state": "done", "rows": [{**row, "worth": dino + clip_t - max(drift, 0)}]}


@pytest.mark.parametrize(
    ("steps", "expected"), [(200, (22, 67, 200)), (9, (1, 3, 9)), (2, (1, 2)), (1, (1,))]
)
def test_rungs_are_a_third_of_each_other_and_end_at_the_budget(steps: int, expected: tuple[int, ...]) -> None:
    assert rungs(steps) == expected


def test_the_front_has_what_nothing_else_beats_in_everything() -> None:
    trials = {
        "likeness": record(0.9, 0.1, 0.0),
        "obedience": record(0.5, 0.3, 0.0),
        "beaten": record(0.5, 0.2, 0.1),
        "kept": record(0.5, 0.3, -0.1),  # a drift below 0 is no merit: as good as `obedience`
    }
    assert {one["trial"] for one in front(trials)} == {"likeness", "obedience", "kept"}


def test_the_setting_that_decides_is_the_important_one() -> None:
    space = parse_space({"train.lr": {"low": 0, "high": 1}, "prior.weight": {"low": 0, "high": 1}})
    trials = {
        str(i): record(i / 20, 0, 0, **{"train.lr": i / 20, "prior.weight": (7 * i % 20) / 20})
        for i in range(20)
    }
    found = importances(trials, space)
    assert found["train.lr"] > 0.8 > 0.2 > found["prior.weight"]
    assert importances(dict(list(trials.items())[:3]), space) == {}  # chance


def test_a_search_that_goes_on_chooses_what_it_did_not_choose_before() -> None:
    space = parse_space({"train.lr": {"low": 1e-4, "high": 1e-2, "log": True}, "train.lora.rank": [8, 16]})
    recipes: list[dict[str, Any]] = [{"train.lr": 1e-3, "train.lora.rank": 8}]
    for known in (1, 3, 5):  # begun, and broken off twice after two more
        search = searching(space, recipes, seed=0)
        chosen = [search.suggest(f"trial-{i}") for i in range(known + 2)]
        assert chosen[:known] == recipes
        assert not [one for one in chosen[known:] if one in recipes]
        recipes = chosen


def test_plots_are_svg_with_their_words_and_always_the_same() -> None:
    points = {"a": (0.1, 0.2), "b": (0.3, 0.1)}
    plots = [
        scatter(points, ["a", "b"], {"a": "best"}, "obedience", "likeness"),
        curves({"a": [(1, 0.1), (3, 0.2)], "b": [(1, 0.1)]}, {"a": "best"}, "steps", "worth"),
        bars({"train.lr": 0.9, "prior.weight": 0.1}, "share"),
    ]
    for plot, words in zip(plots, ("obedience", "steps", "train.lr"), strict=True):
        ET.fromstring(plot)
        assert words in plot and plot.startswith("<svg")
    assert scatter(points, ["a", "b"], {"a": "best"}, "obedience", "likeness") == plots[0]


# -- on Ray ------------------------------------------------------------------------------------------------


@pytest.fixture
def spec(tiny_base: Path, tmp_path: Path) -> StudySpec:
    """Two subjects of the tiny base, three recipes and three steps."""
    runs: list[Run] = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for number, photo in enumerate(subject_photos("robot", len(runs), 2)):
            photo.save(tmp_path / name / f"{number}.png")
        raw = {
            "base": {"model": str(tiny_base)},
            "subject": {"name": name, "class": "dog", "images": [str(tmp_path / name)]},
            "prior": {"num_images": 2, "steps": 2},
            "train": {"lr": 1e-3},
        }
        runs.append(parse_run(raw))
    return StudySpec(
        name="night",
        runs=tuple(runs),
        space=parse_space({"train.lr": [1e-4, 1e-2], "prior.weight": [0.0, 1.0]}),
        trials=3,
        search="grid",
        steps=3,
        num_images=2,
        prompts=("a photo of {subject}", "{subject} on the beach"),
        dino="pocket",
        clip="pocket",
    )


def read(storage: Storage) -> dict[str, dict[str, Any]]:
    names = storage.names("studies/night/trials")
    return {name: storage.read_json(f"studies/night/trials/{name}") for name in names}


COUNT = """<script>
const wide = (all, width) => [...all].filter(one => width(one) > 10).length;
onload = () => document.title = JSON.stringify({
    plots: wide(document.querySelectorAll("svg"), one => one.getBoundingClientRect().width),
    pictures: wide(document.images, one => one.naturalWidth),
});
</script>"""


def shown(browser: str, page: str, folder: Path) -> dict[str, int]:
    """How many plots and pictures a browser shows."""
    # the page lets no script run
    counted = re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', "", page) + COUNT
    (folder / "page.html").write_text(counted, "utf-8")
    quietly = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command = [browser, *quietly, "--dump-dom", (folder / "page.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    found = re.search("<title>(.*?)</title>", dom)
    assert found
    counts: dict[str, int] = json.loads(found[1])
    return counts


@pytest.mark.slow
def test_a_study_that_was_broken_off_goes_on_and_ends_with_a_recipe(
    spec: StudySpec,
    storage: Storage,
    tmp_path: Path,
    one_ray: None,
    break_off: Callable[[StudySpec, int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    break_off(spec, 3)
    before = read(storage)
    assert sum(len(one["rows"]) for one in before.values()) >= 3
    outcome = run_study(spec, storage, Lines(sys.stderr), None)
    after = read(storage)
    for name, known in before.items():
        assert after[name]["rows"][: len(known["rows"])] == known["rows"]  # told, not trained again
    assert outcome.trials == len(after) == 3
    assert {one["state"] for one in after.values()} <= {"done", "stopped"}
    spent = sum(row["steps_spent"] for one in after.values() for row in one["rows"])
    assert outcome.steps_spent == spent <= outcome.steps_of_grid == 3 * 3 * 2
    rows = [row for one in after.values() for row in one["rows"]]
    assert outcome.worth == pytest.approx(max(row["worth"] for row in rows), abs=1e-4)
    starts = [seconds for row in rows[1:] for seconds in row["start_s"]]
    assert starts and all(seconds >= 0 for seconds in starts)
    assert outcome.gain and outcome.gain["low"] <= outcome.gain["value"] <= outcome.gain["high"]
    written = yaml.safe_load(Path(outcome.recipe).read_text())
    assert written["train"]["steps"] == outcome.step and written["train"]["lr"] == outcome.values["train.lr"]
    assert not list(Path(storage.uri).glob("runs/*/night.*/checkpoints/*"))
    page = Path(outcome.page).read_text("utf-8")
    assert page.count("<svg") == 3 and page.count("<img") >= 6
    assert not re.search(r"(src|href)=.http", page)  # it is whole by itself
    if browser := shutil.which("chromium") or shutil.which("google-chrome"):
        assert shown(browser, page, tmp_path) == {"plots": 3, "pictures": page.count("<img")}
    assert json.dumps(outcome.as_json())
    again = run_study(spec, storage, Lines(sys.stderr), None)  # done: without Ray
    assert again.as_json() == outcome.as_json()
    with pytest.raises(UserError, match="there is another study night"):
        run_study(replace(spec, steps=4), storage, Lines(sys.stderr), None)
