"""Secrets taken out of text, for every message, log line and record of this project.

`redacted` is the one function for it: stages, flows, MLflow's errors and `make` commands print through it.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import parse_qsl, urlsplit

MASK = "***"
_GRANTING = (
    "token|secret|passw|pwd|signature|sig|credential|api_?key|access-?key|key-?pair|policy|auth(?!or)|jwt|session"
)
"""Parts of the names of query parameters whose values grant access."""
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
# Right for messages; in code, an assignment of this form is everyday life.
_SETTING = re.compile(r"\b([\w-]*(?:password|passwd|pwd|secret|token|api_key)\s*=\s*)[^\s,;&]+", re.IGNORECASE)


def redacted(text: str) -> str:
    """`text` with user information of addresses, secret query values, tokens and passwords replaced by `***`."""
    for pattern, replacement in _CREDENTIALS:
        text = pattern.sub(replacement, text)
    return _SETTING.sub(rf"\1{MASK}", text)


def without_user(address: str) -> str:
    """An address without its user information, so that it can be opened or shown as a link."""
    parts = urlsplit(address)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def holds_credentials(text: str) -> bool:
    """Whether there is user information or a secret query value in an address, or a token of a known form."""
    return any(pattern.search(text) for pattern, _ in _CREDENTIALS)


def redacted_values(value: Any) -> Any:
    """The same for every string in nested mappings and lists."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, dict):
        return {name: redacted_values(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [redacted_values(entry) for entry in value]
    return value


def secret_in_address(text: str) -> str | None:
    """What in an address (`scheme://...`) grants access, in a few words without its value; None where nothing does."""
    if not (match := re.match(r"[A-Za-z][\w+.-]*://(?P<authority>[^/?#\s]*)(?P<rest>.*)", text, re.DOTALL)):
        return None
    # A password may hold a '/' that is not percent-encoded: 'user:pass/word@host' ends its authority too early.
    split_password = re.search(r":(?!\d*$)", match["authority"].partition("]")[2] or match["authority"])
    if "@" in match["authority"] or (split_password and "@" in match["rest"]):
        return "a user name or password"
    for name, value in parse_qsl(re.sub("[?#;]", "&", match["rest"].lstrip("/")), keep_blank_values=False):
        if re.search(_GRANTING, name, re.IGNORECASE) or _LONG_RANDOM.fullmatch(value):
            return f"the query parameter '{name[:40]}'"
    return None
