"""Downloads over http: resumed, limited, verified, from screened addresses, against local servers."""

import base64
import hashlib
import socket
import time

import pytest

from tasks.runtime.errors import StageError
from tasks.web import addresses, fetch
from tests.support.data_inputs import cutting, random_cuts, serving

DATA = bytes(range(256)) * 4000
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def site():
    with serving() as site:
        yield site


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(fetch, "PAUSE_SECONDS", 0.01)


@pytest.fixture
def get(tmp_path):
    """`fetch` into `tmp_path/file` with the right checksum and private addresses allowed by default."""

    def call(*urls, **others):
        options = {"sha256": SHA256, "max_bytes": 10**9, "timeout_seconds": 60, "allow_private_addresses": True}
        return fetch.fetch(urls, tmp_path / "file", partial=tmp_path / "partial", **(options | others))

    return call


def test_a_file_is_downloaded_completely(site, get, tmp_path):
    site.files["/a"] = DATA
    assert get(f"{site.address}/a") == f"{site.address}/a"
    assert (tmp_path / "file").read_bytes() == DATA
    assert not list((tmp_path / "partial").glob("*.part"))


def test_a_cut_connection_is_resumed_with_a_range_request(site, get, tmp_path):
    site.files["/a"] = DATA
    site.cut_after = 300_000
    get(f"{site.address}/a")
    assert (tmp_path / "file").read_bytes() == DATA
    starts = [int(asked[6:-1]) if asked else 0 for _, asked in site.requests]
    assert len(starts) > 3
    assert starts == sorted(set(starts)), "each request begins where the one before ended"


def test_twenty_connections_that_break_at_random_places(site, get, tmp_path):
    site.files["/a"] = DATA
    with cutting(site.address, random_cuts(len(DATA))) as relay:
        get(f"http://127.0.0.1:{relay.port}/a")
        assert not relay.cuts
    assert (tmp_path / "file").read_bytes() == DATA
    starts = [int(asked[6:-1]) if asked else 0 for _, asked in site.requests]
    assert len(starts) == 21 and starts == sorted(set(starts))


def test_a_partial_download_is_continued_by_the_next_run(site, get, tmp_path):
    site.files["/a"] = DATA
    site.cut_after = 0
    (tmp_path / "partial").mkdir()
    part = tmp_path / "partial" / f"{SHA256}.part"
    part.write_bytes(DATA[:700_000])
    with pytest.raises(StageError, match="run the same command again"):
        get(f"{site.address}/a")
    assert part.stat().st_size == 700_000
    site.cut_after, site.requests[:] = None, []
    get(f"{site.address}/a")
    assert site.requests == [("/a", "bytes=700000-")]
    assert (tmp_path / "file").read_bytes() == DATA


def test_without_range_support_the_download_starts_again(site, get, tmp_path):
    site.files["/a"] = DATA
    site.ranges = False
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial" / f"{SHA256}.part").write_bytes(b"x" * 1000)
    get(f"{site.address}/a")
    assert (tmp_path / "file").read_bytes() == DATA


@pytest.mark.parametrize("size", [1000, len(DATA), len(DATA) + 5])
def test_a_damaged_partial_file_is_discarded(site, get, tmp_path, size):
    site.files["/a"] = DATA
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial" / f"{SHA256}.part").write_bytes(b"x" * size)
    get(f"{site.address}/a")
    assert (tmp_path / "file").read_bytes() == DATA


def test_a_complete_partial_file_is_not_downloaded_again(site, get, tmp_path):
    site.files["/a"] = DATA
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial" / f"{SHA256}.part").write_bytes(DATA)
    get(f"{site.address}/a")
    assert site.requests == [("/a", f"bytes={len(DATA)}-")]


def test_the_next_mirror_is_used_if_one_fails(site, get, tmp_path):
    site.files["/good"], site.files["/other"] = DATA, b"something else"
    used = get(f"{site.address}/missing", f"{site.address}/other", f"{site.address}/good")
    assert used == f"{site.address}/good"
    assert (tmp_path / "file").read_bytes() == DATA


def test_after_a_checksum_mismatch_no_file_is_left(site, get, tmp_path):
    site.files["/a"] = DATA[:-1] + b"x"
    with pytest.raises(StageError, match=f"checksum mismatch.*{SHA256}"):
        get(f"{site.address}/a")
    assert not (tmp_path / "file").exists()


def test_a_missing_page_and_a_closed_port_are_named(site, get):
    with pytest.raises(StageError, match="404"):
        get(f"{site.address}/missing")
    with pytest.raises(StageError, match=r"127\.0\.0\.1:9/a"):
        get("http://127.0.0.1:9/a")


def test_a_file_over_the_limit_is_refused_before_the_download(site, get, tmp_path):
    site.files["/a"] = DATA
    with pytest.raises(StageError, match="max_bytes 1000"):
        get(f"{site.address}/a", max_bytes=1000)
    assert not list((tmp_path / "partial").glob("*.part"))


def test_the_timeout_limits_the_whole_download(site, get):
    site.files["/a"] = DATA
    site.cut_after = 100
    begin = time.monotonic()
    with pytest.raises(StageError, match="timeout_seconds"):
        get(f"{site.address}/a", timeout_seconds=0.5)
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "10.0.0.1", "192.168.1.1", "169.254.169.254", "[::1]", "[::ffff:10.0.0.1]", "0.0.0.0"],
)
def test_private_addresses_are_refused(get, host):
    with pytest.raises(StageError, match="private address"):
        get(f"http://{host}/a", allow_private_addresses=False)


def test_a_redirect_to_a_private_address_is_refused(site, get, monkeypatch):
    site.redirects["/a"] = "http://10.0.0.1/secret"
    public = addresses.is_public
    monkeypatch.setattr(addresses, "is_public", lambda address: address == "127.0.0.1" or public(address))
    with pytest.raises(StageError, match=r"private address 10\.0\.0\.1"):
        get(f"{site.address}/a", allow_private_addresses=False)


def test_redirects_are_followed_a_few_times_and_only_to_http(site, get, tmp_path):
    site.files["/c"] = DATA
    site.redirects |= {"/a": "/b", "/b": f"{site.address}/c", "/loop": "/loop", "/file": "file:///etc/passwd"}
    get(f"{site.address}/a")
    assert (tmp_path / "file").read_bytes() == DATA
    with pytest.raises(StageError, match="redirects"):
        get(f"{site.address}/loop")
    with pytest.raises(StageError, match="http"):
        get(f"{site.address}/file")


def test_the_connection_goes_to_the_address_of_the_first_lookup(site, get, tmp_path, monkeypatch):
    """A host whose address changes between the screening and the connection is asked once."""
    site.files["/a"] = DATA
    asked = []
    port = int(site.address.rpartition(":")[2])

    def resolve(host, *_, **__):
        asked.append(host)
        return [(2, 1, 6, "", ("127.0.0.1" if len(asked) == 1 else "127.0.0.2", port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    client_connects = []
    connect = socket.create_connection

    def record(address, *others, **named):
        client_connects.append(address[0])
        monkeypatch.undo()
        return connect(address, *others, **named)

    monkeypatch.setattr(socket, "create_connection", record)
    get(f"http://example.org:{port}/a")
    assert asked == ["example.org"]
    assert client_connects == ["127.0.0.1"]


def test_a_proxy_of_the_environment_is_used(site, get, tmp_path, monkeypatch):
    site.files["http://files.invalid/a"] = DATA
    monkeypatch.setenv("http_proxy", site.address)
    get("http://files.invalid/a", allow_private_addresses=False)
    assert (tmp_path / "file").read_bytes() == DATA
    with pytest.raises(StageError, match="private address"):
        get("http://10.0.0.1/a", allow_private_addresses=False)


def test_the_certificate_is_verified_for_the_host_name(get, tmp_path, monkeypatch, certificate):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    resolve = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda _, *others, **named: resolve("127.0.0.1", *others, **named))
    with serving(certificate) as site:
        site.files["/a"] = DATA
        port = site.address.rpartition(":")[2]
        get(f"https://files.test:{port}/a")
        assert (tmp_path / "file").read_bytes() == DATA
        with pytest.raises(StageError, match="certificate"):
            get(f"https://other.test:{port}/a")


def test_secrets_in_a_url_are_not_printed(site, get):
    site.files["/a"] = DATA
    private = site.address.replace("http://", "http://user:password@") + "/a?signature=secret"
    assert get(private.replace("?signature=secret", "")) == f"{site.address}/a"
    with pytest.raises(StageError) as refused:
        get(private)
    assert "secret" not in str(refused.value)
    assert "password" not in str(refused.value)


def test_headers_are_sent_only_to_the_original_host(site, get, tmp_path):
    with serving() as other:
        other.files["/there"] = DATA
        site.redirects |= {"/a": "/b", "/b": f"{other.address}/there"}
        get(f"{site.address}/a", headers={"Authorization": "Bearer right"})
        assert site.tokens == [("/a", "Bearer right"), ("/b", "Bearer right")]
        assert other.tokens == [("/there", None)]


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def test_user_and_password_of_a_host_come_from_netrc(site, get, tmp_path, monkeypatch):
    with serving() as other:
        other.files["/there"] = DATA
        site.redirects |= {"/a": "/b", "/b": f"{other.address.replace('127.0.0.1', 'localhost')}/there"}
        (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password s p\n".replace("s p", '"s p"'))
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        get(f"{site.address}/a")
    assert site.tokens == [("/a", basic("me", "s p")), ("/b", basic("me", "s p"))]
    assert other.tokens == [("/there", None)]
    assert (tmp_path / "file").read_bytes() == DATA


def test_without_a_netrc_entry_the_error_of_a_401_names_netrc(site, get, tmp_path, monkeypatch):
    site.refusals["/a"] = (401, {"WWW-Authenticate": "Basic"})
    (tmp_path / "netrc").write_text("machine elsewhere.org login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(fetch.AccessError, match=r"401.*~/\.netrc"):
        get(f"{site.address}/a")
    assert site.tokens == [("/a", None)]


def test_an_unreadable_netrc_is_named_and_not_quoted(site, get, tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me\nsecret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(StageError, match=r"netrc cannot be read \(line \d\); correct it") as refused:
        get(f"{site.address}/a")
    assert "secret" not in str(refused.value)


def test_an_address_from_the_environment(monkeypatch):
    monkeypatch.setenv("MY_URL", "https://user:secret@host/x?signature=secret")
    assert fetch.address("env:MY_URL", "download.url") == "https://user:secret@host/x?signature=secret"
    assert fetch.address("https://host/x", "download.url") == "https://host/x"
    monkeypatch.setenv("MY_URL", "secret")
    with pytest.raises(StageError, match=r"download\.url names .* MY_URL, which holds no http\(s\) address") as refused:
        fetch.address("env:MY_URL", "download.url")
    assert "secret" not in str(refused.value)
    monkeypatch.delenv("MY_URL")
    with pytest.raises(StageError, match="MY_URL, which is not set; set it"):
        fetch.address("env:MY_URL", "download.url")


@pytest.mark.parametrize(
    "url",
    ["http://0177.0.0.1/", "http://a..b/x", "http://host:99999/", "http://[::1/x", "http://me:secret@0177.0.0.1/"],
)
def test_an_invalid_url_is_one_sentence(get, url):
    with pytest.raises(StageError) as refused:
        get(url, allow_private_addresses=False)
    assert "\n" not in str(refused.value) and "secret" not in str(refused.value)
    with pytest.raises(StageError):
        fetch.require_allowed(url, False)


def test_a_redirect_to_an_invalid_url_is_one_sentence(site, get):
    site.redirects["/a"] = "http://0177.0.0.1/"
    with pytest.raises(StageError, match="redirects to an invalid URL"):
        get(f"{site.address}/a")


def test_a_full_disk_is_reported_before_the_download(site, get, tmp_path, monkeypatch):
    site.files["/a"] = DATA
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": len(DATA) - 1}))
    with pytest.raises(StageError, match="are free"):
        get(f"{site.address}/a")
    assert not list((tmp_path / "partial").glob("*.part"))
