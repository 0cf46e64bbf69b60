"""URLs that let one who holds no key do one thing with one object, for a short time.

AWS Signature Version 4 in the query, as S3 and the stores that speak its language take it:
https://docs.aws.amazon.com/AmazonS3/latest/API/sigv4-query-string-auth.html.  obstore can sign a method
and a path, but no headers; it is the headers that bind an upload to its length and checksum.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import hmac
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, urlsplit


class CredentialsError(Exception):
    """There is no usable key for the object store; the message says what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """A key of the object store.  Its secret parts are in no repr."""

    access_key_id: str
    secret_access_key: str = field(repr=False)
    session_token: str = field(default="", repr=False)

    @staticmethod
    def from_environment(environment: Mapping[str, str]) -> Credentials:
        """AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, if there is one, AWS_SESSION_TOKEN."""
        try:
            return Credentials(
                access_key_id=environment["AWS_ACCESS_KEY_ID"],
                secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
                session_token=environment.get("AWS_SESSION_TOKEN", ""),
            )
        except KeyError as error:
            raise CredentialsError(
                f"object store: {error.args[0]} is not in the environment; set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, or name a file in blobs.s3.credentials"
            ) from None

    @staticmethod
    def load(path: Path) -> Credentials:
        """A JSON file with access_key_id, secret_access_key and perhaps session_token, mode 0600."""
        try:
            mode = path.stat().st_mode
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CredentialsError(f"blobs.s3.credentials: {path} cannot be read ({error})") from None
        if mode & 0o077:
            raise CredentialsError(
                f"blobs.s3.credentials: {path} has mode {mode & 0o777:04o} but holds a secret; "
                f"run chmod 600 {path}"
            )
        try:
            found = json.loads(text)
            return Credentials(**{name: str(value) for name, value in found.items()})
        except (ValueError, TypeError, AttributeError):
            # What was found is not shown: it is a secret.
            raise CredentialsError(
                f"blobs.s3.credentials: {path} must be a JSON object with access_key_id, "
                "secret_access_key and, if need be, session_token"
            ) from None


def presigned_url(
    url: str,
    *,
    method: str,
    headers: Mapping[str, str],
    credentials: Credentials,
    region: str,
    at: dt.datetime,
    expires_s: int,
) -> str:
    """`url`, which has no query, with a query that lets its holder call `method` with these very headers."""
    parts = urlsplit(url)
    stamp = at.astimezone(dt.UTC).strftime("%Y%m%dT%H%M%SZ")
    scope = f"{stamp[:8]}/{region}/s3/aws4_request"
    signed = {"host": parts.netloc, **{name.lower(): value.strip() for name, value in headers.items()}}
    names = ";".join(sorted(signed))
    query = {
        "X-Amz-Algorithm": "AWS4-HMAC-SHA256",
        "X-Amz-Credential": f"{credentials.access_key_id}/{scope}",
        "X-Amz-Date": stamp,
        "X-Amz-Expires": str(expires_s),
        "X-Amz-SignedHeaders": names,
    }
    if credentials.session_token:
        query["X-Amz-Security-Token"] = credentials.session_token
    asked = "&".join(f"{quote(key, safe='')}={quote(value, safe='')}" for key, value in sorted(query.items()))
    canonical = "\n".join(
        [
            method,
            parts.path,
            asked,
            *(f"{name}:{signed[name]}" for name in sorted(signed)),
            "",
            names,
            "UNSIGNED-PAYLOAD",
        ]
    )
    to_sign = "\n".join(
        ["AWS4-HMAC-SHA256", stamp, scope, hashlib.sha256(canonical.encode()).hexdigest()]
    ).encode()
    key = f"AWS4{credentials.secret_access_key}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    return f"{url}?{asked}&X-Amz-Signature={hmac.digest(key, to_sign, 'sha256').hex()}"
