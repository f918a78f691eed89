"""Download one file over http(s): resumable, limited in size and time, verified, from screened addresses only.

Partial files are named after the expected checksum, so a rerun continues from any mirror. A file gets its final name
after its checksum is verified.

User and password of a host come from ~/.netrc (or the file in NETRC), or from a URL in an environment variable; they
are sent only to that host.
"""

from __future__ import annotations

import base64
import netrc
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.request import getproxies, proxy_bypass

import httpx

from models.hashing import file_sha256
from tasks.params.redaction import redacted
from tasks.runtime import atomic, locks
from tasks.runtime.disk import require_space
from tasks.runtime.errors import StageError
from tasks.runtime.progress import progress
from tasks.web import addresses

MAX_REDIRECTS = 5
ATTEMPTS = 3
"""Consecutive attempts without any data before an address is given up."""
CONNECT_SECONDS, READ_SECONDS, PAUSE_SECONDS = 10.0, 30.0, 0.5
ENVIRONMENT = "env:"
RETRIED = {408, 425, 429, 500, 502, 503, 504}


class MirrorError(Exception):
    """One address does not provide the file; another mirror may. The message is the reason."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class AccessError(StageError):
    """The last address answered 401 or 403."""

    def __init__(self, sentence: str, status: int) -> None:
        super().__init__(sentence)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """Limits of one download."""

    max_bytes: int
    deadline: float
    """In seconds of `time.monotonic()`."""
    allow_private_addresses: bool
    headers: Mapping[str, str]
    """Sent only to the host of the original URL, not to hosts that it redirects to."""


def fetch(
    urls: Sequence[str],
    target: Path,
    *,
    sha256: str,
    partial: Path,
    max_bytes: int,
    timeout_seconds: float,
    allow_private_addresses: bool = False,
    headers: Mapping[str, str] | None = None,
) -> str:
    """Download the file with this `sha256` to `target` from the first of `urls` that provides it; return that URL.

    `partial` is a folder for partial files. `headers`, such as a token, are sent only to the hosts of `urls`.
    Raises `AccessError` if the last URL answers 401 or 403, and `StageError` if none provides the file within
    `timeout_seconds` and `max_bytes`, or if one leads to a private address.
    """
    limits = Limits(max_bytes, time.monotonic() + timeout_seconds, allow_private_addresses, headers or {})
    part = partial / f"{sha256}.part"
    refusals, status = [], None
    with locks.exclusive(partial / f"{sha256}.lock"):
        for url in urls:
            try:
                _complete(url, part, sha256, limits)
            except MirrorError as error:
                refusals.append(f"{shown(url)}: {error}")
                status = error.status
                continue
            require_space(target.parent, part.stat().st_size)
            with atomic.writing(target) as temporary:
                shutil.move(part, temporary)
            return shown(url)
    sentence = f"could not fetch {'; nor '.join(refusals)}; correct the cause, then run the same command again"
    raise AccessError(sentence, status) if status in (401, 403) else StageError(sentence)


def require_allowed(url: str, allow_private_addresses: bool) -> None:
    """Raise `StageError` if `url` is not an http(s) address, or has a private address while these are not allowed.

    For URLs that another client opens. It resolves the name again, so the address is screened but not pinned.
    """
    try:
        _screened(_parsed(url), Limits(0, 0, allow_private_addresses, {}))
    except MirrorError as error:
        raise StageError(str(error)) from None


def shown(url: str) -> str:
    """A URL without the parts that may be secret: user, password and query."""
    return str(_parsed(url).copy_with(userinfo=b"", query=None, fragment=None))


def address(where: str, key: str) -> str:
    """Resolve the value of the parameter `key`: a URL, or `env:NAME` for the URL in an environment variable.

    Raises `StageError` if the variable is not set or holds no http(s) address.
    """
    if not where.startswith(ENVIRONMENT):
        return where
    name = where.removeprefix(ENVIRONMENT)
    held = os.environ.get(name, "").strip()
    if not held.startswith(("http://", "https://")):
        wrong = "holds no http(s) address" if held else "is not set"
        raise StageError(f"{key} names the environment variable {name}, which {wrong}; set it to the address")
    return held


def _parsed(url: str) -> httpx.URL:
    try:
        return httpx.URL(url)
    except (httpx.InvalidURL, ValueError) as error:
        raise StageError(
            f"{redacted(url.partition('?')[0])} is not a valid address ({str(error).rstrip('.')}); correct it"
        ) from None


def _authorization(url: httpx.URL) -> dict[str, str]:
    """Authorization header for the host of `url`, from the URL or from netrc; empty without credentials."""
    user, password = url.username, url.password
    if not user and (entry := _netrc_entry(url.host)):
        user, password = entry
    if not user:
        return {}
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode("ascii")}


def _netrc_entry(host: str) -> tuple[str, str] | None:
    """User and password of `host` in the netrc file, or None. Raises `StageError` if the file cannot be read."""
    path = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    if not path.is_file():
        return None
    try:
        found = netrc.netrc(path).authenticators(host)
    except netrc.NetrcParseError as error:  # its message may quote a password
        raise StageError(f"{path} cannot be read (line {error.lineno}); correct it") from None
    except OSError as error:
        raise StageError(f"{path} cannot be read ({error.strerror}); correct its permissions") from None
    return (found[0], found[2] or "") if found else None


def _complete(url: str, part: Path, sha256: str, limits: Limits) -> None:
    """Complete `part` and verify it; a resumed file with a wrong checksum is downloaded once more from the start."""
    resumed = part.exists()
    _receive(url, part, limits)
    found = file_sha256(part)
    if found == sha256:
        return
    part.unlink()
    if resumed:
        _complete(url, part, sha256, limits)
        return
    raise MirrorError(f"checksum mismatch, sha256 is {found} and not {sha256}; correct download.sha256 or download.url")


def _receive(url: str, part: Path, limits: Limits) -> None:
    """Append to `part` until it is complete; continue after broken connections."""
    part.parent.mkdir(parents=True, exist_ok=True)
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            if _append(url, part, before, limits):
                return
            reason = "the connection ended early"
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
        after = part.stat().st_size if part.exists() else 0
        failures = 0 if after > before else failures + 1
        if failures >= ATTEMPTS:
            raise MirrorError(reason)
        _pause(PAUSE_SECONDS * 2**failures, limits)


def _pause(seconds: float, limits: Limits) -> None:
    if time.monotonic() + seconds > limits.deadline:
        raise MirrorError("not done within download.timeout_seconds")
    time.sleep(seconds)


def _append(url: str, part: Path, start: int, limits: Limits) -> bool:
    """Request the bytes from `start` and return whether the file is complete."""
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    with _response(url, headers, limits) as response:
        if response.status_code == 416 and start:
            return True  # there are no bytes after `start`; the checksum decides whether the file is complete
        if response.status_code not in (200, 206):
            answer = f"the server answered {response.status_code} {response.reason_phrase}"
            if response.status_code in (401, 403):
                answer += "; add user and password of that host to ~/.netrc, or renew a signed URL"
            raise MirrorError(answer, response.status_code)
        if response.status_code == 200 or not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            if response.status_code == 206:
                part.unlink(missing_ok=True)
                return False
            start = 0
        length = int(response.headers.get("Content-Length", "-1"))
        total = start + length if length >= 0 else None
        if total is not None:
            _require_allowed(total, limits)
            require_space(part.parent, length)
        with (
            part.open("r+b" if start else "wb") as file,
            progress(desc="download", initial=start, total=total, unit="B", unit_scale=True) as bar,
        ):
            file.seek(start)
            # Write each piece as it arrives, so that a broken connection loses nothing.
            for chunk in response.iter_raw():
                _require_allowed(file.tell() + len(chunk), limits)
                if time.monotonic() > limits.deadline:
                    raise MirrorError("not done within download.timeout_seconds")
                file.write(chunk)
                bar.update(len(chunk))
            return total is None or file.tell() == total


def _require_allowed(size: int, limits: Limits) -> None:
    if size > limits.max_bytes:
        raise StageError(
            f"the file is larger than download.max_bytes {limits.max_bytes}; raise it to allow the download"
        )


@contextmanager
def _response(url: str, headers: dict[str, str], limits: Limits) -> Iterator[httpx.Response]:
    """Streamed response to a GET after at most `MAX_REDIRECTS` redirects; every hop is screened."""
    first = _parsed(url)
    own = {**_authorization(first), **limits.headers}
    here = first = first.copy_with(userinfo=b"")
    for _ in range(MAX_REDIRECTS + 1):
        with _client(here) as client:
            private = own if (here.scheme, here.netloc) == (first.scheme, first.netloc) else {}
            try:
                response = _send(client, here, {**headers, **private}, limits)
            except httpx.RemoteProtocolError as error:  # httpx parses the header also when it does not follow it
                if "location header" not in str(error):
                    raise
                raise MirrorError("it redirects to an invalid URL") from None
            try:
                if not response.has_redirect_location:
                    if response.status_code in RETRIED:
                        raise httpx.HTTPStatusError(
                            f"the server answered {response.status_code} {response.reason_phrase}",
                            request=response.request,
                            response=response,
                        )
                    yield response
                    return
            finally:
                response.close()
        there = here.join(response.headers["Location"])
        if here.scheme == "https" and there.scheme != "https":
            raise StageError(f"{shown(url)} redirects from https to {there.scheme}; use another download.url")
        here = there
    raise MirrorError(f"more than {MAX_REDIRECTS} redirects")


def _proxy(url: httpx.URL) -> str | None:
    """The proxy for `url` according to the environment (https_proxy, no_proxy and similar variables)."""
    return None if proxy_bypass(url.host) else getproxies().get(url.scheme)


def _client(url: httpx.URL) -> httpx.Client:
    return httpx.Client(
        proxy=_proxy(url),
        timeout=httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS),
        # Respects SSL_CERT_FILE. Loading certificates takes longer than some downloads, so http skips it.
        verify=httpx.create_ssl_context() if url.scheme == "https" else False,
        trust_env=False,  # proxies and netrc are handled here, because requests go to an IP address
    )


def _send(client: httpx.Client, url: httpx.URL, headers: dict[str, str], limits: Limits) -> httpx.Response:
    """Send a GET to one of the screened addresses of the host.

    The connection goes to the IP address, so that a second DNS lookup cannot return another one; TLS still verifies
    the certificate of the host name. With a proxy, the proxy resolves the name and connects.
    """
    screened = _screened(url, limits)
    if _proxy(url):
        return client.send(client.build_request("GET", url, headers=headers), stream=True, follow_redirects=False)
    for number, address in enumerate(screened, 1):
        request = client.build_request(
            "GET",
            url.copy_with(host=address),
            headers=headers | {"Host": url.netloc.decode("ascii")},
            extensions={"sni_hostname": url.host},
        )
        try:
            return client.send(request, stream=True, follow_redirects=False)
        except (httpx.ConnectError, httpx.ConnectTimeout):
            if number == len(screened):
                raise
    raise MirrorError(f"{url.host} has no address")


def _screened(url: httpx.URL, limits: Limits) -> list[str]:
    """Addresses of the host of `url`. Raises `StageError` if the scheme or an address is not allowed."""
    if url.scheme not in ("http", "https") or not url.host:
        raise StageError(f"{shown(str(url))} is not an http(s) address; correct download.url")
    try:
        found = addresses.lookup(url.host, url.port or (443 if url.scheme == "https" else 80))
    except OSError as error:
        if _proxy(url):
            return []  # the proxy resolves names
        reason = error.strerror or error
        raise MirrorError(f"{url.host} cannot be found ({reason}); check the network") from None
    if not limits.allow_private_addresses:
        addresses.require_public(url.host, found)
    return found
