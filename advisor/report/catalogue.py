"""A catalogue of English templates and their renderings in one language, and how a text is rendered by it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from advisor.files import read_toml

_NO_BREAK = "\N{NO-BREAK SPACE}"
_JOINT = f"{_NO_BREAK}· "
_PLACE = re.compile(r"\{(n|\*?\d?)\}")
_NUMBER = r"[−+]?[\d.,]+(?: ?[kMBT]| (?:[KMGT]i?)?B)?"
_PHRASE = r"(?:(?!\. [A-Z]|; ).)+?"
_KANA_OR_KANJI = re.compile(r"[ぁ-ゖァ-ヺー々一-鿿]")
_LATIN = re.compile(r"[A-Za-z0-9%'\"`)\]]")
_MARKS = "（）「」『』、。：！？"
_FIELD = re.compile(r"([\w.]+(?:, [\w.]+)*(?:\[\w+\])?(?: = [^ ]+)?): (.+)")
_LISTED = re.compile(r"(\d+\. )(\S.*)")
_SENTENCE_END = re.compile(r"(?<=[.!?]) +")
_BOUNDARY = re.compile(r"[.!?] +[A-Z\"'(]")
_SENTENCE_ENDS = ("。", "！", "？")
_FULL_WIDTH_END = (*_SENTENCE_ENDS, "：", "、", "）")


class Template:
    """An English text with places for values, and its rendering.

    A place `{}` takes anything, `{n}` a number with or without a unit. The rendering has the values in their order,
    `{}`, or by number, `{1}`; a star, `{*1}`, renders a value even where it is a single word.
    """

    __slots__ = ("_pattern", "_pieces", "_places", "_rendering", "spans", "weight")

    def __init__(self, english: str, rendering: str) -> None:
        self._pieces = _PLACE.split(english)[::2]
        self._places = _PLACE.findall(english)
        self._rendering = rendering
        self._pattern: re.Pattern[str] | None = None
        self.weight = sum(map(len, self._pieces))
        self.spans = _BOUNDARY.search(english) is not None
        """Whether it is of several sentences; no other template is one of a text that has several."""

    @property
    def opening(self) -> str:
        """The first word; empty where a value or a part of a word comes first."""
        word, blank, _ = self._pieces[0].partition(" ")
        return word if blank else ""

    def match(self, text: str) -> tuple[str, ...] | None:
        """The values of a text that was made from this template; None for any other text."""
        if not (text.startswith(self._pieces[0]) and text.endswith(self._pieces[-1])):
            return None
        if self._pattern is None:
            groups = [f"({_NUMBER})" if place == "n" else f"({_PHRASE})" for place in self._places]
            if not self._pieces[-1] and self._places[-1] != "n":
                groups[-1] = "(.+)"
            literals = [re.escape(piece) for piece in self._pieces]
            self._pattern = re.compile("".join(a + b for a, b in zip(literals, [*groups, ""], strict=True)))
        found = self._pattern.fullmatch(text)
        return found.groups() if found else None

    def fill(self, values: Sequence[str], render: Callable[..., str]) -> str:
        """The rendering with these values, each rendered itself."""
        order = iter(range(len(values)))
        pieces = _PLACE.split(self._rendering)
        said = pieces[0]
        for place, literal in zip(pieces[1::2], pieces[2::2], strict=True):
            named = place.removeprefix("*")
            value = values[int(named) if named else next(order)]
            said = _joined(_joined(said, render(value, words=place.startswith("*"))), literal)
        return said


class Catalogue:
    """One language's renderings.

    Args:
        entries: English templates and their renderings, without the full stop at the end of a sentence.
        joints: `sentence` ends one, `clause` stands between two, `item` between parts of a list.
        words: single words, rendered where they can only be this program's own.
    """

    def __init__(self, entries: Mapping[str, str], joints: Mapping[str, str], words: Mapping[str, str]) -> None:
        self._joints = joints
        self._words = words
        self._exact = {_folded(english): rendering for english, rendering in entries.items()}
        templates = [Template(_folded(english), entries[english]) for english in entries if _PLACE.search(english)]
        self._by_opening: dict[str, list[Template]] = {}
        for template in sorted(templates, key=lambda template: -template.weight):
            self._by_opening.setdefault(template.opening, []).append(template)
        self._memo: dict[tuple[str, bool], str] = {}

    @classmethod
    def load(cls, path: str) -> Catalogue:
        """The catalogue in a file: its tables `joints` and `words`, and all others as entries."""
        tables = read_toml(path)
        joints, words = tables.pop("joints"), tables.pop("words")
        return cls({english: text for table in tables.values() for english, text in table.items()}, joints, words)

    @property
    def sample(self) -> str:
        """Characters that whoever shows this language has to have."""
        return self._joints["sample"]

    def joint(self, name: str) -> str:
        """What this language puts between parts."""
        return self._joints[name]

    def render(self, text: str, *, words: bool = False) -> str:
        """A text in this language, as far as the catalogue has it; the blanks around it stay."""
        known = self._memo.get((text, words))
        if known is None:
            known = self._memo[text, words] = "\n".join(self._line(line, words) for line in text.split("\n"))
        return known

    def _line(self, text: str, words: bool) -> str:
        core = text.strip(" ")
        if not core:
            return text
        before, after = text[: text.index(core[0])], text[len(text.rstrip(" ")) :]
        if _JOINT in core:
            # What a short fact's blanks were kept for, this language's line breaking does by itself.
            parts = (part.replace(_NO_BREAK, " ") for part in core.split(_JOINT))
            return before + _JOINT.join(self._line(part, words) for part in parts) + after
        core = core.replace(_NO_BREAK, " ")
        listed = _LISTED.fullmatch(core)
        if listed:  # the number of a list's entry is no part of what the entry says
            return before + listed[1] + self._line(listed[2], words) + after
        rendered = self._sentences(core, words) or core
        return before + rendered + ("" if rendered.endswith(_FULL_WIDTH_END) else after)

    def _sentences(self, text: str, words: bool) -> str | None:
        whole = self._whole(text, words)
        if whole is not None:
            return whole
        for pattern, joint in ((_SENTENCE_END, ""), (re.compile("; "), self._joints["clause"])):
            parts = pattern.split(text)
            if len(parts) > 1:
                rendered = self._runs(parts, pattern is _SENTENCE_END, joint, words)
                if rendered is not None:
                    return rendered
        field = _FIELD.fullmatch(text)
        if field:
            said = self._sentences(field[2], words)
            return said and f"{field[1]}: {said}"
        return self._items(text, words)

    def _runs(self, parts: list[str], sentences: bool, joint: str, words: bool) -> str | None:
        """Parts rendered in runs, each as long as the catalogue has one; None where it has none of them."""
        said: list[str] = []
        found, at = False, 0
        while at < len(parts):
            for end in range(len(parts), at, -1):
                run = (" " if sentences else "; ").join(parts[at:end])
                rendered = self._whole(run, words) if end - at > 1 else self._single(run, sentences, words)
                if rendered is not None:
                    found = True
                    break
            else:
                rendered, end = run + (" " if sentences and at + 1 < len(parts) else ""), at + 1
            said.append(rendered)
            at = end
        return joint.join(said) if found else None

    def _single(self, text: str, sentence: bool, words: bool) -> str | None:
        """One part of a run: a sentence may have clauses of its own."""
        if not sentence or "; " not in text:
            return self._whole(text, words) or self._items(text, words)
        return self._sentences(text, words)

    def _items(self, text: str, words: bool) -> str | None:
        """A list whose items the catalogue has, or some of them."""
        for english, joint in ((", ", "item"), (" or ", "either"), (" and ", "both")):
            parts = text.split(english)
            if 1 < len(parts) < 40:
                rendered = [self._whole(part, words) for part in parts]
                if any(part is not None for part in rendered):
                    shown = [new if new is not None else old for new, old in zip(rendered, parts, strict=True)]
                    return self._listed(joint, shown)
        return None

    def _listed(self, joint: str, items: Sequence[str]) -> str:
        said = items[0]
        for item in items[1:]:
            said = _joined(_joined(said, self._joints[joint]), item)
        return said

    def _whole(self, text: str, words: bool) -> str | None:
        """A text that is made from one template, with its full stop if it has one."""
        ended = text.endswith(".") and not text.endswith("..")
        found = self._bare(text[:-1], words) if ended else None
        if found is not None:
            return found + ("" if found.endswith(_SENTENCE_ENDS) else self._joints["sentence"])
        found = self._bare(text, words)
        if found is None and words and text.endswith(":"):
            found = self._bare(text[:-1], words)
            if found is None and " " not in text:
                found = text[:-1]  # a name, as a label
            return found and found + self._joints["colon"]
        return found

    def _bare(self, text: str, words: bool) -> str | None:
        folded = _folded(text)
        if folded in self._exact:
            return self._exact[folded]
        if " " not in text and not text.startswith("("):
            return self._words.get(text) if words else None
        several = _BOUNDARY.search(text) is not None
        for opening in dict.fromkeys((folded.partition(" ")[0], "")):
            for template in self._by_opening.get(opening, ()):
                values = template.match(folded) if template.spans or not several else None
                if values is not None:
                    # The first letter of a value that opens the text was folded with it.
                    values = tuple(
                        text[: len(v)] if not at and folded.startswith(v) else v for at, v in enumerate(values)
                    )
                    return template.fill(values, self._value)
        return None

    def _value(self, text: str, *, words: bool) -> str:
        text = text.strip(" ,;")
        parts = text.split(" or ")
        rendered = [self._whole(part, words) or ("" if " " in part else part) for part in parts]
        if len(parts) > 1 and all(rendered):
            return self._listed("either", rendered)
        return self._sentences(text, words) or text


def _joined(left: str, right: str) -> str:
    """Two pieces with a blank between Latin and Japanese, and none between Japanese and Japanese."""
    if not left.strip(" ") or not right.strip(" "):
        return left + right
    last, first = left.rstrip(" ")[-1], right.lstrip(" ")[0]
    if (_KANA_OR_KANJI.match(last) or last in _MARKS) and (_KANA_OR_KANJI.match(first) or first in _MARKS):
        return left.rstrip(" ") + right.lstrip(" ")
    latin_first = _LATIN.match(last) and _KANA_OR_KANJI.match(first)
    latin_last = _KANA_OR_KANJI.match(last) and _LATIN.match(first)
    return f"{left.rstrip(' ')} {right.lstrip(' ')}" if latin_first or latin_last else left + right


def _folded(text: str) -> str:
    """Sentences may begin with what stands in the middle of others: the first letter's case does not count."""
    return text[:1].lower() + text[1:]
