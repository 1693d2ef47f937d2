"""A sample as the one string that the model sees, and the characters of it that are learned."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from advisor.errors import InputError
from advisor.training.data.literal import SpecialTokens
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
    plain: bool = False
    """No template wrote it: the tokenizer adds what starts a text, and the end of the text is added."""

    hidden: bool = False
    """Its contents hold text that reads like special tokens; the real ones go by hidden names."""


class Renderer:
    """Samples → strings, by the model's chat template where it has one.

    Args:
        tokenizer: a fast tokenizer of transformers.
        special: its special tokens.
    """

    def __init__(self, tokenizer: Any, special: SpecialTokens) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._frames: dict[tuple[Role, ...], tuple[str, ...] | None] = {}

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
        return _join(sample.as_completion() if isinstance(sample, Alpaca) else sample)

    def _render_chat(self, conversation: Conversation) -> Rendered:
        messages = conversation.messages
        misread = self._first_special(messages)
        if _GENERATION.search(self._template or ""):
            rendered = None if misread else self._marked_by_template(messages)
        else:
            text = self._write(messages)
            rendered = self._marked_by_frame(messages, text, hide=misread is not None)
            if rendered is None and misread is None:
                rendered = self._marked_by_prefixes(messages, text)
        if rendered is None:
            raise RowError(f"{misread}, a special token of the model")
        first = sum(message.role == "assistant" for message in messages[: conversation.learned_from])
        return replace(rendered, learned=rendered.learned[first:])

    def _first_special(self, messages: Sequence[Message]) -> str | None:
        for number, message in enumerate(messages, start=1):
            if found := next(self._special.in_text(message.content), None):
                return f"the {message.role}'s turn {number} contains {found[0]}"
        return None

    def _write(self, messages: Sequence[Message], *, asks: bool = False) -> str:
        """The template's text; `asks` ends it where an answer would begin."""
        from jinja2 import TemplateError

        try:
            text: str = self._tokenizer.apply_chat_template(
                _turns(messages), tokenize=False, add_generation_prompt=asks
            )
        except TemplateError as error:
            raise RowError(f"the chat template refuses it: {error}") from error
        return text

    def _marked_by_template(self, messages: Sequence[Message]) -> Rendered:
        """For a template that says itself what the model generates."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            written: Any = render_jinja_template(
                [_turns(messages)],
                chat_template=self._template,
                return_assistant_tokens_mask=True,
                **self._tokenizer.special_tokens_map,
            )
        except TemplateError as error:
            raise RowError(f"the chat template refuses it: {error}") from error
        text: str = written[0][0]
        spans: list[Span] = written[1][0]
        if len(spans) != sum(message.role == "assistant" for message in messages):
            raise RowError("the chat template does not mark each of the assistant's turns")
        limits = [start for start, _ in spans[1:]] + [len(text)]
        ends = [
            stop if any(self._special.in_text(text, start, stop)) else self._end_of_turn(text, stop, limit)
            for (start, stop), limit in zip(spans, limits, strict=True)
        ]
        return self._ended(text, [(start, end) for (start, _), end in zip(spans, ends, strict=True)])

    def _marked_by_frame(self, messages: Sequence[Message], text: str, *, hide: bool) -> Rendered | None:
        """The assistant's contents inside what the template writes around contents; None if they are not there so."""
        frame = self._frame(tuple(message.role for message in messages))
        contents = [message.content for message in messages]
        if frame is not None and _fill(frame, contents) != text:
            contents = [content.strip() for content in contents]  # what `| trim` does
        if frame is None or _fill(frame, contents) != text:
            return None
        if hide:
            frame = tuple(self._special.hide(part) for part in frame)
            text = _fill(frame, contents)
        starts, at = [], 0
        for before, content in zip(frame, contents, strict=False):
            starts.append(at + len(before))
            at = starts[-1] + len(content)
        limits = [*starts[1:], len(text)]
        spans = [
            (start, self._end_of_turn(text, start + len(content), limit))
            for start, content, limit, message in zip(starts, contents, limits, messages, strict=True)
            if message.role == "assistant"
        ]
        closed = spans[-1][1] > starts[-1] + len(contents[-1])
        return self._ended(text, spans, closed=closed, hidden=hide)

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
            in_order = re.findall("\ue000\\d+\ue001", text) == marks
            self._frames[roles] = tuple(re.split("\ue000\\d+\ue001", text)) if in_order else None
        return self._frames[roles]

    def _marked_by_prefixes(self, messages: Sequence[Message], text: str) -> Rendered:
        """For a template that changes contents: from the end of each request to where its answer's turn ends.

        Contents hold no special tokens here.

        Raises:
            RowError: the text up to an answer changes with what follows it, or nothing ends the answer.
        """
        spans = []
        for number, message in enumerate(messages):
            if message.role != "assistant":
                continue
            asked = self._write(messages[:number], asks=True)
            start, limit = len(asked), len(text)
            if number + 1 < len(messages):
                limit = text.find(messages[number + 1].content.strip(), start)
            end = self._end_of_turn(text, start, limit)
            if not text.startswith(asked) or end == start:
                raise RowError(f"the chat template writes turn {number + 1} so that its answer cannot be told apart")
            spans.append((start, end))
        return self._ended(text, spans)

    def _end_of_turn(self, text: str, at: int, limit: int) -> int:
        """Where what the model has to say to end its turn ends.

        In the middle, the first special token after the content, before the next content at `limit`; after the last
        content, every special token that follows.
        """
        found = [match.end() for match in self._special.in_text(text, at, limit)]
        if not found:
            return at
        return found[-1] if limit == len(text) else found[0]

    def _ended(self, text: str, spans: list[Span], *, closed: bool | None = None, hidden: bool = False) -> Rendered:
        """With the end of text after a last answer that no special token closes."""
        if closed is None:
            closed = any(self._special.in_text(text, *spans[-1]))
        eos = self._tokenizer.eos_token
        if not closed and eos is not None:
            start, stop = spans[-1]
            text = text[:stop] + (self._special.hide(eos) if hidden else eos)
            spans[-1] = (start, len(text))
        return Rendered(text, tuple(spans), hidden=hidden)


def _turns(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def _fill(frame: Sequence[str], contents: Sequence[str]) -> str:
    return "".join(part for pair in zip(frame, [*contents, ""], strict=True) for part in pair)


def _join(sample: Completion) -> Rendered:
    text = sample.prompt + sample.completion
    return Rendered(text, ((len(sample.prompt), len(text)),), plain=True)
