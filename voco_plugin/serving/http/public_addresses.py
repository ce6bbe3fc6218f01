"""Which addresses are out on the internet: everything else is this machine's or somebody's own network."""

from __future__ import annotations

import ipaddress

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_WITHIN = tuple(
    ipaddress.ip_network(network)
    for network in (
        "192.88.99.0/24",  # 6to4 relays
        "64:ff9b::/96", "64:ff9b:1::/48",  # NAT64
        "2002::/16", "2001::/32",  # 6to4, Teredo: an IPv4 address inside
        "::/96",  # IPv4-compatible
        "100::/64", "5f00::/16", "3fff::/20", "fec0::/10",
    )
)  # fmt: skip
"""Ways to write an inner address that ``is_global`` takes for a public one in one Python or another."""


def is_public(text: str) -> bool:
    """Whether ``text`` is an address that a server may fetch from for a stranger."""
    try:
        address: _Address = ipaddress.ip_address(text)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id is not None:
            return False
        if address.ipv4_mapped is not None:
            address = address.ipv4_mapped
    refused = (
        not address.is_global or address.is_private or address.is_loopback or address.is_link_local
        or address.is_multicast or address.is_reserved or address.is_unspecified
    )  # fmt: skip
    return not refused and not any(address.version == n.version and address in n for n in _WITHIN)


__all__ = ["is_public"]
