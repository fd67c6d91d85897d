"""This file is where the words that fill `{subject}` and `{class}` are tested."""

import pytest

from cluster.errors import UserError
from training.prompt import render_prompt


@pytest.mark.parametrize(
    ("prompt", "noun", "words"),
    [
        ("a photo of {subject}", "dog", "a photo of a zwx dog"),
        ("the {subject} on the beach", "dog", "the zwx dog on the beach"),
        ("My {subject}, and a {subject}", "dog", "My zwx dog, and a zwx dog"),
        ("An {subject}", "dog", "A zwx dog"),
        ("a photo of a {class}", "dog", "a photo of a dog"),
        ("a photo of a {class}", "owl", "a photo of an owl"),
        ("an {class} in the snow", "unicorn", "a unicorn in the snow"),
        ("{class}", "hourglass", "hourglass"),
        ("a {class} beside {subject}", "red apple", "a red apple beside a zwx red apple"),
        ("a red {identifier} {class}", "dog", "a red zwx dog"),
        ("without a slot", "dog", "without a slot"),
    ],
)
def test_slots_become_words_with_the_right_article(prompt: str, noun: str, words: str) -> None:
    assert render_prompt(prompt, noun, "zwx") == words


def test_the_template_decides_what_subject_means_and_its_article_follows_the_identifier() -> None:
    assert render_prompt("{subject}", "dog", "ohwx") == "an ohwx dog"
    assert render_prompt("the {subject}", "dog", "zwx", template="the {class} {identifier}") == "the dog zwx"


def test_words_that_look_like_slots_in_a_class_noun_are_not_filled_again() -> None:
    assert render_prompt("{class}", "{subject}", "zwx") == "{subject}"


@pytest.mark.parametrize("prompt", ["a {dog}", "a { dog", "a dog}", "{}", "{subject", "{{subject}}", "{0}"])
def test_other_braces_are_refused_with_the_slots_there_are(prompt: str) -> None:
    with pytest.raises(UserError) as caught:
        render_prompt(prompt, "dog", "zwx")
    assert caught.value.what == "the prompt has braces that mean nothing"
    assert caught.value.seen == repr(prompt)
    assert caught.value.do == "use {class}, {identifier}, {subject}, or no braces"


def test_the_pristine_base_knows_no_subject() -> None:
    assert render_prompt("a {class}", "dog", None) == "a dog"
    with pytest.raises(UserError) as caught:
        render_prompt("a photo of {subject}", "dog", None)
    assert caught.value.what == "there is no subject to put into the prompt"
    assert caught.value.seen == "'a photo of {subject}'"
    assert "{class}" in caught.value.do
