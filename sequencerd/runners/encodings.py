"""Decompress responses (RFC 9110, 8.4.1), within limits."""

from __future__ import annotations

import zlib

MAX_MEMBERS = 1000
"""Streams that may follow one another in a body: each takes time, whatever it contains."""

_IDENTITY = frozenset({"", "identity", "none", "binary", "utf-8", "aws-chunked"})
"""Names of no encoding; servers send the last four by mistake."""


class EncodingError(Exception):
    """A response that cannot be decompressed, with the reason."""


def decode(body: bytes, encodings: str, limit: int) -> bytes:
    """Return the body without the encodings that Content-Encoding lists.

    Raises EncodingError before it produces much more than `limit` bytes.
    """
    names = [name.strip().lower() for name in encodings.split(",")]
    for name in reversed([name for name in names if name not in _IDENTITY]):
        if name in ("gzip", "x-gzip"):
            body = _inflate(body, 16 + zlib.MAX_WBITS, limit)
        elif name == "deflate":
            # by definition with a zlib header, which some servers omit
            try:
                body = _inflate(body, zlib.MAX_WBITS, limit)
            except zlib.error:
                body = _inflate(body, -zlib.MAX_WBITS, limit)
        else:
            raise EncodingError(f"the answer is encoded as {name[:20]!r}: send it plain or as gzip")
    return body


def _inflate(body: bytes, window: int, limit: int) -> bytes:
    """Return all members of a stream. Raises EncodingError, or zlib.error for another header."""
    found = bytearray()
    rest = body
    for _ in range(MAX_MEMBERS + 1):
        if not rest:
            break
        stream = zlib.decompressobj(window)
        try:
            found += stream.decompress(rest, limit + 1 - len(found))
        except zlib.error:
            if rest is body:
                raise
            break  # anything after the last member is padding
        if len(found) > limit:
            raise EncodingError(f"the answer has more than {limit} bytes when it is unpacked")
        if not stream.eof:
            raise EncodingError("the compressed answer is truncated")
        rest = stream.unused_data if window > zlib.MAX_WBITS else b""
    else:
        raise EncodingError(f"the compressed answer has more than {MAX_MEMBERS} parts")
    return bytes(found)
