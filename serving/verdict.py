"""This file is where it is named how a safety check answers. A check imports nothing else of ours."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """Yes, or no with a reason code."""

    allowed: bool
    reason: str = ""
    """A code for programs and counts, such as `word_list`; it repeats nothing of the prompt."""


ALLOWED = Verdict(True)
