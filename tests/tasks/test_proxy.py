"""The screening proxy, used through urllib as by img2dataset, against local servers."""

import http.client
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest

from tasks.transfer import proxy
from tasks.web import addresses
from tests.support.data_inputs import serving

# What urllib leaves behind where it is refused.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
DATA = bytes(range(256)) * 2000


@pytest.fixture(autouse=True)
def no_exemption(monkeypatch):
    """Clear `no_proxy`, which a stage in this process has set to this machine and which urllib obeys."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")


@pytest.fixture
def site():
    with serving() as site:
        site.files["/a"] = DATA
        yield site


@pytest.fixture
def loopback_is_public(monkeypatch):
    """This machine plays the internet; everything else that is private stays refused."""
    public = addresses.is_public
    monkeypatch.setattr(addresses, "is_public", lambda address: address == "127.0.0.1" or public(address))


@contextmanager
def through(**limits):
    """A urllib opener behind a proxy, as `http_proxy` and `https_proxy` in the environment make it."""
    defaults = {"max_bytes": 10**7, "seconds": 20, "total_bytes": 10**9, "connections": 4}
    with proxy.running(proxy.Limits(**(defaults | limits))) as running:
        handler = urllib.request.ProxyHandler(dict.fromkeys(("http", "https", "ftp"), running.url))
        yield urllib.request.build_opener(handler), running


def refusal(opener, url):
    with pytest.raises((urllib.error.URLError, OSError)) as refused:
        opener.open(url, timeout=5)
    return str(refused.value)


def test_a_response_passes_unchanged(site, loopback_is_public):
    with through() as (opener, running):
        for _ in range(3):
            with opener.open(f"{site.address}/a", timeout=5) as answer:
                assert answer.read() == DATA
        assert "404" in refusal(opener, f"{site.address}/missing")
    assert running.counts["passed"] == 4
    assert 3 * len(DATA) < running.received < 3 * len(DATA) + 2000


@pytest.mark.parametrize(
    "host",
    ["localhost", "10.0.0.1", "192.168.1.1", "169.254.169.254", "[::1]", "[::ffff:10.0.0.1]", "0.0.0.0", "100.64.0.1"],
)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_private_addresses_are_refused(host, scheme):
    with through() as (opener, running):
        assert "470" in refusal(opener, f"{scheme}://{host}/latest")
    assert running.counts == {"refused address": 1}


def test_a_redirect_is_screened_like_the_first_address(site, loopback_is_public):
    site.redirects |= {"/b": "/a", "/in": "http://169.254.169.254/latest", "/tls": "https://10.0.0.1/"}
    with through() as (opener, _):
        with opener.open(f"{site.address}/b", timeout=5) as answer:
            assert answer.read() == DATA
        for path in ("/in", "/tls"):
            assert "470" in refusal(opener, site.address + path)


def test_other_schemes_and_odd_ports_are_refused(site, loopback_is_public):
    site.redirects["/ftp"] = "ftp://127.0.0.1/etc/passwd"
    with through() as (opener, _):
        assert "470" in refusal(opener, f"{site.address}/ftp")
        for address in ("http://127.0.0.1:22/", "https://127.0.0.1:25/", "http://127.0.0.1:99999/"):
            assert "470" in refusal(opener, address)


def test_the_connection_goes_to_the_address_that_was_screened(site, monkeypatch):
    """A name that says something else at the second look-up: there is none."""
    answers = iter([["127.0.0.1"], ["10.0.0.1"]])
    monkeypatch.setattr(addresses, "lookup", lambda *_: next(answers))
    monkeypatch.setattr(addresses, "is_public", lambda address: address == "127.0.0.1")
    port = site.address.rpartition(":")[2]
    with through() as (opener, _):
        with opener.open(f"http://changing.example:{port}/a", timeout=5) as answer:
            assert answer.read() == DATA
        assert "470" in refusal(opener, f"http://changing.example:{port}/a")


def test_a_response_over_the_limit_is_reset(site, loopback_is_public):
    with through(max_bytes=100_000) as (opener, running), pytest.raises((OSError, http.client.IncompleteRead)):
        opener.open(f"{site.address}/a", timeout=5).read()
    assert running.counts == {"cut by bytes": 1}
    assert running.received < 100_000 + 3 * 65536


def test_a_cut_response_without_a_length_is_an_error(loopback_is_public):
    """Where only the end of the connection ends the answer, a quiet end would make a whole picture of a part."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + DATA)

        threading.Thread(target=serve, daemon=True).start()
        with through(max_bytes=100_000) as (opener, _), pytest.raises(ConnectionResetError):
            opener.open(f"http://127.0.0.1:{listener.getsockname()[1]}/", timeout=5).read()


def test_a_slow_response_is_cut_off_by_time(loopback_is_public):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        stop = threading.Event()

        def drip():
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
                while not stop.wait(0.05):
                    connection.sendall(b"x")

        threading.Thread(target=drip, daemon=True).start()
        begin = time.monotonic()
        with through(seconds=0.5) as (opener, running), pytest.raises((OSError, http.client.IncompleteRead)):
            opener.open(f"http://127.0.0.1:{listener.getsockname()[1]}/", timeout=5).read()
        stop.set()
    assert time.monotonic() - begin < 5
    assert running.counts == {"cut by time": 1}


def test_the_total_of_all_responses_is_limited(site, loopback_is_public):
    with through(total_bytes=len(DATA) + 5000) as (opener, _):
        assert opener.open(f"{site.address}/a", timeout=5).read() == DATA
        with pytest.raises((OSError, http.client.IncompleteRead)):
            opener.open(f"{site.address}/a", timeout=5).read()
        assert "471" in refusal(opener, f"{site.address}/a")


def test_clients_without_the_password_are_refused(site, loopback_is_public):
    with through() as (_, running):
        bare = "http://" + running.url.rpartition("@")[2]
        for wrong in (bare, bare.replace("http://", "http://afterimage:guess@")):
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({"http": wrong, "https": wrong}))
            assert "407" in refusal(opener, f"{site.address}/a")
            assert "407" in refusal(opener, "https://example.org/")
    assert site.requests == []


def test_password_and_proxy_headers_are_not_forwarded(loopback_is_public):
    heads = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            connection, _ = listener.accept()
            with connection:
                heads.append(connection.recv(65536))
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

        threading.Thread(target=serve, daemon=True).start()
        with through() as (opener, _):
            request = urllib.request.Request(f"http://127.0.0.1:{listener.getsockname()[1]}/x?y=1", headers={"A": "b"})
            assert opener.open(request, timeout=5).read() == b"ok"
    (head,) = heads
    assert head.startswith(b"GET /x?y=1 HTTP/1.1\r\nHost: 127.0.0.1:")
    assert b"A: b" in head and b"Proxy" not in head


def test_tls_is_passed_through_unopened(certificate, loopback_is_public, monkeypatch):
    monkeypatch.setattr(addresses, "lookup", lambda *_: ["127.0.0.1"])
    context = ssl.create_default_context(cafile=str(certificate))
    with serving(certificate) as site, through() as (_, running):
        site.files["/a"] = DATA
        port = site.address.rpartition(":")[2]
        handlers = [urllib.request.ProxyHandler({"https": running.url}), urllib.request.HTTPSHandler(context=context)]
        opener = urllib.request.build_opener(*handlers)
        assert opener.open(f"https://files.test:{port}/a", timeout=5).read() == DATA
        assert "CERTIFICATE" in refusal(opener, f"https://other.test:{port}/a").upper()
