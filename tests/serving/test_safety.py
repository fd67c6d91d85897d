"""Nothing passes a configured check that the check did not allow."""

import logging
import pickle
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.errors import UserError
from serving.safety import MAX_STUCK, SafetyGuard, SafetySettings, SafetyUnavailable, Unsafe, guarded
from serving.verdict import ALLOWED, Verdict
from serving.wordlist import WordList, word_list
from training.png import Pixels

IMAGE = np.zeros((8, 8, 3), np.uint8)


class Says:
    """A check that answers what it was made with, raises it, or calls it."""

    def __init__(self, answer: Any) -> None:
        self.answer, self.asked = answer, 0

    def prompt(self, prompt: str, negative_prompt: str) -> Verdict:
        return self._say()

    def image(self, pixels: Pixels) -> Verdict:
        return self._say()

    def _say(self) -> Any:
        self.asked += 1
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer() if callable(self.answer) else self.answer


def broken(**options: Any) -> Any:
    """A factory that makes no check."""
    return options


def allows(**options: Any) -> Says:
    return Says(ALLOWED)


def test_what_every_check_allows_passes() -> None:
    checks = {"a": Says(ALLOWED), "b": Says(Verdict(True, "fine"))}
    guard = SafetyGuard(checks)
    guard.prompt("a dog")
    guard.image(IMAGE)
    assert [check.asked for check in checks.values()] == [2, 2]
    assert guard.counts()["image", "allowed", ""] == 1


def test_one_refusal_is_enough_and_says_its_reason() -> None:
    guard = SafetyGuard({"a": Says(ALLOWED), "b": Says(Verdict(False, "gore"))})
    with pytest.raises(Unsafe) as refused:
        guard.image(IMAGE)
    assert (refused.value.subject, refused.value.reason) == ("image", "gore")
    assert guard.counts()["image", "refused", "gore"] == 1


def test_no_png_is_made_of_an_image_that_is_not_allowed() -> None:
    made: list[str] = []
    for answer in (Verdict(False, "gore"), RuntimeError("gone"), ALLOWED):
        finish = guarded(SafetyGuard({"a": Says(answer)}), lambda pixels, facts: made.append("png") or b"png")
        if answer is ALLOWED:
            assert finish(IMAGE, {}) == b"png"
        else:
            with pytest.raises((Unsafe, SafetyUnavailable)):
                finish(IMAGE, {})
    assert made == ["png"]


@pytest.mark.parametrize(
    "answer",
    [RuntimeError("out of memory"), SystemExit(1), KeyboardInterrupt(), None, True, "allow", Verdict("yes")],  # type: ignore[arg-type]
    ids=repr,
)
def test_a_check_that_fails_refuses(answer: Any) -> None:
    guard = SafetyGuard({"a": Says(answer)})
    with pytest.raises(SafetyUnavailable, match="could not judge the prompt"):
        guard.prompt("a dog")
    with pytest.raises(SafetyUnavailable):
        guard.image(IMAGE)
    assert guard.counts() == {("prompt", "failed", "error"): 1, ("image", "failed", "error"): 1}


def test_a_check_that_is_not_done_in_time_refuses_and_those_that_never_come_back_stop_all() -> None:
    free = threading.Event()

    def waits() -> Verdict:
        free.wait(60)
        return ALLOWED

    check = Says(waits)
    guard = SafetyGuard({"a": check}, timeout_s=0.02)
    for _ in range(MAX_STUCK + 2):
        with pytest.raises(SafetyUnavailable):
            guard.image(IMAGE)
    assert check.asked == MAX_STUCK
    assert guard.counts() == {("image", "failed", "timeout"): MAX_STUCK, ("image", "failed", "stuck"): 2}
    free.set()
    end = time.monotonic() + 30
    while guard._stuck and time.monotonic() < end:
        threading.Event().wait(0.01)
    guard.image(IMAGE)


def test_without_checks_all_passes_and_the_log_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        guard = SafetyGuard.of(SafetySettings())
        guard.prompt("anything")
        guard.image(IMAGE)
    assert [record.message for record in caplog.records] == [
        "no safety check is configured: prompts and images are not checked"
    ]


def test_checks_are_loaded_by_the_operators_word(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("gore\n")
    check = {"factory": "serving.wordlist:word_list", "options": {"file": str(tmp_path / "words.txt")}}
    guard = SafetyGuard.of(SafetySettings.model_validate({"checks": [check], "timeout_s": 2}))
    guard.prompt("a dog")
    with pytest.raises(Unsafe, match="word_list"):
        guard.prompt("a dog, GORE")


@pytest.mark.parametrize(
    "check",
    [
        {"factory": "no.such.module:make"},
        {"factory": "serving.wordlist:no_such"},
        {"factory": "serving.wordlist:word_list"},
        {"factory": "serving.wordlist:word_list", "options": {"file": "/nowhere/words.txt"}},
        {"factory": "builtins:dict"},
    ],
    ids=str,
)
def test_a_check_that_cannot_be_loaded_keeps_the_service_down(check: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        SafetyGuard.of(SafetySettings.model_validate({"checks": [check]}))


@pytest.mark.parametrize("factory", ["words", "a:b:c", "os:system('x')", ":x", "a.b:"])
def test_a_factory_that_is_no_name_is_refused(factory: str) -> None:
    with pytest.raises(ValueError, match="factory"):
        SafetySettings.model_validate({"checks": [{"factory": factory}]})


LISTED = ["naked", "Blood Bath", "Straße", "скачать"]


@pytest.mark.parametrize(
    "prompt",
    [
        "a naked dog",
        "NAKED!",
        "a Ｎａｋｅｄ dog",
        "a nákéd dog",
        "a na\u200bked dog",
        "_naked_",
        "a blood-bath",
        "blood   bath",
        "in der STRASSE",
        "СКАЧАТЬ",
    ],
)
def test_a_listed_word_is_found_however_it_is_written(prompt: str) -> None:
    assert WordList(LISTED).prompt(prompt, "") == Verdict(False, "word_list")


@pytest.mark.parametrize(
    "prompt", ["a snaked river", "nakedness", "blood in a bath", "bath blood", "", "a dog"]
)
def test_a_word_that_only_holds_a_listed_one_passes(prompt: str) -> None:
    assert WordList(LISTED).prompt(prompt, "naked").allowed
    assert WordList(LISTED).image(IMAGE).allowed


def test_a_word_list_that_lists_nothing_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    for text in ("", "# only a comment\n\n", "!!!\n"):
        file.write_text(text)
        with pytest.raises(UserError, match="empty"):
            word_list(str(file))
    file.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match="cannot be read"):
        word_list(str(file))


def test_refusals_survive_pickling() -> None:
    for error in (Unsafe("image", "gore"), SafetyUnavailable("prompt", "not done after 5 s")):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), again.as_json()) == (type(error), str(error), error.as_json())
