"""Which addresses of the network may be reached: public ones, unless somebody said that a private one is meant."""

from __future__ import annotations

import ipaddress
import socket

from tasks.runtime.stage import StageError


class PrivateAddressError(StageError):
    """A host lies at an address that is not of the public internet, and nobody allowed that."""


def lookup(host: str, port: int) -> list[str]:
    """The addresses of `host`, in the order of the resolver. Raises `OSError` where there is none."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
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
    """Whether an IP address is one of the public internet; an IPv4 address inside an IPv6 one is taken out first."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address):
        teredo = parsed.teredo
        inner = parsed.ipv4_mapped or parsed.sixtofour or (teredo[1] if teredo else None)
        if inner is None and parsed in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)
        parsed = inner or parsed
    return parsed.is_global and not parsed.is_multicast
