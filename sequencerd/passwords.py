"""Store and check passwords: as scrypt's hash, with its parameters."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from base64 import b64decode, b64encode

COST, BLOCKS, LANES = 2**15, 8, 1  # 32 MiB and a tenth of a second
_MEMORY = 2 * 128 * BLOCKS * COST
_FORM = re.compile(
    rf"scrypt\$({COST})\$({BLOCKS})\$({LANES})\$([A-Za-z0-9+/]{{22}}==)\$([A-Za-z0-9+/]{{43}}=)"
)


def make_hash(password: str) -> str:
    """Return the hash of a password, for the settings."""
    salt = secrets.token_bytes(16)
    digest = _scrypt(password, salt)
    kept = (b64encode(part).decode() for part in (salt, digest))
    return "$".join(("scrypt", str(COST), str(BLOCKS), str(LANES), *kept))


def is_hash(text: str) -> bool:
    """Return whether a text is a hash made by `make_hash`."""
    return _FORM.fullmatch(text) is not None


def matches(password: str, kept: str) -> bool:
    """Return whether a password has this hash. This takes as long as making one."""
    *_, salt, digest = kept.split("$")
    return hmac.compare_digest(_scrypt(password, b64decode(salt)), b64decode(digest))


def _scrypt(password: str, salt: bytes) -> bytes:
    return hashlib.scrypt(
        password.encode("utf-8", "surrogatepass"),
        salt=salt,
        n=COST,
        r=BLOCKS,
        p=LANES,
        maxmem=_MEMORY,
        dklen=32,
    )
