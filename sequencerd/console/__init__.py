"""The console in the browser: where enrollments are, and why.

An application of its own on the HTTP listener, in that one's thread and loop, with connections of
its own: no page takes a turn of the engine's loop.
"""
