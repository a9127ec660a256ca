"""Check the URLs of the settings. Errors never contain a URL, which may have a password."""

from __future__ import annotations

import re
from ipaddress import ip_address
from urllib.parse import SplitResult, urlsplit

_URL = re.compile(
    r"(?!.*[\x00-\x1f\x7f])[a-z]+://(?:[^/?#@]*@)?(?:\[[^\]/?#@]+\]|(?P<name>[\w.-]+))(?::[0-9]*)?(?:[/?#].*)?",
    re.IGNORECASE | re.DOTALL,
)
_IPV4_LIKE = re.compile(r"[0-9]+(?:\.[0-9]+){3}")


def check_url(url: str) -> str:
    """Return a URL if it can be called. Raises ValueError."""
    if not url.lower().startswith(("https://", "http://")):
        raise ValueError("the URL must begin with https://host or http://host")
    split_url(url)
    return url


def check_base_url(url: str) -> str:
    """Return a URL to which paths can be added. Raises ValueError."""
    if re.search(r"[?#\s]", check_url(url)):
        raise ValueError("the URL must have no query, no fragment and no blanks")
    return url


def check_origin(url: str) -> str:
    """Return the URL of a server, without a path. Raises ValueError."""
    if urlsplit(check_base_url(url)).path not in ("", "/"):
        raise ValueError("the URL must have no path")
    return url


def split_url(url: str) -> SplitResult:
    """Return the parts of a URL with a host that can be looked up. Raises ValueError."""
    found = _URL.fullmatch(url)
    if found is None:
        raise ValueError("the URL cannot be read: write https://host/path")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        port = 0
    if port == 0:
        raise ValueError("the port of the URL is not between 1 and 65535")
    try:
        if found["name"] is None or _IPV4_LIKE.fullmatch(host):
            ip_address(host)
        else:
            host.encode("idna")  # as the resolver does: no label may be empty or too long
    except ValueError:
        raise ValueError("the host of the URL is neither a name nor an address") from None
    return parts
