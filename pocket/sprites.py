"""This file is where the things of the pocket world come from: emoji drawings from npm, never committed."""

import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

FLUENT = "@lobehub/fluent-emoji-3d@1.1.0"  # MIT
NOTO = "emoji-datasource-google@16.0.0"  # drawings Apache-2.0, fonts OFL
STYLES = ("3d", "flat")  # the Fluent drawing and the Noto drawing of the same thing
SPRITE_SIZE = 96  # larger than any thing in a picture (54), so every sample only shrinks

# noun: code point of the Fluent drawing, code point of the Noto drawing
NOUNS: dict[str, tuple[str, str]] = {
    "dog": ("1f436", "1f415"),
    "cat": ("1f431", "1f408"),
    "rabbit": ("1f430", "1f407"),
    "fox": ("1f98a", "1f98a"),
    "lion": ("1f981", "1f981"),
    "elephant": ("1f418", "1f418"),
    "whale": ("1f433", "1f433"),
    "fish": ("1f41f", "1f41f"),
    "turtle": ("1f422", "1f422"),
    "crab": ("1f980", "1f980"),
    "butterfly": ("1f98b", "1f98b"),
    "bee": ("1f41d", "1f41d"),
    "frog": ("1f438", "1f438"),
    "owl": ("1f989", "1f989"),
    "penguin": ("1f427", "1f427"),
    "duck": ("1f986", "1f986"),
    "panda": ("1f43c", "1f43c"),
    "snail": ("1f40c", "1f40c"),
    "octopus": ("1f419", "1f419"),
    "pig": ("1f437", "1f416"),
    "teddy bear": ("1f9f8", "1f9f8"),
    "robot": ("1f916", "1f916"),
    "backpack": ("1f392", "1f392"),
    "boot": ("1f462", "1f462"),
    "sneaker": ("1f45f", "1f45f"),
    "glasses": ("1f453", "1f453"),
    "teapot": ("1fad6", "1fad6"),
    "cup": ("2615", "2615"),
    "bowl": ("1f963", "1f963"),
    "can": ("1f96b", "1f96b"),
    "candle": ("1f56f-fe0f", "1f56f-fe0f"),
    "crown": ("1f451", "1f451"),
    "umbrella": ("2602-fe0f", "2602-fe0f"),
    "guitar": ("1f3b8", "1f3b8"),
    "bicycle": ("1f6b2", "1f6b2"),
    "rocket": ("1f680", "1f680"),
    "car": ("1f697", "1f697"),
    "airplane": ("2708-fe0f", "2708-fe0f"),
    "ship": ("1f6f3-fe0f", "1f6f3-fe0f"),
    "tractor": ("1f69c", "1f69c"),
    "house": ("1f3e0", "1f3e0"),
    "chair": ("1fa91", "1fa91"),
    "clock": ("23f0", "23f0"),
    "camera": ("1f4f7", "1f4f7"),
    "balloon": ("1f388", "1f388"),
    "gift": ("1f381", "1f381"),
    "basketball": ("1f3c0", "1f3c0"),
    "trophy": ("1f3c6", "1f3c6"),
    "key": ("1f511", "1f511"),
    "bell": ("1f514", "1f514"),
    "hat": ("1f3a9", "1f3a9"),
    "dress": ("1f457", "1f457"),
    "hamburger": ("1f354", "1f354"),
    "apple": ("1f34e", "1f34e"),
    "banana": ("1f34c", "1f34c"),
    "strawberry": ("1f353", "1f353"),
    "pineapple": ("1f34d", "1f34d"),
    "watermelon": ("1f349", "1f349"),
    "donut": ("1f369", "1f369"),
    "cactus": ("1f335", "1f335"),
    "tulip": ("1f337", "1f337"),
    "mushroom": ("1f344", "1f344"),
    "pumpkin": ("1f383", "1f383"),
    "snowman": ("2603-fe0f", "2603-fe0f"),
}


@dataclass(frozen=True)
class Sprites:
    """The drawings, by (noun, style): RGBA, SPRITE_SIZE x SPRITE_SIZE pixels."""

    images: dict[tuple[str, str], Image.Image]


def fetch_sprites(work: Path) -> Path:
    """The folder with one file per (noun, style), fetched from npm where it is not there yet.

    Args:
        work: folder for downloads; tarballs already lying in `work/npm` are used as they are.

    Raises:
        RuntimeError: npm is missing or could not fetch a package.
    """
    folder = work / "sprites"
    wanted = {folder / _file_name(noun, style) for noun in NOUNS for style in STYLES}
    if all(path.exists() for path in wanted):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    for style, package in zip(STYLES, (FLUENT, NOTO), strict=True):
        _unpack(_pack(package, work / "npm"), style, folder)
    missing = sorted(path.name for path in wanted if not path.exists())
    if missing:
        raise RuntimeError(
            f"the npm packages hold no drawing for {missing}; choose other code points in NOUNS"
        )
    return folder


def load_sprites(folder: Path) -> Sprites:
    """All drawings of a folder that `fetch_sprites` filled."""
    images = {}
    for noun in NOUNS:
        for style in STYLES:
            with Image.open(folder / _file_name(noun, style)) as image:
                drawing = image.convert("RGBA").resize((SPRITE_SIZE, SPRITE_SIZE), Image.Resampling.LANCZOS)
            images[noun, style] = drawing
    return Sprites(images)


def _file_name(noun: str, style: str) -> str:
    return f"{noun.replace(' ', '_')}.{style}.png"


def _pack(package: str, folder: Path) -> Path:
    """The tarball of an npm package, in `folder`."""
    tarball = folder / (package.removeprefix("@").replace("/", "-").replace("@", "-") + ".tgz")
    if not tarball.exists():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True)
        except (FileNotFoundError, subprocess.CalledProcessError) as failure:
            detail = getattr(failure, "stderr", b"") or str(failure).encode()
            raise RuntimeError(
                f"npm pack {package} failed: {detail.decode(errors='replace').strip()[-300:]}; "
                f"install npm, or put {tarball.name} into {folder}"
            ) from failure
    return tarball


def _unpack(tarball: Path, style: str, folder: Path) -> None:
    """Writes the drawings of one style, one PNG per noun."""
    column = STYLES.index(style)
    root = "package/assets/{}.webp" if style == "3d" else "package/img/google/64/{}.png"
    members: dict[str, list[str]] = {}
    for noun, codes in NOUNS.items():
        # The two packages disagree on when a file name carries the variation selector fe0f.
        for code in {codes[column], codes[column].removesuffix("-fe0f")}:
            members.setdefault(root.format(code), []).append(noun)
    with tarfile.open(tarball) as archive:
        for member in archive:
            for noun in members.get(member.name, ()):
                stream = archive.extractfile(member)
                if stream is None:
                    continue
                target = folder / _file_name(noun, style)
                partial = target.with_suffix(".partial")
                with Image.open(stream) as image:
                    image.convert("RGBA").save(partial, format="PNG")
                partial.replace(target)
                stream.close()
