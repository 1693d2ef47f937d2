"""The explorer's screen. Needs textual; only the submodules import it."""
