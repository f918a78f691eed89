"""Detection and masking of secrets in addresses and text.

All messages, log lines and records of stages, flows and `make` commands pass through `redacted`.
"""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, urlsplit

MASK = "***"
_GRANTING = (
    "token|secret|passw|pwd|signature|sig|credential|api_?key|access-?key|key-?pair|policy|auth(?!or)|jwt|session"
)
"""Parts of names of query parameters whose values grant access."""
_LONG_RANDOM = re.compile(r"(?=.*\d)(?=.*[A-Za-z])[\w+/=.-]{24,}")
_DATABASES = "postgres|mysql|mariadb|mssql|oracle|redis|mongodb|amqp"
_CREDENTIALS: tuple[tuple[re.Pattern[str], str], ...] = (
    # A database's address: up to the last '@', because passwords with '@' and '/' are often not percent-encoded.
    (re.compile(rf"\b((?:{_DATABASES})[\w+]*://)\S*@", re.IGNORECASE), rf"\1{MASK}@"),
    # Any other address: the authority ends at '/', or later where a ':' is followed by more than a port number.
    (re.compile(r"(://)[^\s/]*@"), rf"\1{MASK}@"),
    (re.compile(r"(://)[^\s/:@]*:(?!\d+(?:/|\b))\S*@"), rf"\1{MASK}@"),
    (re.compile(rf"([?&#;][^\s=&#]*(?:{_GRANTING})[^\s=&#]*=)[^\s&#;'\"]+", re.IGNORECASE), rf"\1{MASK}"),
    (re.compile(r"\b((?:Bearer|Basic)\s+)[\w.~+/=-]{8,}"), rf"\1{MASK}"),
    (re.compile(r"\b(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|(?:AKIA|ASIA)[A-Z0-9]{16})\b"), MASK),
)
# For messages only: in code, assignments of this form are common and harmless.
_SETTING = re.compile(r"\b([\w-]*(?:password|passwd|pwd|secret|token|api_key)\s*=\s*)[^\s,;&]+", re.IGNORECASE)


def redacted(text: str) -> str:
    """Return `text` with user names and passwords of addresses, secret query values and tokens replaced by `***`."""
    for pattern, replacement in _CREDENTIALS:
        text = pattern.sub(replacement, text)
    return _SETTING.sub(rf"\1{MASK}", text)


def without_user(address: str) -> str:
    """Return an address without user name and password, so that it can be opened or shown as a link."""
    parts = urlsplit(address)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def holds_credentials(text: str) -> bool:
    """Whether `text` contains an address with a password or a secret query value, or a token of a known format."""
    return any(pattern.search(text) for pattern, _ in _CREDENTIALS)


def redacted_values(value: object) -> object:
    """Return `value` with `redacted` applied to every string in nested mappings and lists; tuples become lists."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, dict):
        return {name: redacted_values(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [redacted_values(entry) for entry in value]
    return value


def secret_in_address(text: str) -> str | None:
    """Name the part of an address (`scheme://...`) that grants access, without its value; None if there is none."""
    if not (match := re.match(r"[A-Za-z][\w+.-]*://(?P<authority>[^/?#\s]*)(?P<rest>.*)", text, re.DOTALL)):
        return None
    # A password may contain a '/' that is not percent-encoded: 'user:pass/word@host' then ends the authority early.
    split_password = re.search(r":(?!\d*$)", match["authority"].partition("]")[2] or match["authority"])
    if "@" in match["authority"] or (split_password and "@" in match["rest"]):
        return "a user name or password"
    for name, value in parse_qsl(re.sub("[?#;]", "&", match["rest"].lstrip("/")), keep_blank_values=False):
        if re.search(_GRANTING, name, re.IGNORECASE) or _LONG_RANDOM.fullmatch(value):
            return f"the query parameter '{name[:40]}'"
    return None
