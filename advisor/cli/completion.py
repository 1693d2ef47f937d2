"""What a shell offers behind an option: names, from the profiles' files alone."""

from __future__ import annotations

from typing import Literal

import click


def complete_models(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Names of models; a config.json's path or a hub id is the reader's own."""
    return _names("models", incomplete)


def complete_gpus(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Names of GPUs."""
    return _names("gpus", incomplete)


def complete_recipes(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Names of recipes."""
    return _names("recipes", incomplete)


def complete_languages(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """English, and those that have a catalogue."""
    from advisor.report.language import languages

    return [name for name in languages() if name.startswith(incomplete)]


def _names(kind: Literal["models", "gpus", "recipes"], incomplete: str) -> list[str]:
    """A profile's file has its name, so none is opened: a shell asks at every press of its key."""
    import os

    from advisor.profiles import profile_folder

    files = sorted(os.listdir(profile_folder(kind)))
    return [file.removesuffix(".toml") for file in files if file.endswith(".toml") and file.startswith(incomplete)]
