"""Classification of addresses as public or private, also of IPv4 addresses embedded in IPv6 addresses."""

import socket

import pytest

from tasks.web import addresses


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "0.0.0.0", "10.0.0.1", "100.64.0.1", "169.254.169.254", "192.0.0.9", "224.0.0.1", "240.0.0.1"),
        *("::1", "::", "::127.0.0.1", "::ffff:10.0.0.1", "::ffff:0:7f00:1", "::ffff:0:10.0.0.1"),
        *("64:ff9b::10.0.0.1", "64:ff9b:1::1", "64:ff9b:1::808:808", "64:ff9b:1:7f00:0:100::"),
        *("2002:7f00:1::", "2002:a9fe:a9fe::1", "2001:0:4136:e378:8000:63bf:80ff:fffe", "2001:0:a00:1::"),
        *("fe80::1%eth0", "fec0::1", "fc00::1", "ff02::1", "5f00::1", "100::1", "3fff::1", "4000::1", "2001:1::1"),
        *("2001:db8::1", "192.88.99.1"),
    ],
)
def test_special_addresses_are_not_public(address):
    assert not addresses.is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        *("8.8.8.8", "192.31.196.1", "2606:4700::1111", "2620:4f:8000::1"),
        *("::ffff:8.8.8.8", "::ffff:0:808:808", "64:ff9b::808:808", "2002:808:808::1"),
    ],
)
def test_global_addresses_are_public(address):
    assert addresses.is_public(address)


def test_the_result_does_not_depend_on_the_python_version(monkeypatch):
    """Python 3.13 calls other networks global than 3.11 does: with either answer the verdict is the same."""
    import ipaddress

    for answer in (True, False):
        monkeypatch.setattr(ipaddress.IPv6Address, "is_global", answer)
        for address in ("64:ff9b:1::1", "fec0::1", "5f00::1", "2001:1::1", "2002:7f00:1::", "3fff::1", "::127.0.0.1"):
            assert not addresses.is_public(address)
        assert addresses.is_public("2002:808:808::1") and addresses.is_public("64:ff9b::808:808")


@pytest.mark.parametrize("host", ["a..b", "x" * 64 + ".org", "no.such.host.invalid"])
def test_an_unresolvable_name_raises_os_error(host):
    with pytest.raises(OSError):  # noqa: PT011 - the resolver's words
        addresses.lookup(host, 80)


def test_an_octal_address_resolves_to_loopback():
    assert socket.inet_aton("0177.0.0.1") == socket.inet_aton("127.0.0.1")
    assert addresses.lookup("0177.0.0.1", 80) == ["127.0.0.1"]
