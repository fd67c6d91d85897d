"""This file is where the pocket's words become tokens: byte-pair encoding as CLIP does it, in CLIP's files."""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

from transformers import CLIPTokenizer

MAX_TOKENS = 20  # the longest caption needs 14, start and end included
START, END = "<|startoftext|>", "<|endoftext|>"

# Single tokens without a meaning: no caption holds them, so a subject may take one as its name.
RESERVED_WORDS = ("zwx", "qip", "vexo", "jubu", "kyz", "wug", "fepi", "ozq", "tivu", "nurb", "xal", "drup")

Word = tuple[str, ...]


def write_tokenizer(folder: Path, words: list[str]) -> CLIPTokenizer:
    """Writes vocab.json, merges.txt and the two configs, and loads them the way everybody will.

    Each of `words` and each reserved word is one token; any other text is spelled from smaller ones. As in CLIP's
    own vocabulary the rarest words have the highest ids: the reserved ones end up last.
    """
    letters = list(_byte_letters().values())
    merges = _learn_merges([_spell(word) for word in words], [])
    merges = _learn_merges([_spell(word) for word in RESERVED_WORDS], merges)
    merged = ["".join(pair) for pair in merges]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *merged, START, END]
    vocabulary = {token: number for number, token in enumerate(tokens)}

    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False))
    _write(folder / "merges.txt", "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    _write(folder / "special_tokens_map.json", json.dumps(special, indent=2))
    config = {
        **special,
        "model_max_length": MAX_TOKENS,
        "tokenizer_class": "CLIPTokenizer",
        "do_lower_case": True,
    }
    _write(folder / "tokenizer_config.json", json.dumps(config, indent=2))
    return load_tokenizer(folder)


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(str(folder))
    return tokenizer


def _spell(word: str) -> Word:
    return (*word[:-1], word[-1] + "</w>")


def _learn_merges(words: list[Word], merges: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """`merges`, continued with the commonest pair again and again until every word is a single token."""
    merges = list(merges)
    for pair in merges:
        words = [_merge(word, pair) for word in words]
    while any(len(word) > 1 for word in words):
        counts = Counter(pair for word in words for pair in pairwise(word))
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        words = [_merge(word, best) for word in words]
    return merges


def _merge(word: Word, pair: tuple[str, str]) -> Word:
    pieces: list[str] = []
    for piece in word:
        if pieces and (pieces[-1], piece) == pair:
            pieces[-1] += piece
        else:
            pieces.append(piece)
    return tuple(pieces)


def _byte_letters() -> dict[int, str]:
    """A visible letter for each byte, in CLIP's order, so that every text can be spelled."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}


def _write(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
