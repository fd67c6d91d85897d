"""This file is where the rows of a manifest are read: a list in YAML, CSV, Parquet, a folder of folders."""

import csv
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

import yaml

from cluster.errors import UserError, did_you_mean
from cluster.source import Entry, entries, find, read, read_text
from orchestrator.campaign_settings import SECTIONS, WHO
from orchestrator.document import anchored_all, parse_document
from orchestrator.folders import subject_in
from orchestrator.spec import setting_at, suggestion
from training.recipe import ABOUT, Recipe

COLUMNS = (*WHO, "tenant", "priority")

_PARQUET = (".parquet", ".pq")


@dataclass(frozen=True)
class RawRow:
    """A row as written: keys of `COLUMNS`, and sections of run.yaml."""

    place: str
    """For messages, such as `line 7`."""
    fields: Mapping[str, Any]
    error: UserError | None = None
    """Why it cannot be read."""


def listed_rows(items: Sequence[Any], lines: Sequence[int], folder: str) -> Iterator[RawRow]:
    """The rows of a list in YAML.

    Args:
        items: The list.
        lines: The line of each.
        folder: Of the file; paths in it are relative to it.
    """
    for item, line in zip(items, lines, strict=True):
        if not isinstance(item, dict):
            seen = f"it is {item!r}"
            yield RawRow(
                f"line {line}",
                {},
                UserError("a subject is a mapping", seen, "write {name: rex, class: dog, images: ./rex}"),
            )
        else:
            yield RawRow(f"line {line}", _anchored(item, folder))


def rows_at(place: str) -> Iterator[RawRow]:
    """The rows of a CSV or Parquet file or a folder of folders, at a path or a URI.

    Raises:
        UserError: It is not there, is of another kind, or its header names what is no column.
    """
    entry = find(place)
    folder = entry.place.rpartition("/")[0] or "."
    if entry.is_folder:
        yield from _folder_rows(entry)
    elif entry.suffix == ".csv":
        yield from _csv_rows(entry.place, folder)
    elif entry.suffix in _PARQUET:
        yield from _parquet_rows(entry.place, folder)
    else:
        raise UserError(
            f"{entry.place} holds no subjects",
            f"its name ends with {entry.suffix!r}",
            "give a .csv, a .parquet or a folder",
        )


# -- tables ------------------------------------------------------------------------------------------------


def _csv_rows(place: str, folder: str) -> Iterator[RawRow]:
    reader = csv.reader(read_text(place).splitlines(keepends=True), strict=True, skipinitialspace=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            raise UserError(
                f"{place} is not CSV", f"line {reader.line_num}: {error}", "correct it there"
            ) from error
        cells = [cell.strip() for cell in cells]
        if not any(cells):
            continue
        if header is None:
            header = cells
            _check_header(place, header)
        elif len(cells) > len(header):
            seen = f"{len(cells)} cells, {len(header)} columns"
            named = dict(zip(header, cells, strict=False)).get("name", "")
            mistake = UserError(
                "the row has more cells than there are columns", seen, "quote a cell that holds a comma"
            )
            yield RawRow(f"line {line}", {"name": named}, mistake)
        else:
            yield _row(f"line {line}", dict(zip(header, cells, strict=False)), folder)
    if header is None:
        raise UserError(f"{place} has no subjects", "it is empty", "begin with the line name,class,images")


def _parquet_rows(place: str, folder: str) -> Iterator[RawRow]:
    from cluster.remote import parquet_columns

    try:
        columns = parquet_columns(read(place))
    except ValueError as error:
        raise UserError(f"{place} is not Parquet", str(error).splitlines()[0], "write it again") from error
    _check_header(place, list(columns))
    for number, cells in enumerate(zip(*columns.values(), strict=True), start=1):
        yield _row(f"row {number}", dict(zip(columns, cells, strict=True)), folder)


def _check_header(place: str, header: Sequence[str]) -> None:
    mistakes = [f"{name} is there twice" for name in dict.fromkeys(header) if header.count(name) > 1]
    for name in header:
        section, _, rest = name.partition(".")
        if name in COLUMNS or (section in SECTIONS and (not rest or setting_at(name.split("."))[1])):
            continue
        mistakes.append(f"{name or 'an empty name'} is no column: {nearest(name)}")
    mistakes += [f"{name} is missing" for name in ("name", "images") if name not in header]
    if mistakes:
        columns = f"columns are {', '.join(COLUMNS)} and settings of run.yaml such as train.steps"
        raise UserError(f"{place} has a header that cannot be used", "; ".join(mistakes), columns)


def nearest(key: str) -> str:
    """What to do about a key that no row has."""
    section, _, inside = key.partition(".")
    if section == "track":
        return "track holds for the campaign: give it in `defaults`"
    near = did_you_mean(key, [*COLUMNS, *SECTIONS])
    return near if "did you mean" in near and not inside else suggestion(key, Recipe)


def _row(place: str, cells: Mapping[str, Any], folder: str) -> RawRow:
    """A row of a table: empty cells are not given; texts of settings are YAML, as those of `--set`."""
    fields: dict[str, Any] = {}
    try:
        for name, cell in cells.items():
            value = _without_nulls(cell) if isinstance(cell, dict) else cell
            if value in (None, "", {}):
                continue
            *sections, key = name.split(".")
            inner = fields
            for section in sections:
                inner = inner.setdefault(section, {})
            inner[key] = _value(name, value)
    except UserError as error:
        return RawRow(place, {"name": cells.get("name")}, error)
    return RawRow(place, _anchored(fields, folder))


def _value(name: str, cell: Any) -> Any:
    if not isinstance(cell, str):
        return cell
    if name == "images":
        return [part.strip() for part in cell.split(";") if part.strip()]
    if name in COLUMNS and name != "priority":
        return cell
    return cell if _is_text(name) else _yaml_value(name, cell)


@functools.cache
def _is_text(path: str) -> bool:
    """Whether a setting takes any text, so that its cell is taken as it is."""
    _, field = setting_at(path.split("."))
    kinds = get_args(field.annotation) or (field.annotation,) if field else ()
    return str in kinds and get_origin(field and field.annotation) not in (Literal, tuple)


@functools.lru_cache(maxsize=10_000)  # a column has few values in many rows
def _yaml_value(name: str, cell: str) -> Any:
    try:
        return yaml.safe_load(cell)
    except yaml.YAMLError as error:
        raise UserError(f"{name} has no value", " ".join(str(error).split()), "quote it") from error


def _without_nulls(value: Any) -> Any:
    """A Parquet struct without the fields that a row does not give."""
    if not isinstance(value, dict):
        return value
    return {key: _without_nulls(part) for key, part in value.items() if part is not None}


# -- folders -----------------------------------------------------------------------------------------------


def _folder_rows(folder: Entry) -> Iterator[RawRow]:
    folders = [e for e in entries(folder.place) if e.is_folder and not e.name.startswith(".")]
    if not folders:
        raise UserError(
            f"{folder.place} has no subjects",
            "no folder is in it",
            "give a folder that holds a folder of photos for each subject; `raybooth train` takes a single one",
        )
    for subject in folders:
        fields: dict[str, Any] = {**subject_in(subject.name), "images": subject.place}
        error: UserError | None = None
        about = [entry for entry in entries(subject.place) if entry.name == ABOUT]
        if about:
            try:
                said = parse_document(read_text(about[0].place), f"{subject.name}/{ABOUT}").raw
                fields |= _anchored(said, subject.place)
            except UserError as mistake:
                error = mistake
        yield RawRow(f"folder {subject.name}", fields, error)


def _anchored(fields: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """A row with its relative paths made absolute."""
    out = dict(fields)
    if "images" in out:
        out["images"] = anchored_all(out["images"], folder)
    base = out.get("base")
    if isinstance(base, dict) and str(base.get("model")).startswith("."):  # else `a/b` is a hub id
        out["base"] = {**base, "model": anchored_all(base["model"], folder)}
    return out
