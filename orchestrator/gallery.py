"""This file is where drawn images are kept: each once, under a name that is a hash of all that decides its bytes.

A folder or bucket that holds images has `SUBJECT-VERSION/` with `KEY.png` each, or with Parquet files of many;
`manifests/SUBJECT-VERSION/*.json`, which go last and say what is there; and `index.parquet` over all of them.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from operator import itemgetter
from typing import Any, Literal, get_args

from cluster.errors import SystemFailure, UserError, did_you_mean
from cluster.objects import StorageError
from cluster.storage import Storage, sha256
from training.png import decode_png, png_parameters
from training.request import DrawRequest

Form = Literal["png", "parquet"]
INDEX = "index.parquet"
CALLS = 16  # to an object store at a time: each takes tens of milliseconds


@dataclass(frozen=True)
class Image:
    """One image of a subject, by what decides its bytes."""

    subject: str
    version: str
    artifact: str
    """Hash of the artifact's files: a subject that was deleted and trained again may have the same version. Empty
    where the pristine base draws."""
    base_revision: str
    width: int
    """Rows of a forward on the device that draws."""
    prompt: str
    """As it was asked for, such as `a photo of {subject}`."""
    words: str
    """As the model reads it."""
    seed: int
    negative_prompt: str
    steps: int
    guidance: float
    sampler: str
    eta: float = 0.0

    @property
    def key(self) -> str:
        """Its name: 32 hex digits."""
        return sha256(json.dumps(asdict(self), sort_keys=True).encode())[:32]

    @property
    def label(self) -> str:
        """Who it shows, `SUBJECT-VERSION`."""
        return f"{self.subject}-{self.version}"

    @property
    def request(self) -> DrawRequest:
        """What draws it."""
        return DrawRequest(
            self.words,
            self.seed,
            self.negative_prompt,
            self.steps,
            self.guidance,
            self.sampler,  # type: ignore[arg-type]
            self.eta,
        )

    @property
    def parameters(self) -> dict[str, Any]:
        """What its PNG says."""
        return self.request.parameters(self.label, self.base_revision, self.artifact)


@dataclass(frozen=True)
class Entry:
    """An image that is there."""

    image: Image
    path: str
    """Of its object, under the gallery's root."""
    row: int | None
    """In a Parquet object; `None` in an object of its own."""
    sha256: str
    """Of its PNG."""

    def as_json(self) -> dict[str, Any]:
        """What a manifest and the index hold."""
        return {
            "key": self.image.key,
            "path": self.path,
            "row": self.row,
            "sha256": self.sha256,
            **asdict(self.image),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Entry":
        """The entry of `as_json`."""
        about = {key: value[key] for key in Image.__dataclass_fields__}
        return cls(Image(**about), value["path"], value["row"], value["sha256"])


class Gallery:
    """The images under a root. One process at a time changes it: hold `lock` on `LOCK`.

    Args:
        out: The root.
        form: An object per image, or Parquet objects of many.

    Raises:
        UserError: There is no such form.
    """

    LOCK = "locks/images"

    def __init__(self, out: Storage, form: str) -> None:
        if form not in get_args(Form):
            raise UserError(f"--format {form} is not known", "", did_you_mean(form, get_args(Form)))
        self.out, self.form = out, form

    def there(self, label: str, wanted: Iterable[Image]) -> dict[str, Entry]:
        """What is there of a subject, by key.

        What a killed process had written without coming to its manifest is taken over, if it is `wanted`.

        Raises:
            UserError: Its images are kept in the other form.
        """
        objects = self._objects(label)
        entries = self._listed(label, objects)
        strays = sorted(objects - {entry.path for entry in entries.values()})
        by_key = {image.key: image for image in wanted if image.key not in entries}
        found = [entry for path in strays for entry in self._adopt(path, by_key)]
        if found:
            self._write_manifest(label, found)
        return entries | {entry.image.key: entry for entry in found}

    def add(self, drawn: Sequence[tuple[Image, bytes]]) -> list[Entry]:
        """Keep images of one subject, its manifest last.

        Raises:
            StorageError: They cannot be written.
        """
        label = drawn[0][0].label
        entries = self._as_rows(label, drawn) if self.form == "parquet" else self._as_objects(drawn)
        self._write_manifest(label, entries)
        return entries

    def pngs(self, entries: Sequence[Entry]) -> Iterator[bytes]:
        """The images as PNG bytes, one Parquet object in memory at a time.

        Raises:
            SystemFailure: One is not what its manifest says.
        """
        path, column = "", []
        for entry in entries:
            if entry.row is None:
                png = self.out.read(entry.path)
            else:
                if entry.path != path:
                    path, column = entry.path, self._rows(entry.path)["png"]
                png = column[entry.row]
            if sha256(png) != entry.sha256:
                raise SystemFailure(
                    f"{self.out.full(entry.path)} is damaged",
                    f"its sha256 is not {entry.sha256[:12]}...",
                    "delete it; it is drawn again",
                )
            yield png

    def write_index(self) -> str:
        """Write the index over every image that is there; returns its path."""
        labels = self.out.names("manifests")
        entries = [e for label in labels for e in self._listed(label, self._objects(label)).values()]
        rows = sorted(
            (entry.as_json() for entry in entries),
            key=itemgetter("subject", "version", "prompt", "seed", "key"),
        )
        columns = ("subject", "version", "prompt", "words", "seed", "path", "row", "sha256", "key")
        settings = ("negative_prompt", "steps", "guidance", "sampler", "eta", "base_revision", "width")
        self.out.write_rows(INDEX, {key: [row[key] for row in rows] for key in (*columns, *settings)})
        return INDEX

    def _objects(self, label: str) -> set[str]:
        """Paths of a subject's objects."""
        names = self.out.names(label)
        return {f"{label}/{name}" for name in names if name.endswith(f".{self.form}")}

    def _listed(self, label: str, objects: set[str]) -> dict[str, Entry]:
        """What the manifests of a subject say, by key; an object that somebody has removed does not count."""
        paths = [f"manifests/{label}/{name}" for name in self.out.names(f"manifests/{label}")]
        with ThreadPoolExecutor(CALLS) as pool:
            manifests = list(pool.map(self.out.read_json, paths))
        for manifest in manifests:
            if manifest["form"] != self.form:
                raise UserError(
                    f"{self.out.uri} keeps its images as {manifest['form']}",
                    f"{self.form} was asked for",
                    f"say --format {manifest['form']}, or name another --out",
                )
        entries = [Entry.from_json(value) for manifest in manifests for value in manifest["images"]]
        return {entry.image.key: entry for entry in entries if entry.path in objects}

    def _write_manifest(self, label: str, entries: Sequence[Entry]) -> None:
        manifest = {
            "kind": "raybooth-images",
            "form": self.form,
            "images": [entry.as_json() for entry in entries],
        }
        self.out.write_json(f"manifests/{label}/{_name(e.image.key for e in entries)}.json", manifest)

    def _as_objects(self, drawn: Sequence[tuple[Image, bytes]]) -> list[Entry]:
        def put(image: Image, png: bytes) -> Entry:
            path = f"{image.label}/{image.key}.png"
            kept = png if self.out.put_if_absent(path, png) else self.out.read(path)
            return Entry(image, path, None, sha256(kept))

        with ThreadPoolExecutor(CALLS) as pool:
            return list(pool.map(put, *zip(*drawn, strict=True)))

    def _as_rows(self, label: str, drawn: Sequence[tuple[Image, bytes]]) -> list[Entry]:
        path = f"{label}/{_name(image.key for image, _ in drawn)}.parquet"
        entries = [Entry(image, path, row, sha256(png)) for row, (image, png) in enumerate(drawn)]
        table = [{**entry.as_json(), "png": png} for entry, (_, png) in zip(entries, drawn, strict=True)]
        self.out.write_rows(path, {key: [row[key] for row in table] for key in table[0] if key != "path"})
        return entries

    def _rows(self, path: str) -> dict[str, list[Any]]:
        return self.out.read_rows(path, sha256(self.out.read(path)))

    def _adopt(self, path: str, wanted: dict[str, Image]) -> list[Entry]:
        """The images of an object that no manifest names; one that is not whole is removed."""
        image = wanted.get(path.rpartition("/")[2].removesuffix(".png"))
        if self.form == "png" and image is None:
            return []
        try:
            if image is None:
                return self._whole_rows(path)
            png = self.out.read(path)
            decode_png(png)
            if image.parameters.items() <= png_parameters(png).items():
                return [Entry(image, path, None, sha256(png))]
        except StorageError:
            raise
        except (OSError, ValueError, KeyError, SyntaxError):
            pass  # no image of ours, whatever it is
        self.out.remove(path)
        return []

    def _whole_rows(self, path: str) -> list[Entry]:
        """The images of a Parquet object that says of each what it is."""
        rows = self._rows(path)
        found = [
            Entry.from_json({**{key: rows[key][i] for key in rows}, "path": path})
            for i in range(len(rows["key"]))
        ]
        for entry, key, png in zip(found, rows["key"], rows["png"], strict=True):
            if (entry.image.key, entry.sha256) != (key, sha256(png)):
                raise ValueError(path)
        return found


def _name(keys: Iterable[str]) -> str:
    """The name of several images together."""
    return sha256("\n".join(keys).encode())[:32]
