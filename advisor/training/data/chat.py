"""A sample as the one string that the model sees, and the characters of it that are learned."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from advisor.errors import InputError
from advisor.training.data.rows import RowError
from advisor.training.data.samples import Alpaca, Completion, Conversation, Message, PlainText, Role, Sample

Span = tuple[int, int]
"""First character, and the one after the last."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True)
class Rendered:
    """The string that is tokenised as a whole."""

    text: str
    learned: tuple[Span, ...]
    plain: bool
    """No template wrote it: the tokenizer adds what starts a text, and the end of the text is added."""


class Renderer:
    """Samples → strings, by the model's chat template where it has one.

    Args:
        tokenizer: a fast tokenizer of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._frames: dict[tuple[Role, ...], tuple[str, ...] | None] = {}
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        special.update(tokenizer.all_special_tokens)
        longest_first = sorted(special, key=lambda token: (-len(token), token))
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    @cached_property
    def _template(self) -> str | None:
        return None if self._tokenizer.chat_template is None else str(self._tokenizer.get_chat_template())

    def render(self, sample: Sample) -> Rendered:
        """The sample's string.

        Raises:
            RowError: the template refuses it or loses a part of it, or its text would be read as special tokens.
            InputError: it is a conversation and the model has no chat template.
        """
        if isinstance(sample, PlainText):
            return Rendered(sample.text, ((0, len(sample.text)),), plain=True)
        if self._template is not None:
            return self._render_chat(sample if isinstance(sample, Conversation) else sample.as_conversation())
        if isinstance(sample, Conversation):
            raise InputError(
                "The model has no chat template, and the data are conversations.",
                why="Nothing says how its turns are to be written.",
                hint="Use an instruct model, or data with prompt and completion.",
            )
        joined = sample.as_completion() if isinstance(sample, Alpaca) else sample
        return _join(joined)

    def _render_chat(self, conversation: Conversation) -> Rendered:
        self._refuse_special_tokens(conversation.messages)
        if _GENERATION.search(self._template or ""):
            text, spans = self._marked_by_template(conversation.messages)
        else:
            text = self._write(conversation.messages)
            framed = self._marked_by_frame(conversation.messages, text)
            spans = self._marked_by_prefixes(conversation.messages, text) if framed is None else framed
        first = sum(message.role == "assistant" for message in conversation.messages[: conversation.learned_from])
        if not self._special.search(text, spans[-1][0]):
            text = text[: spans[-1][1]] + self._tokenizer.eos_token
            spans[-1] = (spans[-1][0], len(text))
        return Rendered(text, tuple(spans[first:]), plain=False)

    def _refuse_special_tokens(self, messages: Sequence[Message]) -> None:
        for number, message in enumerate(messages, start=1):
            if found := self._special.search(message.content):
                raise RowError(f"the {message.role}'s turn {number} contains {found[0]}, a special token of the model")

    def _write(self, messages: Sequence[Message], *, asks: bool = False) -> str:
        """The template's text; `asks` ends it where an answer would begin."""
        from jinja2 import TemplateError

        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text: str = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=asks)
        except TemplateError as error:
            raise RowError(f"the chat template refuses it: {error}") from error
        return text

    def _marked_by_template(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """For a template that says itself what the model generates."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            rendered: Any = render_jinja_template(
                [turns],
                chat_template=self._template,
                return_assistant_tokens_mask=True,
                **self._tokenizer.special_tokens_map,
            )
        except TemplateError as error:
            raise RowError(f"the chat template refuses it: {error}") from error
        text: str = rendered[0][0]
        spans: list[Span] = rendered[1][0]
        if len(spans) != sum(message.role == "assistant" for message in messages):
            raise RowError("the chat template does not mark each of the assistant's turns")
        starts = [start for start, _ in spans[1:]] + [len(text)]
        return text, [
            (start, stop) if self._special.search(text, start, stop) else (start, self._end_of_turn(text, stop, limit))
            for (start, stop), limit in zip(spans, starts, strict=True)
        ]

    def _marked_by_frame(self, messages: Sequence[Message], text: str) -> list[Span] | None:
        """The assistant's contents inside what the template writes around contents; None if they are not there so."""
        frame = self._frame(tuple(message.role for message in messages))
        if frame is None:
            return None
        for contents in ([m.content for m in messages], [m.content.strip() for m in messages]):
            pieces = [part for pair in zip(frame, [*contents, ""], strict=True) for part in pair]
            if "".join(pieces) != text:
                continue
            starts, at = [], 0
            for before, content in zip(frame, [*contents, ""], strict=True):
                starts.append(at + len(before))
                at += len(before) + len(content)
            return [
                (start, self._end_of_turn(text, start + len(content), stop))
                for start, content, stop, message in zip(starts, contents, [*starts[1:-1], at], messages, strict=False)
                if message.role == "assistant"
            ]
        return None

    def _frame(self, roles: tuple[Role, ...]) -> tuple[str, ...] | None:
        """What the template writes before, between and after the contents of turns with these roles.

        Found by rendering turns whose contents occur nowhere else. None if that cannot be told.

        Raises:
            RowError: the template leaves a turn out.
        """
        if roles not in self._frames:
            marks = [f"\ue000{number}\ue001" for number in range(len(roles))]
            text = self._write([Message(role, mark) for role, mark in zip(roles, marks, strict=True)])
            for role, mark in zip(roles, marks, strict=True):
                if mark not in text:
                    raise RowError(f"the chat template leaves the {role}'s turn out")
            parts = re.split("\ue000\\d+\ue001", text)
            in_order = [found[0] for found in re.finditer("\ue000\\d+\ue001", text)] == marks
            self._frames[roles] = tuple(parts) if in_order else None
        return self._frames[roles]

    def _marked_by_prefixes(self, messages: Sequence[Message], text: str) -> list[Span]:
        """For a template that changes contents: from the end of each request to where its answer's turn ends.

        Raises:
            RowError: the text up to an answer changes with what follows it.
        """
        spans = []
        for number, message in enumerate(messages):
            if message.role != "assistant":
                continue
            asked = self._write(messages[:number], asks=True)
            answered = self._write(messages[: number + 1])
            if not text.startswith(asked):
                raise RowError(f"the chat template writes turn {number + 1} so that its answer cannot be told apart")
            same = len(text) if number + 1 == len(messages) else _common_prefix(text, answered)
            ends = [found.end() for found in self._special.finditer(text, len(asked), same)]
            spans.append((len(asked), ends[-1] if ends else same))
        return spans

    def _end_of_turn(self, text: str, at: int, limit: int) -> int:
        """Where what the model has to say to end its turn ends.

        In the middle, the first special token after the content, before the next content at `limit`; after the last
        content, every special token that follows.
        """
        found = [match.end() for match in self._special.finditer(text, at, limit)]
        if not found:
            return at
        return found[-1] if limit == len(text) else found[0]


def _join(sample: Completion) -> Rendered:
    text = sample.prompt + sample.completion
    return Rendered(text, ((len(sample.prompt), len(text)),), plain=True)


def _common_prefix(one: str, other: str) -> int:
    shortest = min(len(one), len(other))
    return next((at for at in range(shortest) if one[at] != other[at]), shortest)
