"""Hide credentials in texts: everything that is logged, tagged or shown passes through here first.

Three kinds are found: what stands before ``@`` in a URI, query parameters that sign or authorise a request, and the
values of the environment's variables that are named like secrets, wherever they occur.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from pipelines.process.environment import variables

HIDDEN = "***"
SHORTEST = 4
"""Characters of the shortest value of a variable that counts as a secret: shorter ones are parts of any text."""

_SECRET_NAME = re.compile(
    r"(?:^|_)(?:secret|password|passwd|passphrase|token|credentials?|(?:access|account|api|auth|private|storage)_?key)"
    r"(?:_|$)",
    re.IGNORECASE,
)
_NO_SECRETS = {"true", "false", "none", "null"}
# Up to the last @ before the path; with a colon, which is no port's, even beyond: a secret may hold a slash.
_USERINFO = re.compile(r"(?<=://)(?:[^\s/?#]{0,1024}@|[^\s/?#:@]{0,1024}:(?!\d+(?:[/?#]|$))[^\s@]{0,1024}@)")
# What names nothing else: photos have keys and authors, too.
_TOKEN = re.compile(
    r"([?&;](?:sig|signature|(?:[a-z]+[_-])?(?:token|secret|password|passwd|pwd)|api[_-]?key|credentials?|auth)=)"
    r"[^&;\s#\"'<>]+",
    re.IGNORECASE,
)
SIGNED = {
    frozenset({"x-amz-signature"}): re.compile("x-amz-.*"),
    frozenset({"x-goog-signature"}): re.compile("x-goog-.*"),
    frozenset({"x-oss-signature"}): re.compile("x-oss-.*"),
    frozenset({"sv", "sig"}): re.compile("s[vrpest]|sig|ss|srt|spr|sip|sk(oid|tid|t|e|s|v)"),
    frozenset({"signature"}): re.compile(
        "signature|expires|policy|key-pair-id|(aws|oss)accesskeyid|googleaccessid|(x-amz-)?security-token"
    ),
}
"""Query parameters that sign (S3, Google, Alibaba, Azure; CloudFront and older S3), in small letters -> all that come
with them."""

_PASSWORD = re.compile(
    r"(?i:https?)://[^\s/?#]*@|[A-Za-z][A-Za-z0-9+.-]*://(?!\[|arn:)[^\s/?#:@]*:(?!\d+(?:[/?#]|$))[^\s@]*@"
)
_PARAMETER = re.compile(
    r"([?&;](?:sig|[^=&;\s?#]*(?:signature|token|secret|password|passwd|pwd|credential|auth|key)[^=&;\s?#]*)=)"
    r"[^&;\s#\"'<>]+",
    re.IGNORECASE,
)


def redacted(text: str) -> str:
    """``text`` with ``***`` in place of every credential that is known as one."""
    for secret in sorted(set(_secrets()), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return _PARAMETER.sub(rf"\g<1>{HIDDEN}", _USERINFO.sub(f"{HIDDEN}@", text))


def holds_password(uri: str) -> bool:
    """Whether a URI holds a password before ``@``, or on the web anything."""
    return bool(_PASSWORD.match(uri))


def without_secrets(uri: str) -> str:
    """A URI that names the same for people and for comparisons, and gives nobody access; other texts as they are.

    On the web signatures of ``SIGNED`` go, with all that was signed with them, so that a URI that is signed anew stays
    the same. A digest stands for any other query parameter that authorises a request: two that differ still do.
    """
    if uri.startswith(("http://", "https://")) and "?" in uri:
        path, _, query = uri.partition("?")
        uri = _TOKEN.sub(_digested, "?".join(filter(None, (path, _unsigned(query)))))
    return _USERINFO.sub(f"{HIDDEN}@", uri) if holds_password(uri) else uri


def _unsigned(query: str) -> str:
    """A query without its signature."""
    parts = query.split("&")
    names = [part.partition("=")[0].lower() for part in parts]
    signed = [others for signature, others in SIGNED.items() if signature.issubset(names)]
    return "&".join(
        part for part, name in zip(parts, names, strict=True) if not any(each.fullmatch(name) for each in signed)
    )


def _digested(match: re.Match[str]) -> str:
    value = match[0][len(match[1]) :]
    return f"{match[1]}{HIDDEN}{hashlib.blake2b(value.encode(), digest_size=6).hexdigest()}"


def first_line(error: BaseException) -> str:
    """The first line of an error's text, without credentials."""
    return redacted((str(error).splitlines() or [type(error).__name__])[0])


def redacted_values(value: Any) -> Any:
    """Plain data (mappings, sequences, numbers, text) with every text in it redacted, as JSON and YAML take it.

    What is none of these becomes its text. The text of a mapping's entry that is named like a secret is left out.
    """
    if isinstance(value, Mapping):
        return {redacted(str(key)): _entry(str(key), entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [redacted_values(entry) for entry in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return redacted(str(value))


def _entry(name: str, value: Any) -> Any:
    return HIDDEN if isinstance(value, str) and value and _SECRET_NAME.search(name) else redacted_values(value)


def _secrets() -> Iterator[str]:
    """Values of variables that are named like secrets and passwords of URIs in any variable, quoted and plain."""
    for name, value in variables().items():
        found = [value] if _SECRET_NAME.search(name) else []
        if "://" in value:
            with suppress(ValueError):  # no URI after all
                found.append(urlsplit(value).password or "")
        for secret in found:
            for form in (secret, quote(secret, safe=""), unquote(secret)):
                if len(form) >= SHORTEST and form.lower() not in _NO_SECRETS:
                    yield form
