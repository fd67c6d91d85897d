"""Tests of the pocket's CLIP: what counts as a right answer, and that stock transformers loads the shipped one."""

import pytest
import torch
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from pocket.clip import (
    FOLDER,
    INDIVIDUALS,
    MAX_BYTES,
    NOUNS_PER_BATCH,
    contrast,
    draw_individuals,
    embed_images,
    is_true_of,
    load_clip,
    traits_of,
)
from pocket.individuals import noun_of, view_facts
from pocket.shapes import SHAPES
from pocket.subject import subject_photos
from pocket.world import SIZE, Facts

shipped = pytest.mark.skipif(
    not (FOLDER / "config.json").exists(), reason="no CLIP here: python -m pocket.pretrain makes it"
)

DOG = Facts("dog", "3d", "in the snow", "a dog")
DOG_IN_SNOW = Facts("dog", "flat", "in the snow", "a dog in the snow")
FLAT_DOG = Facts("dog", "flat", "in space", "a photo of a flat dog")
CAT = Facts("cat", "3d", "in the snow", "a 3d cat in the snow")


def test_a_caption_is_true_of_every_picture_that_shows_all_it_says() -> None:
    true = is_true_of(*traits_of([DOG, DOG_IN_SNOW, FLAT_DOG, CAT]))
    assert true.tolist() == [
        [True, True, True, False],  # "a dog" is any dog anywhere
        [True, True, False, False],
        [False, True, True, False],
        [False, False, False, True],
    ]


def test_the_contrast_is_least_where_right_answers_alone_are_near() -> None:
    right = torch.tensor([[True, True, False], [True, True, False], [False, False, True]])
    near = torch.where(right, 20.0, -20.0)
    ideal = torch.log(torch.tensor(2.0)) * 2 / 3  # two right answers share what one could have
    assert contrast(near, right).item() == pytest.approx(ideal.item(), abs=1e-4)
    assert contrast(torch.zeros(3, 3), right) < contrast(-near, right)


def test_rows_without_a_right_answer_do_not_count() -> None:
    right = torch.tensor([[True, False], [False, False]])
    logits = torch.tensor([[9.0, -9.0], [-50.0, 50.0]])
    assert contrast(logits, right).item() == pytest.approx(0.0, abs=1e-4)


def test_a_batch_holds_different_individuals_of_few_classes() -> None:
    numbers = draw_individuals(64, torch.Generator().manual_seed(0)).tolist()
    assert len(set(numbers)) == 64
    assert all(0 <= number < INDIVIDUALS for number in numbers)
    assert len({noun_of(number) for number in numbers}) == NOUNS_PER_BATCH


def test_views_of_an_individual_keep_noun_and_style() -> None:
    views = [view_facts(0, 77, angle) for angle in range(8)]
    assert {(one.noun, one.style) for one in views} == {(noun_of(77), views[0].style)}
    assert len({one.place for one in views}) > 1


@shipped
def test_stock_transformers_loads_the_shipped_one() -> None:
    model = CLIPModel.from_pretrained(FOLDER, local_files_only=True).eval()
    processor = CLIPImageProcessor.from_pretrained(FOLDER, local_files_only=True)
    tokenizer = CLIPTokenizer.from_pretrained(FOLDER, local_files_only=True)
    photos = subject_photos("car", 0)
    with torch.inference_mode():
        seen = model(
            **processor(images=photos, return_tensors="pt"),
            **tokenizer(["a car", "a fish"], padding="max_length", return_tensors="pt"),
        )
    assert seen.logits_per_image.shape == (4, 2)
    assert seen.image_embeds.dtype == torch.float32
    ours = embed_images(model, [photo.resize((SIZE, SIZE), 3) for photo in photos])
    assert (ours * seen.image_embeds).sum(dim=1).min() > 0.99


@shipped
def test_the_shipped_one_fits_the_repository() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= MAX_BYTES


@shipped
def test_the_shipped_one_tells_subjects_of_a_class_apart() -> None:
    model, eyesight = load_clip()
    assert eyesight.individual > 0.8
    right = total = 0
    for noun in SHAPES:
        photos = [subject_photos(noun, seed, 2) for seed in range(6)]
        first, second = (
            embed_images(model, [pair[turn].resize((SIZE, SIZE)) for pair in photos]) for turn in (0, 1)
        )
        right += int(((first @ second.T).argmax(dim=1) == torch.arange(6)).sum())
        total += 6
    assert right / total > 0.8
