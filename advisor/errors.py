"""Everything that phi3-advise raises on purpose.

    AdvisorError                the base: what happened, why, what to do; an exit code
    ├── InputError        (2)   a name, number, file or option that cannot be used
    │   ├── PlanError           a field of a plan; carries the field's name
    │   ├── UnknownNameError    no such model, GPU or recipe; offers the nearest
    │   └── UnsupportedError    understood, but outside what this tier can compute
    ├── EnvironmentLacksError (3)  no GPU for a probe, a missing package, no network
    └── RunFailedError    (4)   the run itself failed

Exit code 1 ("nothing fits") is an answer, not an error, and so has no class.
"""

from __future__ import annotations


def shown(value: object, width: int = 60) -> str:
    """A value as a message can hold it, whatever it is."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deep; more digits than Python writes out
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= width else text[: width - 3] + "..."


def first_line(error: BaseException, width: int = 300) -> str:
    """What a library's error says first, cut between words if it is long; its kind where it says nothing."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text if len(text) <= width else f"{text[:width].rpartition(' ')[0] or text[:width]} …"


class AdvisorError(Exception):
    """An error that a person can act on.

    Args:
        what: what happened, one sentence.
        why: the reason, one or two sentences; empty if `what` says it all.
        hint: what to do next.
    """

    exit_code = 4

    def __init__(self, what: str, *, why: str = "", hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.why = why
        self.hint = hint


class InputError(AdvisorError):
    """Something that was given cannot be used."""

    exit_code = 2


class PlanError(InputError):
    """A field of a plan is wrong; `field` names it as the plan file spells it."""

    def __init__(self, field: str, what: str, *, why: str = "", hint: str = "") -> None:
        super().__init__(f"{field}: {what}", why=why, hint=hint)
        self.field = field


class UnknownNameError(InputError):
    """No profile of that name."""

    def __init__(
        self, kind: str, name: str, known: tuple[str, ...], *, aliases: tuple[str, ...] = (), hint: str = ""
    ) -> None:
        from difflib import get_close_matches

        shown = name if len(name) <= 60 else name[:57] + "..."
        near = get_close_matches(name[:60].lower(), (*known, *aliases), n=3, cutoff=0.5)
        plural = "names are" if len(near) > 1 else "name is"
        why = f"The nearest {plural} {', '.join(near)}." if near else f"Known: {', '.join(known)}."
        super().__init__(f"There is no {kind} called {shown!r}.", why=why, hint=hint)
        self.nearest = tuple(near)


class UnsupportedError(InputError):
    """Understood, but this tier cannot compute it."""


class EnvironmentLacksError(AdvisorError):
    """The environment lacks something: a GPU, a package, the network."""

    exit_code = 3


class RunFailedError(AdvisorError):
    """The run was started and failed."""

    exit_code = 4
