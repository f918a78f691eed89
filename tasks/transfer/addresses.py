"""Which addresses of the network may be reached: public ones, unless somebody said that a private one is meant."""

from __future__ import annotations

import ipaddress
import socket

from tasks.runtime.stage import StageError

IPV4_AT_THE_END = [
    ipaddress.IPv6Network(network)
    for network in (
        "::/96",  # IPv4-compatible; holds the loopback address, too
        "::ffff:0:0/96",  # IPv4-mapped
        "::ffff:0:0:0/96",  # IPv4-translated
        "64:ff9b::/96",  # NAT64
    )
]
GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
"""All that is assigned of the public IPv6 internet."""
NOT_PUBLIC = [
    ipaddress.ip_network(network)
    for network in (
        "192.0.0.0/24",  # protocol assignments
        "192.88.99.0/24",  # relays of 6to4
        "2001::/23",  # protocol assignments
        "3fff::/20",  # documentation
    )
]
"""Networks that some of the supported Python versions take for global, wholly or in part."""


class PrivateAddressError(StageError):
    """A host lies at an address that is not of the public internet, and nobody allowed that."""


def lookup(host: str, port: int) -> list[str]:
    """The addresses of `host`, in the order of the resolver. Raises `OSError` where there is none."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError:  # an empty label, or one of more than 63 characters
        raise OSError("it is not a valid host name") from None
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def require_public(host: str, addresses: list[str]) -> None:
    """Raise `PrivateAddressError` where any of the addresses of `host` is private, loopback, link-local or reserved."""
    for address in addresses:
        if not is_public(address):
            raise PrivateAddressError(
                f"{host} is at the private address {address}; "
                "set download.allow_private_addresses to true if that is meant"
            )


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet; the verdict is the same on every Python version.

    An IPv6 address that leads to IPv4 addresses (mapped, translated, compatible, 6to4, Teredo, NAT64) is judged by
    these. The NAT64 prefixes of local networks, 64:ff9b:1::/48, are never public.
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
    """The IPv4 addresses that an IPv6 address leads to (RFC 4291, 7915, 3056, 4380, 6052): Teredo's server, too."""
    if any(address in network for network in IPV4_AT_THE_END):
        return [ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)]
    if address.sixtofour is not None:
        return [address.sixtofour]
    return list(address.teredo or ())
