"""A manifest in any of its forms becomes the same campaign; a mistake of a row is that row's alone."""

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from cluster.errors import UserError
from cluster.storage import Storage
from orchestrator.campaign_settings import campaign_schema
from orchestrator.manifest import CampaignSpec, Row, load_campaign, settings_of

HEAD = "defaults: {train: {steps: 300}}\n"


def written(folder: Path, text: str, name: str = "campaign.yaml") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def campaign(folder: Path, text: str, **options: Any) -> CampaignSpec:
    return load_campaign(written(folder, text), **options)


def refusal(folder: Path, text: str, name: str = "campaign.yaml", **options: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        load_campaign(written(folder, text, name), **options)
    return caught.value


def one(spec: CampaignSpec, name: str) -> Row:
    [row] = [row for row in spec.rows if row.name == name]
    return row


def steps(spec: CampaignSpec) -> dict[str, int | None]:
    return {row.name: row.run.train.steps if row.run else None for row in spec.rows}


# -- the forms of a manifest -------------------------------------------------------------------------------

ROWS = [
    {"name": "rex", "class": "dog", "images": ["rex"], "tenant": "shop-7", "priority": 5},
    {"name": "tom", "class": "cat", "images": ["a/1.png", "a/2.png"], "train": {"steps": 400}},
    {"name": "pot", "class": "teapot", "images": ["s3://bucket/pot"], "identifier": "ohwx"},
]


def in_yaml(folder: Path) -> str:
    return written(folder, yaml.safe_dump({"defaults": {"train": {"steps": 300}}, "subjects": ROWS}))


def in_csv(folder: Path) -> str:
    text = (
        "\ufeffname, class, images, tenant, priority, train.steps, identifier\n"
        "rex, dog, rex, shop-7, 5,,\n"
        "\n"
        "tom, cat, a/1.png; a/2.png,,,400,\n"
        "pot, teapot, s3://bucket/pot,,,,ohwx\n"
    )
    written(folder, text, "subjects.csv")
    return written(folder, HEAD + "subjects: subjects.csv")


def in_parquet(folder: Path, uri: str = "") -> str:
    columns = {
        "name": [row["name"] for row in ROWS],
        "class": [row["class"] for row in ROWS],
        "images": [row["images"] for row in ROWS],
        "tenant": ["shop-7", None, None],
        "priority": [5, None, None],
        "train": [None, {"steps": 400, "seed": None}, None],
        "identifier": [None, None, "ohwx"],
    }
    pq.write_table(pa.table(columns), folder / "subjects.parquet")
    return written(folder, HEAD + "subjects: ./subjects.parquet")


@pytest.mark.parametrize("form", [in_yaml, in_csv, in_parquet])
def test_every_form_of_a_manifest_gives_the_same_campaign(tmp_path: Path, form: Any) -> None:
    spec = load_campaign(form(tmp_path))
    assert steps(spec) == {"rex": 300, "tom": 400, "pot": 300}
    assert [(row.tenant, row.priority) for row in spec.rows] == [
        ("shop-7", 5),
        ("default", 0),
        ("default", 0),
    ]
    subjects = [row.run.subject for row in spec.rows if row.run]
    assert [s.class_noun for s in subjects] == ["dog", "cat", "teapot"]
    assert [s.identifier for s in subjects] == ["auto", "auto", "ohwx"]
    assert [s.images for s in subjects] == [
        (str(tmp_path / "rex"),),
        (str(tmp_path / "a/1.png"), str(tmp_path / "a/2.png")),
        ("s3://bucket/pot",),
    ]
    assert all(row.run and row.run.train.seed == 0 for row in spec.rows)


def test_a_folder_of_folders_is_a_manifest(tmp_path: Path) -> None:
    for name in ("Mein Hund", "tom", ".hidden"):
        (tmp_path / "photos" / name).mkdir(parents=True)
    (tmp_path / "photos" / "readme.txt").write_text("no subject")
    about = "{class: cat, tenant: shop, train: {steps: 7}, images: [../tom/1.png]}"
    (tmp_path / "photos" / "tom" / "subject.yaml").write_text(about)
    spec = load_campaign(str(tmp_path / "photos"), class_noun="dog")
    assert spec.name == "photos"
    assert [(row.name, row.class_noun, row.tenant) for row in spec.rows] == [
        ("mein-hund", "dog", "default"),
        ("tom", "cat", "shop"),
    ]
    run = one(spec, "tom").run
    assert run is not None and run.train.steps == 7
    assert Path(run.subject.images[0]).resolve() == tmp_path / "photos/tom/1.png"
    nameless = one(load_campaign(str(tmp_path / "photos")), "mein-hund").error
    assert nameless is not None and nameless.what == "folder Mein Hund: subject.class is missing"
    with pytest.raises(UserError, match="no folder is in it"):
        load_campaign(str(tmp_path / "photos" / "tom"))


def test_a_manifest_may_lie_in_an_object_store(tmp_path: Path, bucket: str) -> None:
    store = Storage(f"{bucket}/tonight")
    in_csv(tmp_path)
    (tmp_path / "prompts.txt").write_text("# by the sea\n\na photo of {subject}\n", encoding="utf-8")
    for name in ("subjects.csv", "prompts.txt"):
        store.write(name, (tmp_path / name).read_bytes())
    store.write("campaign.yaml", (HEAD + "subjects: subjects.csv\nprompts: prompts.txt").encode())
    spec = load_campaign(store.full("campaign.yaml"))
    assert (spec.name, spec.prompts) == ("tonight", ("a photo of {subject}",))
    tom = one(spec, "tom").run
    assert tom is not None and tom.subject.images == (store.full("a/1.png"), store.full("a/2.png"))
    store.write("photos/rex/1.png", b"")
    store.write("photos/rex/subject.yaml", b"class: dog")
    [row] = load_campaign(store.full("photos/")).rows
    assert row.run is not None and row.run.subject.images == (store.full("photos/rex"),)
    with pytest.raises(UserError, match="does not exist"):
        load_campaign(store.full("nothing.yaml"))


def test_cells_of_texts_are_texts_and_others_are_yaml(tmp_path: Path) -> None:
    text = "name,class,images,train.prompt,base.revision,train.max_grad_norm,train.lora.targets,data.flip\n"
    text += 'rex,yes,x,{subject} in snow,1234567,null,"[to_q, to_k]",true\n'
    run = one(load_campaign(written(tmp_path, text, "s.csv")), "rex").run
    assert run is not None and run.subject.class_noun == "yes"
    assert (run.train.prompt, run.base.revision) == ("{subject} in snow", "1234567")
    assert (run.train.max_grad_norm, run.train.lora.targets, run.data.flip) == (None, ("to_q", "to_k"), True)


# -- what is laid over what --------------------------------------------------------------------------------


def test_later_sources_win_over_earlier_ones(tmp_path: Path) -> None:
    text = "name: first\nschedule: {gangs: 2, bank: 4}\n"
    text += "defaults: {subject: {class: dog}, train: {steps: 5, lr: 1.0e-5}}\n"
    text += "subjects:\n- {name: rex, images: x, train: {steps: 6, seed: 3}}\n- {name: tom, class: cat, images: x}"
    spec = campaign(tmp_path, text)
    assert steps(spec) == {"rex": 6, "tom": 5}
    assert [row.class_noun for row in spec.rows] == ["dog", "cat"]
    over = campaign(
        tmp_path,
        text,
        name="second",
        flags={"train": {"steps": 7}},
        sets=["train.seed=9", "schedule.gangs=3"],
    )
    assert over.name == "second" and steps(over) == {"rex": 7, "tom": 7}
    assert [row.run.train.seed for row in over.rows if row.run] == [9, 9]
    assert (over.settings.schedule.gangs, over.settings.schedule.bank) == (3, 4)
    assert over.defaults["train"] == {"steps": 7, "lr": 1e-5, "seed": 9}


def test_a_row_with_a_setting_of_its_own_keeps_the_adapters_of_the_defaults(tmp_path: Path) -> None:
    text = "defaults: {train: {lora: {rank: 4}}}\nsubjects:\n"
    text += "- {name: a, class: dog, images: x, train: {steps: 5}}\n"
    (tmp_path / "c.yaml").write_text(text)
    [row] = load_campaign(str(tmp_path / "c.yaml")).rows
    assert row.run is not None and (row.run.train.steps, row.run.train.lora.rank) == (5, 4)


def test_a_row_of_another_method_does_without_the_adapters_of_the_others(tmp_path: Path) -> None:
    text = "defaults: {train: {lora: {rank: 4}}}\nsubjects:\n"
    text += "- {name: a, class: dog, images: x}\n- {name: b, class: dog, images: x, train: {method: full}}\n"
    text += "- {name: c, class: dog, images: x, train: {method: full, lora: {rank: 2}}}"
    spec = campaign(tmp_path, text)
    a, b, c = (row.run for row in spec.rows)
    assert a is not None and a.train.lora.rank == 4
    assert b is not None and b.train.method == "full"
    assert c is None and "train.lora takes no effect" in str(spec.rows[2].error)


def test_the_name_is_that_of_the_file_or_its_folder(tmp_path: Path) -> None:
    (tmp_path / "To night").mkdir()
    rows = "subjects: [{name: rex, class: dog, images: x}]"
    assert campaign(tmp_path / "To night", rows).name == "to-night"
    assert load_campaign(written(tmp_path, rows, "New Subjects.yml")).name == "new-subjects"


def test_settings_come_back_from_what_is_kept_of_them(tmp_path: Path) -> None:
    text = "prompts: [a photo of {subject}]\nbudget: {hours: 2}\nimages: {num_images: 2, sampler: dpm++2m}\n"
    text = text.replace("[a photo of {subject}]", '["a photo of {subject}", "a photo of {subject}"]')
    text += "defaults: {track: {experiment: shop}}\nsubjects: [{name: rex, class: dog, images: x}]"
    spec = campaign(tmp_path, text)
    assert spec.prompts == ("a photo of {subject}",) and spec.budget.hours == 2
    assert spec.settings.track.experiment == "shop"
    assert settings_of(spec.as_json()) == spec.settings


# -- what is refused ---------------------------------------------------------------------------------------


def test_a_mistake_in_a_row_is_that_rows_and_names_its_line(tmp_path: Path) -> None:
    text = """
subjects:
  - {name: rex, class: dog, images: x}
  - {name: ../Rex, class: dog, images: x}
  - {name: tom, class: dog, images: x, train: {stepz: 3}}
  - {name: ann, class: dog, images: x, tenant: "a/b"}
  - {name: bob, class: dog, images: x, priority: high}
  - {name: eve, class: dog, images: x, track: {mlflow: null}}
  - {name: sam, class: dog, image: x}
  - {class: dog, images: x}
  - rex
"""
    spec = campaign(tmp_path, text)
    told = {row.name: str(row.error) for row in spec.rows if row.error}
    assert [row.name for row in spec.rows if row.run] == ["rex"]
    expected = {
        "line-4": ("line 4: subject.name cannot be used", "'../Rex'"),
        "tom": ("line 5: train.stepz is not a setting", "did you mean steps?"),
        "ann": ("line 6: tenant cannot be used", "letters, digits"),
        "bob": ("line 7: priority cannot be used", "valid integer"),
        "eve": ("line 8: track is not a setting of a row", "`defaults`"),
        "sam": ("line 9: image is not a setting of a row", "did you mean images?"),
        "line-10": ("line 10: subject.name is missing", ""),
        "line-11": ("line 11: a subject is a mapping", "'rex'"),
    }
    assert told.keys() == expected.keys()
    for name, parts in expected.items():
        assert all(part in told[name] for part in parts), told[name]


def test_a_mistake_in_a_line_of_csv_is_that_lines(tmp_path: Path) -> None:
    text = 'name,class,images,train.steps\nrex,dog,x,1\ntom,"big\ncat",x,many\n'
    text += "ann,dog,x,[1\nbob,dog,a,b.png,3\neve,dog,,2\n"
    spec = load_campaign(written(tmp_path, text, "s.csv"))
    told = [str(row.error) for row in spec.rows if row.error]
    assert steps(spec) == {"rex": 1, "tom": None, "ann": None, "bob": None, "eve": None}
    assert "line 3: train.steps cannot be used" in told[0] and "it is 'many'" in told[0]
    assert "line 5: train.steps has no value" in told[1]
    assert "line 6: the row has more cells than there are columns" in told[2]
    assert "line 7: subject.images is missing" in told[3]


def test_mistakes_of_the_campaign_refuse_it_all_at_once(tmp_path: Path) -> None:
    text = """
gangs: 3
budget: {hour: 2}
schedule: {bank: 3}
prompts: [a photo of {subjekt}]
defaults: {train: {stepz: 3}}
subjects: [{name: rex, class: dog, images: x}, {name: rex, class: dog, images: y}]
""".replace("[a photo of {subjekt}]", '["a photo of {subjekt}"]')
    error = refusal(tmp_path, text)
    assert error.what.endswith("campaign.yaml has 4 mistakes")
    for part in (
        "gangs is not a setting",
        "budget.hour is not a setting: it was given 2: did you mean hours?",
        "schedule.bank cannot be used: it is 3",
        "the prompt has braces that mean nothing",
        "defaults: train.stepz is not a setting",
        "the name rex is there 2 times: line 7, line 7",
    ):
        assert part in error.seen
    assert error.do == "`raybooth schema --campaign` lists all settings"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("subjects: []", "the campaign has no subjects"),
        ("name: x", "subjects is missing"),
        ("subjects: none.csv", "none.csv does not exist"),
        ("subjects: campaign.yaml", "holds no subjects"),
        ("steps: 3\nsubjects: s.csv", "steps is not a setting"),
        ("train: {steps: 3}\nsubjects: []", "did you mean defaults.train?"),
        ("defaults: {subject: {name: rex}}\nsubjects: []", "defaults.subject.name cannot be used"),
        ("defaults: [1]\nsubjects: []", "defaults cannot be used"),
        ("name: My Campaign\nsubjects: []", "name cannot be used"),
        ("prompts: a photo of {subject}\nsubjects: []", "write a list"),
        ("budget: {hours: 0}\nsubjects: []", "greater than 0"),
        ("subjects: []\nsubjects: []", "the key subjects is there twice"),
        ("subjects: [", "is not YAML"),
    ],
)
def test_a_campaign_that_cannot_be_is_refused(tmp_path: Path, text: str, told: str) -> None:
    assert told in str(refusal(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "it is empty"),
        ("name,class\nrex,dog\n", "images is missing"),
        ("name,class,images,steps\n", "steps is no column: did you mean prior.steps or train.steps"),
        ("name,class,images,name\n", "name is there twice"),
        ("name,class,images,track.mlflow\n", "track holds for the campaign"),
        ('name,class,images\nrex,"dog\n', "is not CSV"),
    ],
)
def test_a_table_whose_header_cannot_be_used_is_refused(tmp_path: Path, text: str, told: str) -> None:
    assert told in str(refusal(tmp_path, text, "s.csv"))


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="is not Parquet"):
        load_campaign(str(tmp_path / "s.parquet"))
    (tmp_path / "latin.csv").write_bytes("name,class,images\nHündin,dog,x".encode("latin-1"))
    with pytest.raises(UserError, match="save it as UTF-8"):
        load_campaign(str(tmp_path / "latin.csv"))


# -- size, schema, imports ---------------------------------------------------------------------------------


def test_ten_thousand_rows_are_read_in_seconds(tmp_path: Path) -> None:
    lines = (f"s{i},dog,p/{i},t{i % 7},{i % 3},{100 + i % 50},1e-4\n" for i in range(10_000))
    text = "name,class,images,tenant,priority,train.steps,train.lr\n" + "".join(lines)
    began = time.process_time()
    spec = load_campaign(written(tmp_path, text, "s.csv"))
    assert time.process_time() - began < 15
    assert len(spec.rows) == 10_000 and all(row.run for row in spec.rows)


def test_the_schema_describes_every_setting() -> None:
    schema = campaign_schema()
    assert {"name", "defaults", "subjects", "prompts", "images", "budget", "schedule", "gate"} == schema[
        "properties"
    ].keys()
    assert schema["additionalProperties"] is False
    for name, section in [("campaign", schema), *schema["$defs"].items()]:
        for key, setting in section["properties"].items():
            assert setting.get("description") or "$ref" in setting, f"{name}.{key} has no docstring"


def test_reading_a_manifest_needs_no_torch_and_no_ray() -> None:
    script = "import sys, orchestrator.manifest; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"\b(torch|ray|pyarrow|diffusers)\b", loaded)


def test_a_folder_in_kohyas_style_says_its_word_and_its_class(tmp_path: Path) -> None:
    from orchestrator.folders import subject_in

    assert subject_in("10_ohwx dog") == {"name": "ohwx-dog", "identifier": "ohwx", "class": "dog"}
    assert subject_in("3_zwx teddy bear")["class"] == "teddy bear"
    for plain in ("rex", "10_rex", "my dog", "10 ohwx dog"):
        assert subject_in(plain).keys() == {"name"}
