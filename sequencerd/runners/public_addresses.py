"""Tell addresses on the public Internet from those of private networks."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address


def names_itself(host: str) -> bool:
    """Return whether a host is localhost or an address, which no resolver can change."""
    try:
        ip_address(host)
    except ValueError:
        return host == "localhost"
    return True


_GLOBAL_UNICAST = IPv6Network("2000::/3")
_NAT64 = IPv6Network("64:ff9b::/96")
_COMPATIBLE = IPv6Network("::/96")


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Return whether an address, and each address that it contains, is on the public Internet."""
    if carried := _carried(address):
        return all(is_public(one) for one in carried)
    if isinstance(address, IPv6Address) and address not in _GLOBAL_UNICAST:
        return False  # site-local, a network's own NAT64 (64:ff9b:1::/48), multicast, ...
    return address.is_global and not address.is_multicast


def _carried(address: IPv4Address | IPv6Address) -> tuple[IPv4Address, ...]:
    """Return the IPv4 addresses that an IPv6 address contains."""
    if isinstance(address, IPv4Address):
        return ()
    if address.teredo is not None:
        return address.teredo
    if address in _NAT64 or address in _COMPATIBLE:
        return (IPv4Address(int(address) & 0xFFFF_FFFF),)
    inner = address.ipv4_mapped or address.sixtofour
    return () if inner is None else (inner,)
