"""The tokenizer as training needs it: fast, with a padding token that is never the end of a text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from advisor.errors import EnvironmentLacksError, InputError, UnsupportedError, first_line

_UNUSED = re.compile(r"pad|reserved|placeholder|dummy|unused|unk", re.IGNORECASE)


def load_tokenizer(path: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder or hub id, padding with `<unk>` or another token that text never has.

    Were padding the end-of-text token, whoever masks labels by token would mask the end as well, and the model would
    never learn to stop.

    Args:
        path: what from_pretrained takes.
        trust_remote_code: whether the model's own code may run.

    Raises:
        InputError: there is no tokenizer there, or none of its tokens can pad.
        UnsupportedError: it cannot tell which characters a token stands for.
        EnvironmentLacksError: the hub cannot be reached.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _not_loaded(path, error) from error
    if not getattr(tokenizer, "is_fast", False):
        raise UnsupportedError(
            f"The tokenizer of {path} has no fast version.",
            why="What carries loss is found by the characters that each token stands for, which only a fast one knows.",
            hint="Use a model with a tokenizer.json.",
        )
    tokenizer.pad_token = padding_token(tokenizer, path)
    return tokenizer


def padding_token(tokenizer: Any, path: str) -> str:
    """`<unk>` unless it ends texts; else a token that the vocabulary holds in reserve.

    Raises:
        InputError: there is none.
    """
    in_use = (tokenizer.eos_token, tokenizer.bos_token)
    template = str(tokenizer.chat_template or "")
    for token in _candidates(tokenizer):
        if token is not None and token not in in_use and token not in template:
            return token
    raise InputError(
        f"The tokenizer of {path} can pad only with {tokenizer.eos_token!r}, the token that ends a text.",
        why="Masked as padding, the end would never be learned, and the model would not stop.",
        hint="Give the tokenizer a padding token of its own, for example a reserved one.",
    )


def _candidates(tokenizer: Any) -> Iterator[str | None]:
    yield tokenizer.unk_token
    yield tokenizer.pad_token
    for _, token in sorted(tokenizer.added_tokens_decoder.items()):
        if token.special and _UNUSED.search(token.content):
            yield token.content


def _not_loaded(path: str, error: Exception) -> InputError | EnvironmentLacksError:
    why = first_line(error)
    if Path(path).exists():
        return InputError(f"No tokenizer can be loaded from {path}.", why=why, hint="It needs a tokenizer.json.")
    return EnvironmentLacksError(
        f"The tokenizer of {path} is neither here nor to be reached.",
        why=why,
        hint="Check the name, go online once to fill the cache, or give a folder.",
    )
