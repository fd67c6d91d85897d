"""This file is where custom resources are checked as an API server would: strictly by their CRD, with its CEL rules.

Like the server it drops nulls, applies defaults and then validates; unlike it, an unknown field is an error and not
dropped in silence.
"""

import copy
import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import celpy
import yaml
from jsonschema import Draft202012Validator

from cluster.manifests import Complaint, Document, name_of

_GROUP = re.compile(r"^  group: (\S+)$", re.MULTILINE)
_KIND = re.compile(r"^  names:\n(?:    .*\n)*?    kind: (\S+)$", re.MULTILINE)
_METADATA = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "maxLength": 253},
        "generateName": {"type": "string"},
        "namespace": {"type": "string", "maxLength": 63},
        "labels": {"type": "object", "additionalProperties": {"type": "string", "maxLength": 63}},
        "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
        "finalizers": {"type": "array", "items": {"type": "string"}},
        "ownerReferences": {"type": "array"},
    },
}
_PLAIN = (
    *("type", "enum", "pattern", "minLength", "maxLength", "minimum", "maximum", "exclusiveMinimum"),
    *("exclusiveMaximum", "minItems", "maxItems", "minProperties", "maxProperties", "multipleOf", "required"),
)
_INTEGERS = {"int32": 2**31, "int64": 2**63}


class Crds:
    """The custom resources of a folder of CRDs.

    Args:
        folder: Of YAML files, one CRD each.
    """

    def __init__(self, folder: Path) -> None:
        self._files: dict[tuple[str, str], Path] = {}
        self._schemas: dict[tuple[str, str], Mapping[str, Any]] = {}
        self._validators: dict[tuple[str, str], Draft202012Validator] = {}
        self._parsed: set[Path] = set()
        self._told: dict[str, list[Complaint]] = {}
        for file in sorted(folder.glob("*.yaml")):
            text = file.read_text(encoding="utf-8")
            if (group := _GROUP.search(text)) and (kind := _KIND.search(text)):
                self._files[group[1], kind[1]] = file

    def knows(self, document: Document) -> bool:
        """Whether there is a CRD for a document's kind, in whatever version."""
        return (str(document["apiVersion"]).partition("/")[0], str(document["kind"])) in self._files

    def _schema(self, document: Document) -> Mapping[str, Any] | None:
        kind = str(document["kind"])
        file = self._files[str(document["apiVersion"]).partition("/")[0], kind]
        if file not in self._parsed:  # a megabyte each: only those that are asked for are parsed
            self._parsed.add(file)
            spec = yaml.load(file.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)["spec"]
            for version in spec["versions"]:
                if version["served"]:
                    schema = version["schema"]["openAPIV3Schema"]
                    self._schemas[f"{spec['group']}/{version['name']}", kind] = schema
        return self._schemas.get((str(document["apiVersion"]), kind))

    def complaints(self, document: Document) -> list[Complaint]:
        """What an API server would refuse of a document, or drop."""
        text = json.dumps(document, sort_keys=True, default=str)
        if text not in self._told:
            self._told[text] = self._complaints(document)
        return self._told[text]

    def _complaints(self, document: Document) -> list[Complaint]:
        key = (str(document["apiVersion"]), str(document["kind"]))
        schema = self._schema(document)
        if schema is None:
            return [Complaint(name_of(document), "apiVersion", f"no CRD serves {key[1]} of {key[0]}")]
        if key not in self._validators:
            self._validators[key] = Draft202012Validator(_root(schema))
        whole = with_defaults(document, schema)
        found = [
            Complaint(name_of(document), _shown(error.absolute_path), error.message[:300])
            for error in self._validators[key].iter_errors(whole)
        ]
        # rules are only run on what has the right shape
        found = found or [
            Complaint(name_of(document), path, text) for path, text in _broken_rules(whole, schema, "")
        ]
        return sorted(found, key=lambda complaint: complaint.path)


def with_defaults(value: Any, schema: Mapping[str, Any]) -> Any:
    """A copy of a value as the API server completes it: nulls dropped where they may not be, defaults filled in."""
    if isinstance(value, Mapping):
        properties, rest = schema.get("properties", {}), schema.get("additionalProperties")
        done = {}
        for key, item in value.items():
            below = properties.get(key, rest if isinstance(rest, Mapping) else {})
            if item is None and below and not below.get("nullable"):
                continue
            done[key] = with_defaults(item, below)
        for key, below in properties.items():
            if key not in done and "default" in below:
                done[key] = with_defaults(copy.deepcopy(below["default"]), below)
        return done
    if isinstance(value, list):
        return [with_defaults(item, schema.get("items", {})) for item in value]
    return value


def _root(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON Schema of a whole object."""
    strict = _strict(schema)
    strict["properties"] |= {
        "apiVersion": {"type": "string"},
        "kind": {"type": "string"},
        "metadata": _METADATA,
    }
    return strict


def _strict(schema: Mapping[str, Any]) -> dict[str, Any]:
    """JSON Schema of an OpenAPI schema of Kubernetes, which allows nothing that it does not name."""
    strict: dict[str, Any] = {key: schema[key] for key in _PLAIN if key in schema}
    for key in ("exclusiveMinimum", "exclusiveMaximum"):  # booleans there, numbers here
        if strict.pop(key, False) is True:
            strict[key] = strict.pop(key.replace("exclusiveM", "m"))
    if schema.get("x-kubernetes-int-or-string"):
        strict["type"] = ["integer", "string"]
    if schema.get("format") in _INTEGERS:
        strict.setdefault("maximum", _INTEGERS[schema["format"]] - 1)
    for key in ("allOf", "anyOf", "oneOf"):
        if key in schema:
            strict[key] = [_strict_part(part) for part in schema[key]]
    if "not" in schema:
        strict["not"] = _strict_part(schema["not"])
    if "properties" in schema:
        strict["properties"] = {key: _strict(below) for key, below in schema["properties"].items()}
    if isinstance(schema.get("additionalProperties"), Mapping):
        strict["additionalProperties"] = _strict(schema["additionalProperties"])
    elif strict.get("type") == "object" and "additionalProperties" not in schema:
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            strict["additionalProperties"] = False
        if schema.get("x-kubernetes-embedded-resource"):
            strict.setdefault("properties", {}).update(apiVersion={}, kind={}, metadata=_METADATA)
    if "items" in schema:
        strict["items"] = _strict(schema["items"])
    if schema.get("nullable") and isinstance(strict.get("type"), str):
        strict["type"] = [strict["type"], "null"]
    return strict


def _strict_part(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A branch of a schema that says itself which fields there are: it adds conditions and closes nothing."""
    part = _strict(schema)
    if part.get("additionalProperties") is False:
        del part["additionalProperties"]
    return part


def _broken_rules(value: Any, schema: Mapping[str, Any], path: str) -> Iterator[tuple[str, str]]:
    """Path and text of each CEL rule, and each rule about lists, that a value breaks."""
    for rule in schema.get("x-kubernetes-validations", ()):
        if "oldSelf" not in rule["rule"] and not _holds(rule["rule"], value):
            yield path, rule.get("message") or f"breaks the rule {rule['rule']}"
    if isinstance(value, Mapping):
        properties, rest = schema.get("properties", {}), schema.get("additionalProperties")
        for key, item in value.items():
            below = properties.get(key, rest if isinstance(rest, Mapping) else None)
            if below is not None:
                yield from _broken_rules(item, below, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and "items" in schema:
        if twice := _twice(value, schema):
            yield path, f"holds {twice} twice"
        for i, item in enumerate(value):
            yield from _broken_rules(item, schema["items"], f"{path}[{i}]")


def _twice(items: list[Any], schema: Mapping[str, Any]) -> str:
    """What a list holds twice that is a set, or a map by some of its items' keys."""
    of = schema.get("x-kubernetes-list-type")
    keys = schema.get("x-kubernetes-list-map-keys", ())
    seen: list[Any] = []
    for item in items if of in ("set", "map") else ():
        what = {key: item.get(key) for key in keys} if of == "map" else item
        if what in seen:
            return str(what)
        seen.append(what)
    return ""


def _holds(rule: str, value: Any) -> bool:
    try:
        return bool(_program(rule).evaluate({"self": celpy.json_to_cel(value)}))
    except celpy.CELEvalError:  # the server refuses what a rule cannot be run on
        return False


@cache
def _program(rule: str) -> celpy.Runner:
    environment = celpy.Environment()
    return environment.program(environment.compile(rule))


def _shown(path: Any) -> str:
    shown = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return shown.removeprefix(".")
