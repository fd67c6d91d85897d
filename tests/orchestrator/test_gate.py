"""Who is served: a table of scores and demands."""

import pytest

from orchestrator.campaign_settings import Gate
from orchestrator.gate import gained, objections
from orchestrator.manifest import load_campaign, settings_of
from training.critic import Row, Scores, worth
from training.scores import CopyTest, Estimate


def scores(dino: float = 0.7, clip_t: float = 0.25, drift: float | None = 0.1, copies: float = 0.0) -> Scores:
    """Of ten prompts with two drawings each, which differ a little from each other."""
    wobble = [0.02 * (number % 5 - 2) for number in range(10)]
    rows = tuple(
        Row(f"p{number}", seed, dino + off, dino + off, clip_t, 0.5, 0, False)
        for number, off in enumerate(wobble)
        for seed in (0, 1)
    )
    metrics = {"dino": dino, "clip_i": dino, "clip_t": clip_t, "copies": copies, "pres": 0.3}
    of = {key: Estimate(value, value - 0.02, value + 0.02, 20) for key, value in metrics.items()}
    lost = None if drift is None else Estimate(drift, drift, drift, 10)
    return Scores(of, {}, {}, lost, CopyTest(0.9, 0.95, 0.8), rows)


@pytest.mark.parametrize(
    ("demands", "said"),
    [
        ({}, []),
        ({"dino": 0.6, "clip_t": 0.2, "drift": 0.2, "pres": 0.4, "copies": 0.1}, []),
        ({"dino": 0.8}, ["dino is 0.700, and 0.8 is demanded"]),
        ({"drift": 0.05}, ["drift is 0.100, and at most 0.05 is allowed"]),
        (
            {"pres": 0.2, "clip_t": 0.5},
            ["clip_t is 0.250, and 0.5 is demanded", "pres is 0.300, and at most"],
        ),
        ({"div": 0.1}, ["div is demanded and cannot be had of these drawings"]),
    ],
)
def test_what_misses_a_demand_is_held_back_with_the_reason(
    demands: dict[str, float], said: list[str]
) -> None:
    found = objections(Gate(**demands), scores(), None)
    assert len(found) == len(said) and all(
        one.startswith(part) for one, part in zip(found, said, strict=True)
    )


@pytest.mark.parametrize(
    ("new", "served"),
    [
        ({"dino": 0.75}, True),
        ({"dino": 0.7}, True),  # as good
        ({"dino": 0.65}, False),
        ({"dino": 0.75, "drift": 0.3}, False),  # likeness that costs the class more
        ({"dino": 0.75, "clip_t": 0.15}, False),  # likeness that costs the prompt more
        ({"drift": -0.5}, True),
    ],
)
def test_a_version_that_is_worse_than_the_champion_does_not_replace_it(
    new: dict[str, float], served: bool
) -> None:
    found = objections(Gate(), scores(**new), scores())
    assert (found == []) is served
    assert served or "worse than the champion: -0." in found[0]
    assert objections(Gate(no_worse=False), scores(**new), scores()) == []


def test_what_was_drawn_with_other_prompts_cannot_be_compared() -> None:
    other = Scores({}, {}, {}, None, CopyTest(0.9, 0.95, 0.8), (Row("q", 0, 1, 1, 1, 0, 0, False),))
    assert gained([(scores(), other)]) is None
    assert "their prompts differ" in objections(Gate(), scores(), other)[0]


def test_worth_is_likeness_and_obedience_less_what_the_class_lost() -> None:
    assert worth(scores()) == pytest.approx(0.7 + 0.25 - 0.1)
    assert worth(scores(drift=None)) == worth(scores(drift=-1.0)) == pytest.approx(0.95)
    gain = gained([(scores(dino=0.8), scores()), (scores(), scores())])
    assert gain and gain.value == pytest.approx(0.05) and gain.low < 0.05 < gain.high and gain.n == 40


def test_a_campaign_keeps_its_gate_on_record(tmp_path) -> None:
    manifest = tmp_path / "night.yaml"
    manifest.write_text("gate: {dino: 0.5, drift: 0.2}\nsubjects: [{name: rex, class: dog, images: ./rex}]")
    settings = settings_of(load_campaign(str(manifest)).as_json())
    assert settings.gate == Gate(dino=0.5, drift=0.2) and settings.gate.no_worse
    old = load_campaign(str(manifest)).as_json()
    del old["settings"]["gate"]  # of a record that knew none
    assert settings_of(old).gate is None
