"""Trainers that are compared."""
