"""This file is where the rare word that names a subject is chosen, or checked when the user chose it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import UserError
from training.basekind import is_clip

MAX_TOKENS = 4  # more share the subject among embeddings that all mean something already

# Single tokens of CLIP's vocabulary, of its rarest merges, that mean little; `zwx` is for small models.
CANDIDATES = ("ohwx", "phol", "tzky", "ynna", "zshq", "ylde", "zwx")

KNOWN_MEANINGS: Mapping[str, str] = {
    "sks": "a rifle",
    "ak47": "a rifle",
    "sls": "a car",
    "gtr": "a car",
    "jdm": "Japanese cars",
    "dbz": "an animated series",
    "bnha": "an animated series",
    "xyz": "axes and diagrams",
}


@dataclass(frozen=True)
class Choice:
    """An identifier, its token ids in the base's tokenizer, and what the user should know about it."""

    identifier: str
    token_ids: tuple[int, ...]
    warnings: list[str] = field(default_factory=list)


def choose_identifier(tokenizer: Any, wanted: str, class_noun: str) -> Choice:
    """The identifier of a subject. It depends on the tokenizer and the class noun alone: not on name or time.

    Args:
        tokenizer: The base's CLIP tokenizer, or a tuple of them: the word is chosen by the first, and the others, where
            they know other words, must know it too.
        wanted: `auto`, or the user's own word.
        class_noun: The subject's class; one the tokenizer does not hold as a word is a warning.

    Raises:
        UserError: The word cannot be spelled by the tokenizer, is longer than four tokens, or has braces; or
            `auto` finds no rare word.
    """
    if isinstance(tokenizer, tuple):
        return _of_all(tokenizer, wanted, class_noun)
    warnings = _class_warnings(tokenizer, class_noun)
    if wanted == "auto":
        word = _rare_word(tokenizer, class_noun)
        return Choice(word, token_ids_of(tokenizer, word), warnings)
    ids = token_ids_of(tokenizer, wanted)
    pieces = "+".join(_spelled(tokenizer, ids))
    if not ids or tokenizer.unk_token_id in ids or re.search(r"[{}]", wanted):
        raise UserError(
            f"the identifier {wanted!r} cannot be used",
            "the base's tokenizer has no tokens for it",
            "use letters and digits, or subject.identifier: auto",
        )
    if len(ids) > MAX_TOKENS:
        raise UserError(
            f"the identifier {wanted!r} is too long",
            f"the base splits it into {len(ids)} tokens ({pieces}), at most {MAX_TOKENS} are allowed",
            "use a short rare word, or subject.identifier: auto",
        )
    if len(ids) > 1:
        warnings.append(
            f"the identifier {wanted!r} is {len(ids)} tokens ({pieces}); one rare token learns better"
        )
    meaning = KNOWN_MEANINGS.get(wanted.lower())
    if meaning:
        warnings.append(f"the identifier {wanted!r} already means {meaning} to models like this one")
    elif len(ids) == 1 and wanted not in CANDIDATES and ids[0] < len(tokenizer) // 2:
        warnings.append(
            f"the identifier {wanted!r} is a frequent word of the base; a rare one learns the subject better"
        )
    return Choice(wanted, ids, warnings)


def _of_all(tokenizers: tuple[Any, ...], wanted: str, class_noun: str) -> Choice:
    first, *others = tokenizers
    choice = choose_identifier(first, wanted, class_noun)
    told = list(choice.warnings)
    for other in filter(is_clip, others):  # a T5 reads pieces of whatever word
        if other.get_vocab() != first.get_vocab():
            told += choose_identifier(other, choice.identifier, class_noun).warnings
    return Choice(choice.identifier, choice.token_ids, list(dict.fromkeys(told)))


def new_identifier(tokenizer: Any, wanted: str, class_noun: str, count: int) -> Choice:
    """The identifier of a subject that gets tokens of its own: a word in angle brackets, which the base does not have.

    Args:
        tokenizer: The base's CLIP tokenizer.
        wanted: `auto`, or the user's own word, with or without brackets; its case is folded as everywhere.
        class_noun: The subject's class.
        count: Tokens that the word becomes, numbered on from the tokenizer's last.

    Raises:
        UserError: The word has other characters than letters, digits, `-` and `_`, or the tokenizer has it already.
    """
    warnings = _class_warnings(tokenizer, class_noun)
    bare = _rare_word(tokenizer, class_noun) if wanted == "auto" else wanted.lower()
    word = bare if bare.startswith("<") else f"<{bare}>"
    if not re.fullmatch(r"<[a-z0-9][a-z0-9_-]*>", word):
        raise UserError(
            f"the identifier {wanted!r} cannot be a token of its own",
            "it is letters, digits, - and _ in angle brackets",
            "write <ohwx>, or subject.identifier: auto",
        )
    if word in tokenizer.get_vocab():
        raise UserError(
            f"the identifier {wanted!r} cannot be a new token",
            f"the base has a token {word} already",
            "take another word, or leave train.new_tokens out to train with that one",
        )
    return Choice(word, tuple(range(len(tokenizer), len(tokenizer) + count)), warnings)


def token_ids_of(tokenizer: Any, text: str) -> tuple[int, ...]:
    """The token ids of `text` alone, without start and end."""
    return tuple(int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"])


def _spelled(tokenizer: Any, ids: tuple[int, ...]) -> list[str]:
    return [str(t).removesuffix("</w>") for t in tokenizer.convert_ids_to_tokens(list(ids))]


def _class_warnings(tokenizer: Any, class_noun: str) -> list[str]:
    warnings = []
    for word in class_noun.split():
        ids = token_ids_of(tokenizer, word)
        if len(ids) != 1 or tokenizer.unk_token_id in ids:
            pieces = "+".join(_spelled(tokenizer, ids))
            warnings.append(
                f"the class noun {word!r} is no single word of the base's vocabulary ({pieces}); "
                "look whether its prior images show one"
            )
    return warnings


def _rare_word(tokenizer: Any, class_noun: str) -> str:
    """The first candidate that is one token; else the rarest short word, rather one without vowels.

    Ids of a BPE vocabulary grow with rarity, as merges are learned from the most frequent pair down.
    """
    taken = {*class_noun.lower().split(), *KNOWN_MEANINGS}
    by_rarity = sorted(tokenizer.get_vocab().items(), key=lambda item: -item[1])
    short = [str(t).removesuffix("</w>") for t, _ in by_rarity if re.fullmatch(r"[a-z]{3,4}</w>", t)]
    unlike_words = [word for word in short if not re.search("[aeiouy]", word)]
    for word in (*CANDIDATES, *unlike_words, *short):
        ids = token_ids_of(tokenizer, word)
        if len(ids) == 1 and ids[0] != tokenizer.unk_token_id and word not in taken:
            return word
    raise UserError(
        "no identifier could be picked", "the base's tokenizer has no short word", "give subject.identifier"
    )
