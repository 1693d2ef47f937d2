"""Special tokens' text inside contents, tokenised as the ordinary text that it is there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_NAME = "\ue000t{}\ue001"


class SpecialTokens:
    """The special tokens of a tokenizer, where they are in a text, and how to have them mean nothing.

    Args:
        tokenizer: a fast tokenizer of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._backend = tokenizer.backend_tokenizer
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        special.update(tokenizer.all_special_tokens)
        longest_first = sorted(special, key=lambda token: (-len(token), token))
        self._names = {token: _NAME.format(number) for number, token in enumerate(longest_first)}
        self._pattern = re.compile("|".join([*map(re.escape, longest_first), "\ue000t\\d+\ue001"]))
        self._renamed: tuple[Any, dict[int, int]] | None = None

    def in_text(self, text: str, start: int = 0, stop: int | None = None) -> Iterator[re.Match[str]]:
        """Where special tokens are, hidden or not."""
        return self._pattern.finditer(text, start, len(text) if stop is None else stop)

    def hide(self, text: str) -> str:
        """The text with names for its special tokens that occur in no other text."""
        return self._pattern.sub(lambda match: self._names.get(match[0], match[0]), text)

    def encode_hidden(self, text: str) -> tuple[NDArray[np.int32], list[tuple[int, int]]]:
        """One tokenisation of a text in which only hidden special tokens are special: ids, and characters of each."""
        if self._renamed is None:
            self._renamed = self._rename()
        backend, original = self._renamed
        encoding = backend.encode(text, add_special_tokens=False)
        ids = np.array([original.get(token, token) for token in encoding.ids], dtype=np.int32)
        return ids, encoding.offsets

    def _rename(self) -> tuple[Any, dict[int, int]]:
        """The same tokenizer, its special tokens under their hidden names, and which id each really has."""
        from tokenizers import AddedToken, Tokenizer

        settings = json.loads(self._backend.to_str())
        added, settings["added_tokens"] = settings["added_tokens"], []
        settings["post_processor"] = settings["truncation"] = settings["padding"] = None
        renamed = Tokenizer.from_str(json.dumps(settings))
        original: dict[int, int] = {}
        for token in added:
            content = self._names.get(token["content"], token["content"])
            flags = {name: token[name] for name in ("single_word", "lstrip", "rstrip", "normalized", "special")}
            add = renamed.add_special_tokens if token["special"] else renamed.add_tokens
            add([AddedToken(content, **flags)])
            if (number := renamed.token_to_id(content)) is not None:
                original[number] = token["id"]
        return renamed, original
