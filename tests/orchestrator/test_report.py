"""The page of a campaign."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cluster.storage import Storage
from orchestrator.curve import loss_curve
from orchestrator.records import CampaignRow, RunRow
from orchestrator.report import PICTURED, write_report
from orchestrator.thumbnails import thumbnail
from training.intake import read_photos, store_photos
from training.png import encode_png

PROMPT = 'a photo of {subject}, "soft" <b>light</b>'
HOSTILE = {
    "what": "a<script>alert(1)</script>.jpg is damaged",
    "seen": "broken & torn",
    "do": "save it again",
    "kind": "bad_input",
}


class Page(HTMLParser):
    """The tags of a page, and the text of each class and id that a test asks for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, tag: str, **wanted: str) -> list[dict[str, str | None]]:
        """The attributes of every such tag."""
        return [a for name, a in self.tags if name == tag and all(a.get(k) == v for k, v in wanted.items())]

    @property
    def text(self) -> str:
        """What is to be read, with single spaces."""
        return " ".join(" ".join(self.words).split())


def run(number: int, name: str, state: str, **fields: Any) -> RunRow:
    """A run of 40 steps as the ledger has it."""
    nothing = dict.fromkeys(RunRow.__dataclass_fields__)
    fixed = {"id": number, "position": number, "name": name, "class_noun": "dog", "state": state}
    counts = {"tenant": "t", "priority": 0, "steps": 40, "step": 0, "attempts": 1, "kills": 0, "smaller": 0}
    return RunRow(**{**nothing, **fixed, **counts, "prior_drawn": 0, **fields})


def album(storage: Storage, state: str = "failed") -> CampaignRow:
    """A campaign as the ledger has it."""
    manifest = {"name": "album", "prompts": [PROMPT], "defaults": {"train": {"steps": 40}}, "budget": None}
    manifest["settings"] = {"track": {"mlflow": "http://me:secret@mlflow:5000"}}
    nothing = dict.fromkeys(CampaignRow.__dataclass_fields__)
    times = {"created_at": 100.0, "finished_at": 1000.0, "worker_seconds": 64.0}
    fixed = {"name": "album", "storage_uri": storage.uri, "state": state, "manifest": manifest}
    return CampaignRow(**{**nothing, **fixed, **times})


def picture(shade: int, side: int = 64) -> bytes:
    """A PNG that `shade` tells from others."""
    pixels = np.full((side, side, 3), shade, np.uint8)
    pixels[: side // 2, :, 0] = 255 - shade
    return encode_png(pixels)


def trained(storage: Storage, folder: Path, name: str) -> None:
    """What a run and its intake leave in storage: two photos, a log, a record, a sample grid."""
    folder.mkdir(parents=True)
    for shade in (10, 200):
        (folder / f"{shade}.png").write_bytes(picture(shade))
    stored = store_photos(storage, name, read_photos([str(folder)], 16), 16)
    storage.write_json(f"runs/{name}/v1/run.json", {"photos": stored.key})
    rows = [
        {"event": "step", "step": step, "loss_subject": 4 / step, "loss_class": 0.3} for step in range(1, 41)
    ]
    rows.append({"event": "validation", "step": 20, "loss": 0.5})
    storage.write(f"runs/{name}/v1/events.jsonl", "".join(json.dumps(r) + "\n" for r in rows).encode())
    storage.write(f"runs/{name}/v1/samples.png", picture(50))


def drawn(storage: Storage, count: int, *prompts: str) -> None:
    """What a gallery leaves of `rex-v1`: `count` images, of the prompt or of `prompts` in turn, and its index."""
    paths = [f"rex-v1/{seed}.png" for seed in range(count)]
    for seed, path in enumerate(paths):
        storage.write(f"campaigns/album/images/{path}", picture(seed))
    columns = {"subject": ["rex"] * count, "version": ["v1"] * count, "prompt": [PROMPT] * count}
    if prompts:
        columns["prompt"] = [prompts[seed % len(prompts)] for seed in range(count)]
    columns |= {"seed": list(range(count)), "path": paths, "row": [None] * count}
    storage.write_rows("campaigns/album/images/index.parquet", columns)


def page_of(storage: Storage, runs: list[RunRow], state: str = "failed") -> tuple[Page, str]:
    """The page, parsed and as it is."""
    path = write_report(storage, album(storage, state), runs)
    assert path == "campaigns/album/report/index.html"
    text = storage.read(path).decode()
    return Page(text), text


def test_the_page_shows_what_became_of_every_subject(storage: Storage, tmp_path: Path) -> None:
    trained(storage, tmp_path / "rex", "rex")
    trained(storage, tmp_path / "tom", "tom")
    drawn(storage, 3)
    times = {"version": "v1", "step": 40, "started_at": 200.0, "finished_at": 234.0, "prior_key": "k"}
    runs = [
        run(0, "rex", "succeeded", **times, loss_subject=0.1234, loss_class=0.3, prior_drawn=32),
        run(1, "tom", "succeeded", **times, loss_subject=0.2, attempts=2),
        run(2, "kit", "failed", reason=HOSTILE),
        run(3, "sam", "cancelled"),
    ]
    page, text = page_of(storage, runs)
    for told in (
        "2 of 4 subjects succeeded",
        "15:00 min from start to end, 34 s per subject",
        "1:04 min of workers in use",
        "80 steps trained",
        "32 class images drawn; 1 prior set for 2 subjects",
        f"raybooth campaign retry album --storage {storage.uri}",
        "seen broken & torn do save it again",
    ):
        assert told in page.text
    assert page.text.index("Failures kit") < page.text.index("Subjects") < page.text.index("Pictures")
    assert "0.1234" in page.text and len(page.all("tr")) == 5
    assert [a["id"] for a in page.all("article")] == ["subject-rex", "subject-tom"]
    assert (
        len(page.all("img", alt=f"{PROMPT}, seed 2")) == 1 and len(page.all("img", alt="samples of tom")) == 1
    )
    assert len(page.all("img", alt="photo 2 of rex")) == 1 and len(page.all("svg")) == 2
    report = Path(storage.uri) / "campaigns/album/report"
    links = [a["href"] for a in page.all("a") if "images" in str(a.get("href"))]
    assert len(links) == 3 and all((report / str(link)).is_file() for link in links)
    assert "<script>alert" not in text and "<b>light" not in text and len(page.all("script")) == 1


def test_pictures_stand_in_the_order_of_the_prompts(storage: Storage) -> None:
    drawn(storage, 4, "another {subject}", PROMPT)
    page, _ = page_of(storage, [run(0, "rex", "succeeded", version="v1")])
    assert [str(img["alt"]) for img in page.all("img")] == [
        f"{PROMPT}, seed 1",
        f"{PROMPT}, seed 3",
        "another {subject}, seed 0",
        "another {subject}, seed 2",
    ]


def test_the_page_needs_no_network(storage: Storage, tmp_path: Path) -> None:
    trained(storage, tmp_path / "rex", "rex")
    page, text = page_of(storage, [run(0, "rex", "succeeded", version="v1", step=40)], "succeeded")
    assert all(str(a["src"]).startswith("data:image/webp;base64,") for a in page.all("img"))
    assert not re.search(r"""(src|href)=["'](https?:)?//""", text) and "@import" not in text
    assert not page.all("link")
    [policy] = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert str(policy["content"]).startswith("default-src 'none'")
    assert "What to do next" not in page.text


def test_what_cannot_be_read_is_left_out(storage: Storage, tmp_path: Path) -> None:
    trained(storage, tmp_path / "rex", "rex")
    storage.write("runs/rex/v1/samples.png", b"torn")
    storage.write("runs/rex/v1/events.jsonl", b'{"event": "step", "step": 1\n{"eve')
    [photos] = storage.names("subjects/rex")
    storage.write(f"subjects/rex/{photos}/photos.parquet", b"torn")
    page, _ = page_of(storage, [run(0, "rex", "training", version="v1", step=3)], "running")
    assert "Pictures" not in page.text and "raybooth campaign cancel album" in page.text


def test_an_empty_and_a_large_campaign_have_a_page(storage: Storage) -> None:
    page, _ = page_of(storage, [])
    assert "0 of 0 subjects succeeded" in page.text
    assert "secret" not in page.text and "http://***@mlflow:5000" in page.text
    runs = [run(i, f"s{i}", "failed", reason=HOSTILE) for i in range(PICTURED + 100)]
    page, text = page_of(storage, runs)
    assert (
        "494 more failures" in page.text
        and "and 300 more, with their reasons in the table below" in page.text
    )
    assert len(text) < 500_000


def test_a_curve_is_of_means_and_bounded_however_long_the_run() -> None:
    said: list[dict[str, Any]] = [{"event": "started", "from_step": 0}]
    said += [{"event": "step", "step": s, "loss_subject": 1.0, "loss_class": None} for s in range(1, 100_001)]
    said += [said[-1], {"event": "step", "step": 3, "loss_subject": float("nan")}]
    curve = loss_curve(said)
    assert curve is not None and len(curve) < 6_000 and "nan" not in curve
    assert "loss from 1.000 to 1.000 in 100000 steps" in curve and 'class="class"' not in curve
    [line] = re.findall(r'<polyline class="subject" points="([^"]+)"', curve)
    places = [tuple(map(float, point.split(","))) for point in line.split()]
    assert len({y for _, y in places}) == 1 and places == sorted(places)
    assert loss_curve([]) is None and loss_curve(said[:2]) is None


@pytest.mark.parametrize(("side", "small"), [(512, 112), (64, 64)])
def test_a_thumbnail_is_small_and_never_larger_than_its_picture(side: int, small: int) -> None:
    head, _, data = thumbnail(picture(7, side)).partition(",")
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert head == "data:image/webp;base64" and image.size == (small, small)
