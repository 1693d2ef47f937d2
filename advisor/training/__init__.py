"""The training itself: the only code that builds a model."""
