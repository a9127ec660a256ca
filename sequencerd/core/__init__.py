"""The decisions, without I/O and without a clock: the model, advance(), step types, retries.

Everything may import it; it imports nothing else from sequencerd.
"""
