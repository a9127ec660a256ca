"""Moves enrollments through sequences of steps at the right time, on PostgreSQL."""

__version__ = "0.1.0"
