"""A measurement campaign: the grid, its order, the measuring processes, the file, and what is held against it."""
