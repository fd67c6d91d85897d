"""This file is where a prompt's `{subject}` and `{class}` become words."""

import re
from collections.abc import Mapping

from cluster.errors import UserError

TEMPLATE = "a {identifier} {class}"
CLASS_PROMPT = "a photo of a {class}"  # what tells whether a class is what it was

_SLOT = re.compile(r"(?:\b(a|an|the|my|your|his|her|our|their|this|that)(\s+))?\{(\w+)\}", re.IGNORECASE)
_ARTICLE = re.compile(r"(?:a|an|the)\s+", re.IGNORECASE)
# By sound, as far as a first syllable tells: an hour, a unicorn.
_VOWEL_SOUND = re.compile(
    r"(?!uni|use|uk[eu]|eu|ewe|one\b|once\b)[aeiou]|hour|heir|hono|honest", re.IGNORECASE
)


def render_prompt(prompt: str, class_noun: str, identifier: str | None, template: str = TEMPLATE) -> str:
    """`prompt` with its slots filled: "on the beach, {subject}" becomes "on the beach, a zwx dog".

    The template's own article is dropped where the prompt brings one ("my {subject}" is "my zwx dog"), and
    "a" and "an" right before a slot follow the word that fills it.

    Args:
        prompt: May say `{subject}` and `{class}`, and `{identifier}` where words stand between it and the article,
            as in "a red {identifier} {class}"; no other braces.
        class_noun: Fills `{class}`, without an article.
        identifier: The subject's rare word; `None` for the pristine base, which knows no subject.
        template: What `{subject}` means, in terms of `{identifier}` and `{class}`.

    Raises:
        UserError: A slot is unknown, a brace stands alone, or `{subject}` is asked of the base.
    """
    phrases = {"class": class_noun}
    if identifier is not None:
        phrases["subject"] = _fill(template, {"identifier": identifier, "class": class_noun})
        phrases["identifier"] = identifier
    elif "{subject}" in prompt or "{identifier}" in prompt:
        raise UserError(
            "there is no subject to put into the prompt", repr(prompt), "say {class} or name the thing itself"
        )
    return _fill(prompt, phrases)


def without_subject(prompt: str) -> str:
    """The prompt with `{class}` alone where it names the subject: what CLIP reads, which knows no identifier."""
    return render_prompt(prompt.replace("{identifier} ", ""), "{class}", "", "a {class}")


def _fill(text: str, phrases: Mapping[str, str]) -> str:
    def words(match: re.Match[str]) -> str:
        determiner, gap, slot = match.groups()
        if slot not in phrases:
            return match.group()  # its braces stay, and are refused below
        phrase = phrases[slot]
        if determiner is None:
            return phrase
        phrase = _ARTICLE.sub("", phrase, count=1) if _ARTICLE.match(phrase) else phrase
        if determiner.lower() in ("a", "an"):
            determiner = determiner[0] + ("n" if _VOWEL_SOUND.match(phrase) else "")
        return f"{determiner}{gap}{phrase}"

    left = _SLOT.sub(lambda m: "" if m[3] in phrases else m.group(), text)
    if "{" in left or "}" in left:
        known = ", ".join(f"{{{slot}}}" for slot in sorted(phrases))
        raise UserError("the prompt has braces that mean nothing", repr(text), f"use {known}, or no braces")
    return _SLOT.sub(words, text)
