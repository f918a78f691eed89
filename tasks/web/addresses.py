"""Screening of network addresses: private ones are refused unless `download.allow_private_addresses` is true."""

from __future__ import annotations

import ipaddress
import socket

from tasks.runtime.errors import StageError

IPV4_SUFFIXED = [
    ipaddress.IPv6Network(network)
    for network in (
        "::/96",  # IPv4-compatible; includes the loopback address
        "::ffff:0:0/96",  # IPv4-mapped
        "::ffff:0:0:0/96",  # IPv4-translated
        "64:ff9b::/96",  # NAT64
    )
]
GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
"""The assigned part of the public IPv6 address space."""
NOT_PUBLIC = [
    ipaddress.ip_network(network)
    for network in (
        "192.0.0.0/24",  # protocol assignments
        "192.88.99.0/24",  # relays of 6to4
        "2001::/23",  # protocol assignments
        "3fff::/20",  # documentation
    )
]
"""Networks that some supported Python versions report as global, in whole or in part."""


class PrivateAddressError(StageError):
    """A host has an address outside the public internet, and private addresses are not allowed."""


def lookup(host: str, port: int) -> list[str]:
    """Resolve `host` to its addresses, in the order of the resolver. Raises `OSError` if there are none."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError:  # an empty label, or one of more than 63 characters
        raise OSError("it is not a valid host name") from None
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def require_public(host: str, addresses: list[str]) -> None:
    """Raise `PrivateAddressError` if any address of `host` is private, loopback, link-local or reserved."""
    for address in addresses:
        if not is_public(address):
            raise PrivateAddressError(
                f"{host} has the private address {address}; "
                "set download.allow_private_addresses to true if this is intended"
            )


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet, with the same answer on every Python version.

    For an IPv6 address that embeds IPv4 addresses (mapped, translated, compatible, 6to4, Teredo, NAT64), these decide.
    The NAT64 prefixes of local networks, 64:ff9b:1::/48, are never public.
    """
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address):
        embedded = _embedded(parsed)
        if embedded:
            return all(is_public(str(inner)) for inner in embedded)
        if parsed not in GLOBAL_UNICAST:
            return False
    listed = any(parsed in network for network in NOT_PUBLIC if network.version == parsed.version)
    return parsed.is_global and not parsed.is_multicast and not listed


def _embedded(address: ipaddress.IPv6Address) -> list[ipaddress.IPv4Address]:
    """IPv4 addresses embedded in an IPv6 address (RFC 4291, 7915, 3056, 4380, 6052), with the server of Teredo."""
    if any(address in network for network in IPV4_SUFFIXED):
        return [ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)]
    if address.sixtofour is not None:
        return [address.sixtofour]
    return list(address.teredo or ())
