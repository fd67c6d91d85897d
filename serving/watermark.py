"""This file is where a picture is marked so that no eye sees it, and where the mark is read back.

The mark says "raybooth drew this" and the first digits of the artifact's hash. It lies in the luma of the picture
*at one small size*, whatever the picture's own: the luma is scaled to a grid of G x G, cut into 8 x 8 blocks, and in
each block's cosine transform a few low frequencies are moved onto one of two interleaved lattices, the bit's own
(quantisation index modulation with a keyed dither). What moved is scaled up and added. A reader scales to the same
grid, so resizing and JPEG, which keep low frequencies, keep the mark; cropping, turning and mirroring do not.

It is ours, in numpy and Pillow, because the libraries that could be had do less: see docs/provenance.md.

G grid size, N blocks a side, K frequencies a block, B bits of the message.

Source:
    Chen and Wornell, Quantization Index Modulation, IEEE Trans. Inf. Theory 47 (2001).
"""

import hashlib
import string
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from training.png import Pixels

Floats = NDArray[np.float64]

KEY = b"raybooth watermark 1"  # of the check and of the places; another format is another key
CHECK_BITS = 24
FREQUENCIES = ((0, 1), (1, 0), (1, 1), (2, 0), (0, 2))  # the lowest but the mean: they survive most
STEPS = 3  # scaling down and up again is not the identity; three corrections leave under 1 % of the way
GUESSES = 8  # the least certain bits are tried both ways: 256 messages against 24 bits of check
CERTAIN = (
    1.4  # mean certainty of a bit in deviations; unmarked photos have 0.81 +- 0.09, and 1.17 at the most
)
LARGE = 4.0  # a frequency this many lattice steps large counts half: scaling changes it by some percent


@dataclass(frozen=True)
class _Profile:
    """How pictures of a range of sizes are marked."""

    side: int
    """Pixels of the shorter side from which it is used."""
    grid: int
    step: float
    """Of the lattice, in levels of luma: what is robust, and what is seen."""
    id_bits: int

    @property
    def bits(self) -> int:
        return self.id_bits + CHECK_BITS


PROFILES = (
    _Profile(256, 128, 10.0, 32),
    _Profile(128, 64, 16.0, 16),
    _Profile(
        64, 64, 20.0, 16
    ),  # at 16 a JPEG of a smaller copy is lost, at 24 flat sky shows it when enlarged
)
SMALLEST = min(profile.side for profile in PROFILES)


@dataclass(frozen=True)
class Watermark:
    """What a picture's mark says."""

    tag: str
    """The first hex digits of the artifact's hash: eight, or four in pictures under 256 pixels."""
    certainty: float
    """Mean distance of a bit from chance, in standard deviations."""


def tag_of(identity: str) -> str:
    """Eight hex digits for a hash in hex, or for any other text."""
    digest = identity.lower()
    if len(digest) < 8 or not set(digest[:8]) <= set(string.hexdigits):
        digest = hashlib.sha256(identity.encode()).hexdigest()
    return digest[:8]


def embed(pixels: Pixels, identity: str) -> Pixels | None:
    """The picture with its mark; `None` when it is too small for one.

    Args:
        pixels: [H, W, 3] uint8.
        identity: The artifact's hash in hex.
    """
    profile = next((p for p in PROFILES if min(pixels.shape[:2]) >= p.side), None)
    if profile is None:
        return None
    height, width = pixels.shape[:2]
    places, dither = _places(profile)
    message = _message(tag_of(identity)[: profile.id_bits // 4])
    offset = (dither + np.array(message)[places] / 2) * profile.step
    have = _read_grid(pixels, profile.grid)
    wanted = np.round((have - offset) / profile.step) * profile.step + offset
    change, marked = np.zeros((height, width), np.float32), pixels
    for step in range(STEPS):
        if step:
            have = _read_grid(marked, profile.grid)
        change += _scaled(_write_grid(wanted - have, profile.grid), width, height)
        moved = pixels + np.rint(change).astype(np.int16)[..., None]
        marked = moved.clip(0, 255).astype(np.uint8)
    return marked


def read(pixels: Pixels) -> Watermark | None:
    """The mark of a picture, perhaps scaled and compressed since; `None` when there is none that can be read.

    Args:
        pixels: [H, W, 3] uint8.
    """
    by_grid: dict[int, Floats] = {}
    for profile in PROFILES:
        if profile.grid not in by_grid:
            by_grid[profile.grid] = _read_grid(pixels, profile.grid)
        if found := _decode(by_grid[profile.grid], profile):
            return found
    return None


def _decode(values: Floats, profile: _Profile) -> Watermark | None:
    """The message in the frequencies [N N K], if its check holds and its bits are no chance."""
    places, dither = _places(profile)
    weight = 1 / (1 + (values / (LARGE * profile.step)) ** 2)
    votes = weight * np.cos(2 * np.pi * (values / profile.step - dither))
    sums: Floats = np.bincount(places, votes, profile.bits).astype(np.float64)
    deviations = np.sqrt(np.bincount(places, weight**2, profile.bits) / 2)
    certainty = float((np.abs(sums) / deviations).mean())
    if certainty < CERTAIN:
        return None
    digits = profile.id_bits // 4
    for bits in _guesses(sums):
        tag = f"{int(''.join(map(str, bits[: profile.id_bits])), 2):0{digits}x}"
        if _message(tag) == bits:
            return Watermark(tag, round(certainty, 2))
    return None


def _guesses(sums: Floats) -> Iterator[list[int]]:
    """Messages by likelihood, roughly: as read, then with the least certain bits turned."""
    bits = (sums < 0).astype(int)
    weak = np.argsort(np.abs(sums), kind="stable")[:GUESSES]
    for turns in sorted(product((0, 1), repeat=len(weak)), key=sum):
        guess = bits.copy()
        guess[weak] ^= np.array(turns)
        yield guess.tolist()


def _message(tag: str) -> list[int]:
    """The bits of a tag and of its check."""
    check = hashlib.sha256(KEY + tag.encode()).hexdigest()[: CHECK_BITS // 4]
    digits = tag + check
    return [int(bit) for bit in f"{int(digits, 16):0{4 * len(digits)}b}"]


def _places(profile: _Profile) -> tuple[NDArray[np.int64], Floats]:
    """For each frequency of each block [N N K] the bit that it carries, and its dither in [0, 1)."""
    seed = hashlib.sha256(KEY + f"{profile.grid} {profile.step}".encode()).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(seed[:8])))
    count = (profile.grid // 8) ** 2 * len(FREQUENCIES)
    return generator.permutation(count) % profile.bits, generator.random(count)


def _read_grid(pixels: Pixels, grid: int) -> Floats:
    """The chosen frequencies [N N K] of the luma at the grid's size."""
    blocks = grid // 8
    luma = _scaled(np.asarray(Image.fromarray(pixels, "RGB").convert("L"), np.float32), grid, grid)
    tiles = luma.reshape(blocks, 8, blocks, 8).transpose(0, 2, 1, 3)
    cosines = _DCT @ tiles.astype(np.float64) @ _DCT.T
    return np.stack([cosines[:, :, i, j] for i, j in FREQUENCIES], axis=-1).reshape(-1)


def _write_grid(values: Floats, grid: int) -> NDArray[np.float32]:
    """The luma [G, G] that has the given frequencies [N N K] and no other."""
    blocks = grid // 8
    cosines = np.zeros((blocks, blocks, 8, 8))
    by_block = values.reshape(blocks, blocks, len(FREQUENCIES))
    for number, (i, j) in enumerate(FREQUENCIES):
        cosines[:, :, i, j] = by_block[..., number]
    tiles = _DCT.T @ cosines @ _DCT
    return tiles.transpose(0, 2, 1, 3).reshape(grid, grid).astype(np.float32)


def _scaled(luma: NDArray[np.float32], width: int, height: int) -> NDArray[np.float32]:
    """Luma at another size."""
    if luma.shape == (height, width):
        return luma
    return np.asarray(Image.fromarray(luma, "F").resize((width, height), Image.Resampling.BICUBIC))


def _cosines() -> Floats:
    """The matrix of the cosine transform of 8 samples, orthonormal."""
    n = np.arange(8)
    matrix = np.cos(np.pi * (2 * n[None] + 1) * n[:, None] / 16) / 2
    matrix[0] /= np.sqrt(2)
    return matrix


_DCT = _cosines()
