"""This file is where it is written what an evaluation draws: the paper's prompts, by what the subject is.

Source: the 25 prompts for objects and the 25 for live subjects are those of google/dreambooth,
`prompts_and_classes.txt` (Ruiz et al. 2023, CC-BY-4.0).
"""

from collections.abc import Sequence

from training.prompt import without_subject

_SHARED = (
    "{subject} in the jungle",
    "{subject} in the snow",
    "{subject} on the beach",
    "{subject} on a cobblestone street",
    "{subject} on top of pink fabric",
    "{subject} on top of a wooden floor",
    "{subject} with a city in the background",
    "{subject} with a mountain in the background",
    "{subject} with a blue house in the background",
    "{subject} on top of a purple rug in a forest",
)
_TRAITS = (
    "a red {identifier} {class}",
    "a purple {identifier} {class}",
    "a shiny {identifier} {class}",
    "a wet {identifier} {class}",
    "a cube shaped {identifier} {class}",
)
OBJECT = (
    *_SHARED,
    "{subject} with a wheat field in the background",
    "{subject} with a tree and autumn leaves in the background",
    "{subject} with the Eiffel Tower in the background",
    "{subject} floating on top of water",
    "{subject} floating in an ocean of milk",
    "{subject} on top of green grass with sunflowers around it",
    "{subject} on top of a mirror",
    "{subject} on top of the sidewalk in a crowded street",
    "{subject} on top of a dirt road",
    "{subject} on top of a white rug",
    *_TRAITS,
)
LIVE = (
    *_SHARED,
    "{subject} wearing a red hat",
    "{subject} wearing a santa hat",
    "{subject} wearing a rainbow scarf",
    "{subject} wearing a black top hat and a monocle",
    "{subject} in a chef outfit",
    "{subject} in a firefighter outfit",
    "{subject} in a police outfit",
    "{subject} wearing pink glasses",
    "{subject} wearing a yellow shirt",
    "{subject} in a purple wizard outfit",
    *_TRAITS,
)
# The words that the pocket base knows: its ten scenes and, of its ten colours, five.
POCKET = tuple(
    f"a photo of {{subject}} {place}"
    for place in (
        "on the grass",
        "on the beach",
        "in the snow",
        "in the desert",
        "in space",
        "in the ocean",
        "in front of mountains",
        "in the city",
        "on a wooden table",
        "in the forest",
        "on a red background",
        "on a blue background",
        "on a yellow background",
        "on a white background",
        "on a black background",
    )
)
SETS = {"object": OBJECT, "live": LIVE, "pocket": POCKET}
CLASS_PROMPTS = 5  # of a set, of which the class is drawn as well, the subject not being asked for

# Nouns that are drawn in clothes; every other one is an object.
_LIVE_NOUNS = frozenset(
    [
        "animal",
        "baby",
        "bear",
        "bird",
        "boy",
        "bunny",
        "cat",
        "chicken",
        "child",
        "cow",
        "deer",
        "dog",
        "dragon",
        "duck",
        "elephant",
        "face",
        "fish",
        "fox",
        "frog",
        "girl",
        "hamster",
        "hedgehog",
        "horse",
        "kitten",
        "lion",
        "man",
        "monkey",
        "mouse",
        "owl",
        "panda",
        "parrot",
        "penguin",
        "person",
        "pet",
        "pig",
        "pony",
        "puppy",
        "rabbit",
        "sheep",
        "squirrel",
        "tiger",
        "turtle",
        "wolf",
        "woman",
        "zebra",
    ]
)


def prompts_for(class_noun: str, family: str) -> str:
    """The name of the set for a class and a family of bases: `object`, `live` or `pocket`."""
    if family == "pocket":
        return "pocket"
    return "live" if class_noun.lower().split()[-1] in _LIVE_NOUNS else "object"


def class_prompts(prompts: Sequence[str]) -> tuple[str, ...]:
    """Prompts of the class for the same scenes as the first few of `prompts`: `a {class}` in place of `{subject}`."""
    return tuple(without_subject(prompt) for prompt in list(dict.fromkeys(prompts))[:CLASS_PROMPTS])
