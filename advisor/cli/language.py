"""`--lang`, which every command takes, and what it or the environment asks for."""

from __future__ import annotations

import os

import click

from advisor.cli.completion import complete_languages
from advisor.errors import InputError
from advisor.report.language import ENGLISH, check_language, language_of


def _check_language(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
    """What it asks for, `main` has seen to before: errors of the other options are told in it too."""
    if value is not None and not ctx.resilient_parsing:
        check_language(value)


lang_option = click.option(
    "--lang",
    metavar="en|ja",
    expose_value=False,
    is_eager=True,
    callback=_check_language,
    shell_complete=complete_languages,
    help="Language of the screens; JSON stays English.  [default: the environment's]",
)


def language_asked(words: list[str]) -> tuple[str, InputError | None]:
    """The screens' language, before the options are parsed: what is wrong with them is told in it too."""
    options = words[: words.index("--")] if "--" in words else words
    for at, word in enumerate(options):
        name, _, value = word.partition("=")
        if name == "--lang":
            try:
                return check_language(value or "".join(options[at + 1 : at + 2])), None
            except InputError:
                break  # the option's callback says so
    try:
        return language_of(os.environ), None
    except InputError as error:
        return ENGLISH, error
