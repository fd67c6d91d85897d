"""This file is where a subject gets tokens of its own: rows of the text encoder's embedding beyond those of the base.

The base's rows are parameters of no run that has new ones: the new rows lie beside them, so that the others stay as
they are to the bit and no optimizer holds anything of them. A base's tokens are numbered 0 to V - 1, the new ones on.

n new tokens, V tokens of the base, D text width.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from cluster.errors import SystemFailure

FILE = "learned_embeds.safetensors"  # what diffusers' load_textual_inversion looks for
OF_AUTOMATIC = "emb_params"  # what AUTOMATIC1111, ComfyUI and kohya call the one tensor of such a file


@dataclass(frozen=True, eq=False)
class NewTokens:
    """A word that the base does not have."""

    word: str
    """As prompts write it, such as `<zwx>`: it stands for all n tokens, in order."""
    embeddings: torch.Tensor
    """[n, D] float32."""

    @property
    def names(self) -> list[str]:
        """The tokens one by one, as diffusers names those of one word: `<zwx>`, `<zwx>_1`."""
        return [self.word, *(f"{self.word}_{number}" for number in range(1, len(self.embeddings)))]

    def words(self, first: int) -> Mapping[str, Sequence[int]]:
        """What `token_ids` wants to know of them; `first` is V."""
        return {self.word: range(first, first + len(self.embeddings))}


class GrownEmbedding(nn.Embedding):
    """An embedding with new rows behind its own. Both are called as before; the own ones are not trained.

    Args:
        plain: The base's [V, D]; its parameter is shared and frozen.
        tokens: The new rows, copied.
    """

    def __init__(self, plain: nn.Embedding, tokens: NewTokens) -> None:
        super().__init__(plain.num_embeddings, plain.embedding_dim, _weight=plain.weight.detach())
        self.weight = plain.weight.requires_grad_(False)
        self.word = tokens.word
        self.new = nn.Parameter(tokens.embeddings.detach().to(plain.weight.device, copy=True))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Embeddings [..., D] of token ids [...]."""
        is_new = input >= self.num_embeddings
        known = super().forward(input.masked_fill(is_new, 0))
        own = nn.functional.embedding((input - self.num_embeddings).clamp(min=0), self.new)
        return torch.where(is_new[..., None], own, known)


def started(text_encoder: nn.Module, word: str, initializer_ids: Sequence[int], count: int) -> NewTokens:
    """New tokens as they start: each the mean of the tokens of a known word.

    Args:
        text_encoder: Of the base.
        word: The new word.
        initializer_ids: Tokens of the known one.
        count: n.
    """
    rows = _embedding(text_encoder).weight.detach()[list(initializer_ids)]
    return NewTokens(word, rows.mean(dim=0).repeat(count, 1))


def grow(text_encoder: nn.Module, tokens: NewTokens) -> None:
    """Have a text encoder, in place, know new tokens; their embeddings require a gradient, the base's do not."""
    cast(Any, text_encoder).set_input_embeddings(GrownEmbedding(_embedding(text_encoder), tokens))


@contextmanager
def knowing(text_encoder: nn.Module, tokens: NewTokens | None) -> Iterator[None]:
    """A context in which a text encoder knows new tokens, if there are any."""
    plain = _embedding(text_encoder)
    if tokens is not None:
        grow(text_encoder, tokens)
    try:
        yield
    finally:
        cast(Any, text_encoder).set_input_embeddings(plain)


def learned(text_encoder: nn.Module) -> NewTokens | None:
    """The new tokens that a text encoder knows, as they are now; their embeddings are its parameter."""
    embedding = _embedding(text_encoder)
    return NewTokens(embedding.word, embedding.new) if isinstance(embedding, GrownEmbedding) else None


def whole_state(text_encoder: nn.Module) -> dict[str, torch.Tensor]:
    """The state of a text encoder as stock transformers names it: new rows behind the base's, [V + n, D]."""
    state = dict(text_encoder.state_dict())
    for name in [name for name in state if name.endswith("token_embedding.new")]:
        weight = f"{name.removesuffix('new')}weight"
        state[weight] = torch.cat([state[weight], state.pop(name)])
    return state


def save_tokens(tokens: NewTokens, file: Path, name: str | None = None) -> None:
    """Write embeddings as stock `load_textual_inversion(file)` reads them.

    Args:
        tokens: To write.
        file: Where to.
        name: Of the tensor, where a program calls for another than the word.
    """
    rows = tokens.embeddings.detach().float().cpu().contiguous()
    save_file({name or tokens.word: rows}, file, metadata={"format": "pt"})


def read_tokens(folder: Path) -> NewTokens | None:
    """The new tokens of an artifact; `None` when it has none.

    Raises:
        SystemFailure: The file is not one of ours.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as tensors:
            [word] = tensors.keys()
            embeddings = tensors.get_tensor(word)
    except (SafetensorError, ValueError) as error:
        raise SystemFailure(f"{file} holds no tokens of ours", str(error)) from error
    if len(embeddings.shape) != 2:
        raise SystemFailure(f"{file} holds no tokens of ours", f"a tensor of shape {tuple(embeddings.shape)}")
    return NewTokens(word, embeddings)


def _embedding(text_encoder: nn.Module) -> nn.Embedding:
    return cast(nn.Embedding, cast(Any, text_encoder).get_input_embeddings())
