"""How much memory a plan needs."""
