"""This file is where a folder's name says what is in it: a name, and in kohya's style a word and a class."""

import re

# 10_ohwx dog: repeats, the word that names the subject, its class
_KOHYA = re.compile(r"(\d+)_(\S+) +(\S.*)")


def name_of(folder: str) -> str:
    """A name made of that of a folder or file: lower case letters, digits, `-` and `_`; may be empty."""
    return re.sub(r"[^a-z0-9_-]+", "-", folder.lower()).strip("-_")[:63]


def subject_in(folder: str) -> dict[str, str]:
    """The settings of `subject` that a folder's name gives: `name`, and `identifier` and `class` of `10_ohwx dog`.

    The number is kohya's repeats; here work is counted in steps, and every photo has the same share of them.
    """
    found = _KOHYA.fullmatch(folder.strip())
    if found is None:
        return {"name": name_of(folder)}
    _, word, noun = found.groups()
    return {"name": name_of(f"{word} {noun}"), "identifier": word, "class": noun.strip()}
