"""The language of the screens: English sentences are rendered in another language where they are shown, and only there.

Sentences are built in English all over the core, and JSON, files and exceptions keep them so. A screen hands each text
that it shows to `localise`, which finds the template it was made from in `profiles/messages/LANGUAGE.toml` and fills
that template's rendering with the same values, themselves rendered. A text with several sentences is taken apart.

The usual way is gettext: every f-string becomes a call with a template and named values, and its result is already in
one language. Here that would touch some eight hundred places of the core, hand JSON whatever language the screen has,
and cost the English answer a look-up for each text. What gettext's extraction would guarantee, a test does: every text
of the source that a person can see is in the catalogue, and every entry of the catalogue is in the source.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

from advisor.errors import InputError

if TYPE_CHECKING:
    from advisor.report.catalogue import Catalogue

VARIABLE = "PHI3_ADVISE_LANG"
"""Names the language where --lang does not; child processes read it."""

ENGLISH = "en"

_LOCALE_VARIABLES = ("LC_ALL", "LC_MESSAGES", "LANG")
_language: str | None = None
_listeners: list[Callable[[str], None]] = []


@cache
def languages() -> tuple[str, ...]:
    """The languages there are: English, and each that has a catalogue."""
    names = (name.removesuffix(".toml") for name in os.listdir(_folder()) if name.endswith(".toml"))
    return (ENGLISH, *sorted(names))


def check_language(name: str, *, where: str = "--lang") -> str:
    """A language's name as it was given: `ja`, `ja_JP.UTF-8`.

    Raises:
        InputError: there is no such language.
    """
    known = _known(name)
    if known is None:
        raise InputError(
            f"{where} names no language that there is: {name[:40]!r}.",
            hint=f"There are: {', '.join(languages())}.",
        )
    return known


def language_of(environment: Mapping[str, str]) -> str:
    """What an environment asks for; English where a locale names a language that is not there.

    Raises:
        InputError: PHI3_ADVISE_LANG names no language that there is.
    """
    own = environment.get(VARIABLE)
    if own:
        return check_language(own, where=VARIABLE)
    for variable in _LOCALE_VARIABLES:
        if environment.get(variable):
            return _known(environment[variable]) or ENGLISH
    return ENGLISH


@contextmanager
def speaking(name: str) -> Iterator[None]:
    """The screens' language while it lasts, in this process and in those that it starts."""
    global _language
    before, inherited = _language, os.environ.get(VARIABLE)
    _language = os.environ[VARIABLE] = name
    try:
        yield
    finally:
        _language = before
        if inherited is None:
            os.environ.pop(VARIABLE, None)
        else:
            os.environ[VARIABLE] = inherited


def speak_what(encoding: str | None) -> None:
    """Falls back to English where an encoding has no characters for the language: question marks help nobody."""
    global _language
    if _spoken() != ENGLISH:
        try:
            _catalogue(_spoken()).sample.encode(encoding or "utf-8")
        except (UnicodeEncodeError, LookupError):
            _language = ENGLISH


@contextmanager
def listening() -> Iterator[list[str]]:
    """Every English text that is shown while it lasts, as it comes."""
    heard: list[str] = []
    _listeners.append(heard.append)
    try:
        yield heard
    finally:
        _listeners.remove(heard.append)


def localise(text: str) -> str:
    """A sentence, or several, in the language of the screens. A single word may be a name, and stays."""
    return _localise(text, words=False)


def localise_label(text: str) -> str:
    """A heading, or a cell of a table whose words are all this program's own."""
    return _localise(text, words=True)


def listed(items: Iterable[str]) -> str:
    """Items that are in the language of the screens already, side by side as it writes a list."""
    return (", " if is_english() else _catalogue(_spoken()).joint("item")).join(items)


def spoken() -> str:
    """The language of the screens by its name, which is HTML's too."""
    return _spoken()


def is_english() -> bool:
    """Whether the screens are in the language in which everything is written."""
    return _spoken() == ENGLISH


def _localise(text: str, *, words: bool) -> str:
    for listener in _listeners:
        listener(text)
    return text if _spoken() == ENGLISH else _catalogue(_spoken()).render(text, words=words)


def _spoken() -> str:
    global _language
    if _language is None:  # in a process that a command started
        _language = language_of(os.environ)
    return _language


def _known(name: str) -> str | None:
    wanted = name.strip().lower()
    for mark in "._@-":
        wanted = wanted.partition(mark)[0]
    return wanted if wanted == ENGLISH or wanted in languages() else None


def _folder() -> str:
    from advisor.profiles import profile_folder

    return profile_folder("messages")


@cache
def _catalogue(name: str) -> Catalogue:
    from advisor.report.catalogue import Catalogue

    return Catalogue.load(os.path.join(_folder(), f"{name}.toml"))
