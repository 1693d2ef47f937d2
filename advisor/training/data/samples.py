"""What a row means: a conversation, a prompt with its completion, or text, recognised by its columns."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from advisor.errors import InputError, shown
from advisor.training.data.rows import RowError

Format = Literal["messages", "conversations", "prompt/completion", "alpaca", "text"]
Role = Literal["system", "user", "assistant"]

FORMATS: Mapping[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt/completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
"""The columns that each format needs; the first whose columns are all there is taken."""

_ROLES: Mapping[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


@dataclass(frozen=True, slots=True)
class Message:
    """One turn."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns in order; the last is the assistant's."""

    messages: tuple[Message, ...]
    learned_from: int = 0
    """Assistant turns before this index carry no loss."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and what follows it; a model with a chat template sees a conversation."""

    prompt: str
    completion: str

    def as_conversation(self) -> Conversation:
        """A user's turn and the answer to it."""
        return Conversation((Message("user", self.prompt), Message("assistant", self.completion)))


@dataclass(frozen=True, slots=True)
class Alpaca:
    """An instruction, perhaps with an input, and the answer."""

    instruction: str
    input: str
    output: str

    def as_conversation(self) -> Conversation:
        """The input follows the instruction after an empty line."""
        asked = f"{self.instruction}\n\n{self.input}" if self.input else self.instruction
        return Conversation((Message("user", asked), Message("assistant", self.output)))

    def as_completion(self) -> Completion:
        """For a model without a chat template: the prompt that Stanford Alpaca was trained with.

        Source: tatsu-lab/stanford_alpaca train.py (PROMPT_DICT).
        """
        more = ", paired with an input that provides further context" if self.input else ""
        block = f"### Input:\n{self.input}\n\n" if self.input else ""
        return Completion(
            f"Below is an instruction that describes a task{more}. Write a response that appropriately completes the "
            f"request.\n\n### Instruction:\n{self.instruction}\n\n{block}### Response:\n",
            self.output,
        )


@dataclass(frozen=True, slots=True)
class PlainText:
    """Text, all of which is learned."""

    text: str


Sample = Conversation | Completion | Alpaca | PlainText


def recognise(columns: Iterable[str]) -> Format | None:
    """The format whose columns are there, if any."""
    names = set(columns)
    return next((name for name, needed in FORMATS.items() if names.issuperset(needed)), None)


def columns_of(names: Iterable[str]) -> list[str]:
    """Those of a table's columns that its format reads; none where it has no format."""
    names = list(names)
    layout = recognise(names)
    read = (*FORMATS[layout], *(("input",) if layout == "alpaca" else ())) if layout else ()
    return [name for name in read if name in names]


def named(columns: Iterable[str], most: int) -> str:
    """The first of some columns' names."""
    return ", ".join(shown(name, 24) for name in list(columns)[:most]) or "no columns"


def refuse_columns(place: str, columns: Iterable[str]) -> InputError:
    """The error for columns that mean nothing here."""
    understood = ", ".join(" + ".join(needed) for needed in FORMATS.values())
    return InputError(
        f"The columns of {place} are not understood: {named(columns, 12)}.",
        why=f"Understood are: {understood} (alpaca may also have input).",
        hint="Rename the columns.",
    )


def parse_sample(layout: Format, columns: Mapping[str, Any]) -> Sample:
    """A row of a known format.

    Raises:
        RowError: columns are missing, empty or of the wrong type, or the turns are out of order.
    """
    missing = [name for name in FORMATS[layout] if name not in columns]
    if missing:
        raise RowError(f"no {' and no '.join(missing)}; it has {named(columns, 4)}")
    return _PARSERS[layout](columns)


def _parse_messages(columns: Mapping[str, Any]) -> Conversation:
    return Conversation(_turns(columns["messages"], "messages"))


def _parse_conversations(columns: Mapping[str, Any]) -> Conversation:
    return Conversation(_turns(columns["conversations"], "conversations"))


def _parse_completion(columns: Mapping[str, Any]) -> Conversation | Completion:
    prompt, completion = columns["prompt"], columns["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        turns = _turns(prompt + completion, "prompt and completion")
        left_out = len(prompt) + len(completion) - len(turns)  # an empty system turn, which comes first
        return Conversation(turns, learned_from=len(prompt) - left_out)
    return Completion(_text(prompt, "prompt"), _text(completion, "completion"))


def _parse_alpaca(columns: Mapping[str, Any]) -> Alpaca:
    given = columns.get("input")
    return Alpaca(
        _text(columns["instruction"], "instruction"),
        "" if given is None else _text(given, "input", may_be_empty=True),
        _text(columns["output"], "output"),
    )


def _parse_text(columns: Mapping[str, Any]) -> PlainText:
    return PlainText(_text(columns["text"], "text"))


_PARSERS: Mapping[Format, Callable[[Mapping[str, Any]], Sample]] = {
    "messages": _parse_messages,
    "conversations": _parse_conversations,
    "prompt/completion": _parse_completion,
    "alpaca": _parse_alpaca,
    "text": _parse_text,
}


def _text(value: object, name: str, *, may_be_empty: bool = False) -> str:
    """A string that can be encoded, with more than blanks in it."""
    if not isinstance(value, str):
        raise RowError(f"{name} is {_kind(value)}, not text")
    if not may_be_empty and not value.strip():
        raise RowError(f"{name} is empty")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RowError(f"{name} has half of a surrogate pair, {value[error.start]!r}") from error
    return value


def _kind(value: object) -> str:
    """What something is, in words of JSON."""
    return _KINDS.get(type(value), f"a {type(value).__name__}")


_KINDS: Mapping[type, str] = {
    type(None): "null",
    bool: "a boolean",
    str: "text",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
}


def _turns(value: object, name: str) -> tuple[Message, ...]:
    """A list of turns in an order that a chat template can render; an empty system turn is left out."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RowError(f"{name} is text that is not JSON") from error
    if not isinstance(value, list):
        raise RowError(f"{name} is {_kind(value)}, not a list of turns")
    turns = [_turn(turn, number) for number, turn in enumerate(value, start=1)]
    _check_order([turn.role for turn in turns])
    return tuple(turn for turn in turns if turn.content)


def _turn(turn: object, number: int) -> Message:
    if not isinstance(turn, dict):
        raise RowError(f"turn {number} is {_kind(turn)}, not an object with role and content")
    spoken = turn.get("role") or turn.get("from")
    if not isinstance(spoken, str):
        raise RowError(f"turn {number} has no role")
    role = _ROLES.get(spoken.strip().lower())
    if role is None:
        raise RowError(f"turn {number} has the role {shown(spoken, 24)}, and not system, user or assistant")
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    if isinstance(content, list):
        content = _joined_parts(content, number)
    if role == "system" and isinstance(content, str) and not content.strip():
        return Message(role, "")
    if isinstance(content, str) and not content.strip():
        raise RowError(f"turn {number}: the {role}'s content is empty")
    return Message(role, _text(content, f"turn {number}: the {role}'s content"))


def _joined_parts(parts: list[Any], number: int) -> str:
    """`[{"type": "text", "text": …}, …]` as one string."""
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise RowError(f"turn {number} has content other than text")
    return "".join(text for text in texts if text is not None)


def _check_order(roles: list[Role]) -> None:
    """An optional system turn, then user and assistant by turns, the assistant last."""
    if not roles:
        raise RowError("there are no turns")
    first = 1 if roles[0] == "system" else 0
    for number, role in enumerate(roles[first:], start=first):
        expected = get_args(Role)[1 + (number - first) % 2]
        if role != expected:
            raise RowError(f"roles out of order: turn {number + 1} is the {role}'s, expected the {expected}'s")
    if roles[-1] != "assistant":
        raise RowError(f"the last turn is the {roles[-1]}'s: there is no answer to learn")
