"""This file is where a subject gets tokens of its own: rows of the text encoders' embeddings beyond those of the base.

The base's rows are parameters of no run that has new ones: the new rows lie beside them, so that the others stay as
they are to the bit and no optimizer holds anything of them. A base's tokens are numbered 0 to V - 1, the new ones on.
SDXL has two text encoders, and so two rows of each new token, of two widths.

n new tokens, V tokens of the base, D width of a text encoder.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from cluster.errors import SystemFailure
from training.conditioning import text_parts
from training.imports import making

FILE = "learned_embeds.safetensors"  # what diffusers' load_textual_inversion looks for
OF_AUTOMATIC = "emb_params"  # what AUTOMATIC1111, ComfyUI and kohya call the one tensor of such a file
_KEYS = {
    "text_encoder": "clip_l",
    "text_encoder_2": "clip_g",
}  # what all of them call those of SDXL's encoders
_WORD = "word"  # the key of its metadata under which a file of several tensors has the word


@dataclass(frozen=True, eq=False)
class NewTokens:
    """A word that the base does not have."""

    word: str
    """As prompts write it, such as `<zwx>`: it stands for all n tokens, in order."""
    embeddings: Mapping[str, torch.Tensor]
    """By text encoder (its part): [n, D] float32."""

    @property
    def count(self) -> int:
        """n."""
        return len(next(iter(self.embeddings.values())))

    @property
    def names(self) -> list[str]:
        """The tokens one by one, as diffusers names those of one word: `<zwx>`, `<zwx>_1`."""
        return [self.word, *(f"{self.word}_{number}" for number in range(1, self.count))]

    def words(self, first: int) -> Mapping[str, Sequence[int]]:
        """What `token_ids` wants to know of them; `first` is V."""
        return {self.word: range(first, first + self.count)}


class GrownEmbedding(nn.Embedding):
    """An embedding with new rows behind its own. Both are called as before; the own ones are not trained.

    Args:
        plain: The base's [V, D]; its parameter is shared and frozen.
        word: The word that the new rows are.
        rows: The new [n, D], copied.
    """

    def __init__(self, plain: nn.Embedding, word: str, rows: torch.Tensor) -> None:
        super().__init__(plain.num_embeddings, plain.embedding_dim, _weight=plain.weight.detach())
        self.weight = plain.weight.requires_grad_(False)
        self.word = word
        self.new = nn.Parameter(rows.detach().to(plain.weight.device, copy=True))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Embeddings [..., D] of token ids [...]."""
        is_new = input >= self.num_embeddings
        known = super().forward(input.masked_fill(is_new, 0))
        own = nn.functional.embedding((input - self.num_embeddings).clamp(min=0), self.new)
        return torch.where(is_new[..., None], own, known)


def started(text_encoder: nn.Module, word: str, initializer_ids: Sequence[int], count: int) -> NewTokens:
    """New tokens as they start: each the mean of the tokens of a known word, in every text encoder its own.

    Args:
        text_encoder: Of the base.
        word: The new word.
        initializer_ids: Tokens of the known one.
        count: n.
    """
    rows = {
        part: _embedding(model).weight.detach()[list(initializer_ids)].mean(dim=0).repeat(count, 1)
        for part, model in text_parts(text_encoder).items()
    }
    return NewTokens(word, rows)


def grow(text_encoder: nn.Module, tokens: NewTokens, end: int) -> None:
    """Have a text encoder, in place, know new tokens; their embeddings require a gradient, the base's do not.

    Args:
        text_encoder: Of the base.
        tokens: New to it.
        end: The id that ends a prompt, its tokenizers' `eos_token_id`: what is pooled is pooled there. The configs of
            published bases say 2, and transformers then pools at the highest id, which is that of a new token.
    """
    with making:  # a row's, while another thread may load a model
        for part, model in text_parts(text_encoder).items():
            grown = GrownEmbedding(_embedding(model), tokens.word, tokens.embeddings[part])
            cast(Any, model).set_input_embeddings(grown)
            _pooling(model).eos_token_id = end


@contextmanager
def knowing(text_encoder: nn.Module, tokens: NewTokens | None, end: int) -> Iterator[None]:
    """A context in which a text encoder knows new tokens, if there are any; `end` as of `grow`."""
    models = text_parts(text_encoder).values()
    plain = [(model, _embedding(model), _pooling(model).eos_token_id) for model in models]
    if tokens is not None:
        grow(text_encoder, tokens, end)
    try:
        yield
    finally:
        for model, embedding, pooled_at in plain:
            cast(Any, model).set_input_embeddings(embedding)
            _pooling(model).eos_token_id = pooled_at


def learned(text_encoder: nn.Module) -> NewTokens | None:
    """The new tokens that a text encoder knows, as they are now; their embeddings are its parameters."""
    found = {part: _embedding(model) for part, model in text_parts(text_encoder).items()}
    grown = {part: one for part, one in found.items() if isinstance(one, GrownEmbedding)}
    if not grown:
        return None
    return NewTokens(next(iter(grown.values())).word, {part: one.new for part, one in grown.items()})


def embedding_names(parameters: Iterable[str]) -> dict[str, str]:
    """Those of `PART.NAME` that are embeddings of tokens, by part."""
    return {name.partition(".")[0]: name for name in parameters if name.endswith(".token_embedding.weight")}


def whole_state(text_encoder: nn.Module) -> dict[str, torch.Tensor]:
    """The state of a text encoder as stock transformers names it: new rows behind the base's, [V + n, D]."""
    state = dict(text_encoder.state_dict())
    for name in [name for name in state if name.endswith("token_embedding.new")]:
        weight = f"{name.removesuffix('new')}weight"
        state[weight] = torch.cat([state[weight], state.pop(name)])
    return state


def save_tokens(tokens: NewTokens, file: Path, name: str | None = None) -> None:
    """Write embeddings as stock `load_textual_inversion` reads them.

    Args:
        tokens: To write. Of one text encoder the file itself is what is read; of two it has a tensor for each, `clip_l`
            and `clip_g`, which are read one by one.
        file: Where to.
        name: Of the one tensor, where a program calls for another than the word.
    """
    rows = {part: one.detach().float().cpu().contiguous() for part, one in tokens.embeddings.items()}
    if len(rows) == 1:
        save_file({name or tokens.word: rows["text_encoder"]}, file, metadata={"format": "pt"})
    else:  # one key: safetensors writes several in any order, and the same tokens should be the same bytes
        save_file({_KEYS[part]: one for part, one in rows.items()}, file, metadata={_WORD: tokens.word})


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
            found = {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118 (it is no mapping)
            word = (tensors.metadata() or {}).get(_WORD) or next(iter(found), "")
    except SafetensorError as error:
        raise SystemFailure(f"{file} holds no tokens of ours", str(error)) from error
    keys = {"text_encoder": word} if len(found) == 1 else _KEYS
    shapes = {key: tuple(rows.shape) for key, rows in found.items()}
    fit = {*keys.values()} == {*found} and {len(shape) for shape in shapes.values()} == {2}
    if not fit or len({n for n, _ in shapes.values()}) != 1:
        raise SystemFailure(f"{file} holds no tokens of ours", f"tensors of shapes {shapes}")
    return NewTokens(word, {part: found[key] for part, key in keys.items()})


def _embedding(text_encoder: nn.Module) -> nn.Embedding:
    return cast(nn.Embedding, cast(Any, text_encoder).get_input_embeddings())


def _pooling(text_encoder: nn.Module) -> Any:
    """The module of a text encoder that pools."""
    return getattr(text_encoder, "text_model", text_encoder)
