"""This file is where the choice and the check of identifiers are tested, with a real tokenizer."""

from pathlib import Path

import pytest
from transformers.models.clip.tokenization_clip import CLIPTokenizer

from cluster.errors import UserError
from training.identifier import choose_identifier, token_ids_of


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(tiny_base / "tokenizer")


def plain_tokenizer(*words: str) -> CLIPTokenizer:
    """A tokenizer whose vocabulary is letters and `words`, each merged letter by letter, in that order."""
    vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    merges: list[tuple[str, str]] = []
    for letter in "abcdefghijklmnopqrstuvwxyz":
        vocab |= {letter: len(vocab), f"{letter}</w>": len(vocab) + 1}
    for word in words:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            merges.append((pieces[-2], pieces[-1]))
            pieces[-2:] = ["".join(pieces[-2:])]
            vocab.setdefault(pieces[-1], len(vocab))
    return CLIPTokenizer(vocab=vocab, merges=merges)


def test_auto_picks_a_single_rare_token_and_always_the_same(tokenizer: CLIPTokenizer) -> None:
    choice = choose_identifier(tokenizer, "auto", "dog")
    assert choice == choose_identifier(tokenizer, "auto", "cat")
    assert choice.token_ids == token_ids_of(tokenizer, choice.identifier)
    assert len(choice.token_ids) == 1
    assert choice.identifier == "zwx"
    assert choice.warnings == []


def test_auto_never_picks_the_class_noun_itself(tokenizer: CLIPTokenizer) -> None:
    assert choose_identifier(tokenizer, "auto", "zwx").identifier != "zwx"


def test_auto_without_a_candidate_takes_the_rarest_short_word_rather_one_without_vowels() -> None:
    assert choose_identifier(plain_tokenizer("dog", "qzj", "vkr", "hat"), "auto", "dog").identifier == "vkr"
    assert choose_identifier(plain_tokenizer("dog", "cat"), "auto", "dog").identifier == "cat"


def test_auto_fails_with_a_remedy_when_the_vocabulary_has_no_word() -> None:
    with pytest.raises(UserError) as caught:
        choose_identifier(plain_tokenizer(), "auto", "dog")
    assert caught.value.what == "no identifier could be picked"
    assert caught.value.do == "give subject.identifier"


def test_an_identifier_of_five_tokens_is_refused(tokenizer: CLIPTokenizer) -> None:
    with pytest.raises(UserError) as caught:
        choose_identifier(tokenizer, "q7j9x", "dog")
    assert caught.value.what == "the identifier 'q7j9x' is too long"
    assert caught.value.seen == "the base splits it into 5 tokens (q+7+j+9+x), at most 4 are allowed"
    assert "subject.identifier: auto" in caught.value.do


@pytest.mark.parametrize("word", [" ", "{subject}", "🐕"])
def test_an_identifier_that_cannot_be_spelled_is_refused(tokenizer: CLIPTokenizer, word: str) -> None:
    with pytest.raises(UserError) as caught:
        choose_identifier(tokenizer, word, "dog")
    assert caught.value.what == f"the identifier {word!r} cannot be used"
    assert caught.value.seen == "the base's tokenizer has no tokens for it"
    assert "letters and digits" in caught.value.do


def test_a_given_identifier_of_several_tokens_is_warned_about(tokenizer: CLIPTokenizer) -> None:
    choice = choose_identifier(tokenizer, "q7j", "dog")
    assert len(choice.token_ids) == 3
    assert choice.warnings == ["the identifier 'q7j' is 3 tokens (q+7+j); one rare token learns better"]


def test_known_meanings_are_warned_about(tokenizer: CLIPTokenizer) -> None:
    (warning,) = choose_identifier(tokenizer, "sks", "dog").warnings
    assert "already means a rifle" in warning


def test_a_frequent_word_is_warned_about() -> None:
    rare = "xz" * 40  # learned in 79 merges, all after that of the frequent word
    tokenizer = plain_tokenizer("go", rare)
    assert "frequent word" in choose_identifier(tokenizer, "go", "go").warnings[0]
    assert choose_identifier(tokenizer, rare, "go").warnings == []


def test_an_unknown_class_noun_is_a_warning_never_a_refusal(tokenizer: CLIPTokenizer) -> None:
    (warning,) = choose_identifier(tokenizer, "auto", "red quokka").warnings
    assert warning.startswith("the class noun 'quokka' is no single word of the base's vocabulary (q+u+")


def test_a_word_is_checked_with_every_tokenizer_of_a_base(tokenizer: CLIPTokenizer) -> None:
    alone = choose_identifier(tokenizer, "auto", "dog")
    assert choose_identifier((tokenizer, tokenizer), "auto", "dog") == alone
    other = plain_tokenizer("dog")
    both = choose_identifier((tokenizer, other), "auto", "dog")
    assert (both.identifier, both.token_ids) == (alone.identifier, alone.token_ids)
    assert any("is 3 tokens" in warning for warning in both.warnings)
