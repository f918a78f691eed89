"""One file over http(s): resumed, bounded, verified, and never from an address that nobody meant.

What arrived is kept under the name of the expected checksum, so the same command continues after
an accident, from whichever mirror answers. The file gets its real name when its checksum is right.

User and password of a host come from ~/.netrc (or the file that NETRC names), or stand in an address that came from an
environment variable; they are sent to that host alone.
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
from typing import TYPE_CHECKING
from urllib.request import getproxies, proxy_bypass

from tqdm import tqdm

from tasks.params.redaction import redacted
from tasks.runtime import atomic, locks
from tasks.runtime.disk import require_space, sha256_of
from tasks.runtime.stage import StageError
from tasks.transfer import addresses

if TYPE_CHECKING:
    import httpx

MAX_REDIRECTS = 5
ATTEMPTS = 3
"""Attempts in a row that may bring nothing, for each address."""
CONNECT_SECONDS, READ_SECONDS, PAUSE_SECONDS = 10.0, 30.0, 0.5
ENVIRONMENT = "env:"
RETRIED = {408, 425, 429, 500, 502, 503, 504}


class MirrorError(Exception):
    """This address will not give the file; another may. The message says why."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class AccessError(StageError):
    """The last address answered that the file is not for us (401 or 403)."""

    def __init__(self, sentence: str, status: int) -> None:
        super().__init__(sentence)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """What a fetch may cost and reach."""

    max_bytes: int
    deadline: float
    """Of `time.monotonic()`, in seconds."""
    allow_private_addresses: bool
    headers: Mapping[str, str]
    """Sent to the host of the address itself, and never to another to which it redirects."""


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
    """Bring the file with this `sha256` to `target` from the first of `urls` that gives it; returns that address.

    `partial` is a folder for what has arrived so far; `headers`, such as a token, go to the hosts of
    `urls` alone. Raises `AccessError` where the last of them answers 401 or 403, and `StageError` where
    none gives the file within `timeout_seconds` and `max_bytes`, or one leads to a private address.
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
    sentence = f"could not fetch {'; nor '.join(refusals)}; mend that, then run the same command again"
    raise AccessError(sentence, status) if status in (401, 403) else StageError(sentence)


def require_allowed(url: str, allow_private_addresses: bool) -> None:
    """Raise `StageError` where `url` is no http(s) address, or lies at a private address that nobody allowed.

    For addresses that another client will ask: it looks the name up again, so this screens and does not pin.
    """
    try:
        _screened(_parsed(url), Limits(0, 0, allow_private_addresses, {}))
    except MirrorError as error:
        raise StageError(str(error)) from None


def shown(url: str) -> str:
    """An address without what may be secret in it: user, password and query."""
    return str(_parsed(url).copy_with(userinfo=b"", query=None, fragment=None))


def address(where: str, key: str) -> str:
    """The address that the parameter `key` means: itself, or where it is `env:NAME` what that variable holds.

    Raises `StageError` where the variable is not set or holds no http(s) address.
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
    import httpx

    try:
        return httpx.URL(url)
    except (httpx.InvalidURL, ValueError) as error:
        raise StageError(
            f"{redacted(url.partition('?')[0])} is not a valid address ({str(error).rstrip('.')}); correct it"
        ) from None


def _authorization(url: httpx.URL) -> dict[str, str]:
    """The header with user and password for the host of `url`, from the address or from netrc; empty without them."""
    user, password = url.username, url.password
    if not user and (entry := _netrc_entry(url.host)):
        user, password = entry
    if not user:
        return {}
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode("ascii")}


def _netrc_entry(host: str) -> tuple[str, str] | None:
    """User and password of `host` in the netrc file, or None. Raises `StageError` for a file that cannot be read."""
    path = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    if not path.is_file():
        return None
    try:
        found = netrc.netrc(path).authenticators(host)
    except netrc.NetrcParseError as error:  # whose message may quote a password
        raise StageError(f"{path} cannot be read (line {error.lineno}); correct it") from None
    except OSError as error:
        raise StageError(f"{path} cannot be read ({error.strerror}); correct its permissions") from None
    return (found[0], found[2] or "") if found else None


def _complete(url: str, part: Path, sha256: str, limits: Limits) -> None:
    """Bring `part` to its end and verify it; anew, once, where the rest did not fit what had arrived before."""
    resumed = part.exists()
    _receive(url, part, limits)
    found = sha256_of(part)
    if found == sha256:
        return
    part.unlink()
    if resumed:
        _complete(url, part, sha256, limits)
        return
    raise MirrorError(f"checksum mismatch, sha256 is {found} and not {sha256}; correct download.sha256 or download.url")


def _receive(url: str, part: Path, limits: Limits) -> None:
    """Append to `part` until the server says that it is complete; goes on where a connection broke."""
    import httpx

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
    """One request for the bytes from `start` on; returns whether the file is complete now."""
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    with _response(url, headers, limits) as response:
        if response.status_code == 416 and start:
            # Nothing lies behind `start`: all is here, or the checksum will show that it is not.
            return True
        if response.status_code not in (200, 206):
            answer = f"the server answered {response.status_code} {response.reason_phrase}"
            if response.status_code in (401, 403):
                answer += ", so put user and password of that host into ~/.netrc, or renew a signed address"
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
            tqdm(
                desc="download",
                initial=start,
                total=total,
                unit="B",
                unit_scale=True,
                mininterval=1,
                dynamic_ncols=True,
            ) as bar,
        ):
            file.seek(start)
            # In the pieces that the network brings: a cut connection loses none of them.
            for chunk in response.iter_raw():
                _require_allowed(file.tell() + len(chunk), limits)
                if time.monotonic() > limits.deadline:
                    raise MirrorError("not done within download.timeout_seconds")
                file.write(chunk)
                bar.update(len(chunk))
            return total is None or file.tell() == total


def _require_allowed(size: int, limits: Limits) -> None:
    if size > limits.max_bytes:
        raise StageError(f"the file is larger than download.max_bytes {limits.max_bytes}; raise it if you want it")


@contextmanager
def _response(url: str, headers: dict[str, str], limits: Limits) -> Iterator[httpx.Response]:
    """The streamed answer to a GET, behind at most five redirects, each of which is screened as the first was."""
    import httpx

    first = _parsed(url)
    own = {**_authorization(first), **limits.headers}
    here = first = first.copy_with(userinfo=b"")
    for _ in range(MAX_REDIRECTS + 1):
        with _client(here) as client:
            private = own if (here.scheme, here.netloc) == (first.scheme, first.netloc) else {}
            response = _send(client, here, {**headers, **private}, limits)
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
        try:
            there = here.join(response.headers["Location"])
        except httpx.InvalidURL:
            raise MirrorError("it redirects to an address that is not valid") from None
        if here.scheme == "https" and there.scheme != "https":
            raise StageError(f"{shown(url)} redirects from https to {there.scheme}; use another download.url")
        here = there
    raise MirrorError(f"more than {MAX_REDIRECTS} redirects")


def _proxy(url: httpx.URL) -> str | None:
    """The proxy that the environment names for `url` (https_proxy, no_proxy and their like)."""
    return None if proxy_bypass(url.host) else getproxies().get(url.scheme)


def _client(url: httpx.URL) -> httpx.Client:
    import httpx

    return httpx.Client(
        proxy=_proxy(url),
        timeout=httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS),
        # Heeds SSL_CERT_FILE; reading all those certificates takes longer than many a file.
        verify=httpx.create_ssl_context() if url.scheme == "https" else False,
        trust_env=False,  # proxies and netrc are read here: a request goes to an IP address, not to the host's name
    )


def _send(client: httpx.Client, url: httpx.URL, headers: dict[str, str], limits: Limits) -> httpx.Response:
    """GET from one of the host's screened addresses.

    The connection goes to the address itself, so that no second look-up can name another one; TLS
    still checks the certificate of the host. Through a proxy it is the proxy that looks up and connects.
    """
    import httpx

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
    """Addresses of the host of `url`. Raises `StageError` where the scheme or any address is not to be used."""
    if url.scheme not in ("http", "https") or not url.host:
        raise StageError(f"{shown(str(url))} is no http(s) address; correct download.url")
    try:
        found = addresses.lookup(url.host, url.port or (443 if url.scheme == "https" else 80))
    except OSError as error:
        if _proxy(url):
            return []  # behind some proxies names are the proxy's business alone
        reason = error.strerror or error
        raise MirrorError(f"{url.host} cannot be found ({reason}); is there a network?") from None
    if not limits.allow_private_addresses:
        addresses.require_public(url.host, found)
    return found
