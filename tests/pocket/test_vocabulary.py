"""Tests of the pocket's tokenizer, made anew: what is one token, and that everything can be spelled."""

import pytest
from transformers import CLIPTokenizer

from pocket.vocabulary import MAX_TOKENS, RESERVED_WORDS, write_tokenizer
from pocket.world import caption_words, facts


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"), caption_words())


def _ids(tokenizer: CLIPTokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


@pytest.mark.parametrize("word", [word for word in caption_words() if word.isalpha()])
def test_a_caption_word_is_one_token(tokenizer: CLIPTokenizer, word: str) -> None:
    assert len(_ids(tokenizer, word)) == 1


def test_reserved_words_are_single_tokens_rarer_than_all_others(tokenizer: CLIPTokenizer) -> None:
    reserved = [_ids(tokenizer, word) for word in RESERVED_WORDS]
    assert all(len(ids) == 1 for ids in reserved)
    common = max(_ids(tokenizer, word)[0] for word in caption_words() if word.isalpha())
    assert min(ids[0] for ids in reserved) > common


@pytest.mark.parametrize("text", ["sks", "Rex the 2nd!", "naïve", "Zürich 9", "~"])
def test_any_text_can_be_spelled(tokenizer: CLIPTokenizer, text: str) -> None:
    ids = _ids(tokenizer, text)
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids).replace(" ", "") == text.lower().replace(" ", "")


def test_captions_leave_room_for_an_identifier(tokenizer: CLIPTokenizer) -> None:
    longest = max(len(tokenizer(facts(0, index).caption).input_ids) for index in range(3000))
    assert longest + 4 <= MAX_TOKENS == tokenizer.model_max_length
