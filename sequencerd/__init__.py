"""Moves enrollments through sequences of steps at the right time, on PostgreSQL."""

__version__ = "1.0.0"
