"""The decisions, without I/O and without a clock: definitions and enrollments as data, advance(),
step types, retries.

Everything may import it; it imports nothing else from sequencerd.
"""
