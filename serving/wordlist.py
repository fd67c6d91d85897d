"""This file is where prompts are compared with an operator's list of words."""

import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from cluster.errors import UserError
from serving.verdict import ALLOWED, Verdict
from training.png import Pixels

REASON = "word_list"
_WORDS = re.compile(r"[^\W_]+")


class WordList:
    """A safety check: no prompt may hold one of these words or phrases.

    Whole words are compared, in one form of Unicode, without accents, case and invisible characters: `Ｎａｋéd` is
    `naked`, `grape` holds no `rape`. It knows no inflection, no spelling with other alphabets' look-alikes and no
    meaning; it stops what is asked for plainly.

    Args:
        phrases: What is not drawn.
    """

    def __init__(self, phrases: Iterable[str]) -> None:
        self._phrases = {words for phrase in phrases if (words := _words(phrase))}
        self._longest = max(map(len, self._phrases), default=0)

    def prompt(self, prompt: str, negative_prompt: str) -> Verdict:
        """Refuse a prompt with a listed phrase; what should *not* be there may be named."""
        del negative_prompt
        words = _words(prompt)
        for start in range(len(words)):
            for end in range(start + 1, min(start + self._longest, len(words)) + 1):
                if words[start:end] in self._phrases:
                    return Verdict(False, REASON)
        return ALLOWED

    def image(self, pixels: Pixels) -> Verdict:
        """Words say nothing of pixels."""
        del pixels
        return ALLOWED


def word_list(file: str) -> WordList:
    """The check for a text file: a word or phrase a line; blank lines and `#` comments are skipped.

    Raises:
        UserError: It cannot be read, or lists nothing: an empty list would look like a check and be none.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"the word list {file} cannot be read", str(error), "give a UTF-8 text file"
        ) from error
    phrases = [line.strip() for line in lines if not line.lstrip().startswith("#")]
    if not any(map(_words, phrases)):
        raise UserError(
            f"the word list {file} is empty", "", "add words, or take the check out of safety.checks"
        )
    return WordList(phrases)


def _words(text: str) -> tuple[str, ...]:
    """The words of a text in one form."""
    decomposed = unicodedata.normalize("NFKD", text.casefold())
    plain = "".join(c for c in decomposed if unicodedata.category(c) not in ("Mn", "Cf"))
    return tuple(_WORDS.findall(unicodedata.normalize("NFKC", plain).casefold()))
