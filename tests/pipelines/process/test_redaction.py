"""No credential survives ``redacted``, wherever in a text it stands; everything else does."""

import os
import string
from unittest.mock import patch
from urllib.parse import quote

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pipelines.process.redaction import HIDDEN, holds_password, redacted, redacted_values, without_secrets

SECRETS = st.text(string.ascii_letters + string.digits + "+/=_-.~!$", min_size=8, max_size=40)
WORDS = st.text(string.ascii_lowercase + " ,:'", max_size=20)

URIS = (
    "http://user:{secret}@mlflow.example:5000/api",
    "s3://AKIAEXAMPLE:{secret}@bucket/folder",
    "postgresql+psycopg://mlflow:{secret}@db.example/runs?sslmode=require",
    "https://{plain}@git.example/project.git",
    "https://bucket.example/key?X-Amz-Credential=a&X-Amz-Signature={plain}&x=1",
    "https://account.example/key?sv=2024&sig={plain}",
    "https://host.example/?access_token={plain}#part",
    "https://bucket.example/key?AWSAccessKeyId=a&Signature={plain}&x-amz-security-token={plain}&Expires=1",
    "https://bucket.example/key?x-oss-date=1&x-oss-signature={plain}",
)
VARIABLES = ["AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD"]
VARIABLES += ["MLFLOW_TRACKING_TOKEN", "AZURE_STORAGE_KEY", "OPENAI_API_KEY", "MY_SECRET"]


@given(secret=SECRETS, before=WORDS, after=WORDS, uri=st.sampled_from(URIS))
def test_no_credential_of_a_uri_survives(secret: str, before: str, after: str, uri: str) -> None:
    # A slash right after digits is a port and a path, to every client; and no client reads an unquoted = ? & there.
    plain = quote(secret, safe="")
    given_secret = secret if "{secret}" in uri else plain
    assume(not secret.split("/")[0].isdecimal())
    bare = uri.format(secret="", plain="")
    assume(given_secret not in before + bare + after)
    text = f"{before} {uri.format(secret=secret, plain=plain)} {after}"
    shown = redacted(text)
    assert given_secret not in shown
    assert HIDDEN in shown
    assert shown.startswith(before) and shown.endswith(after)


@given(secret=SECRETS, before=WORDS, after=WORDS, name=st.sampled_from(VARIABLES), encoded=st.booleans())
def test_no_value_of_a_secret_variable_survives(secret: str, before: str, after: str, name: str, encoded: bool) -> None:
    assume(secret not in before + after)
    with patch.dict(os.environ, {name: secret}, clear=True):
        shown = redacted(before + (quote(secret, safe="") if encoded else secret) + after)
    assert shown == before + HIDDEN + after


def test_the_password_of_the_servers_uri_is_hidden_where_it_stands_alone() -> None:
    with patch.dict(os.environ, {"MLFLOW_TRACKING_URI": "https://me:p4ss%2Fw0rd@host.example"}, clear=True):
        assert redacted("wrong password p4ss/w0rd for me") == f"wrong password {HIDDEN} for me"


@pytest.mark.parametrize(
    "text",
    [
        "models:/street@champion",
        "http://127.0.0.1:5000/api@v2",
        "s3://bucket/images/train?prefix=a",
        "git@host.example:project.git",
        "/data/user@home/images",
        "design=flat; 3 tokens, a keyed lock",
        "sqlite:////home/me/.pspnet/mlflow.db",
    ],
)
def test_what_is_no_credential_stays(text: str) -> None:
    with patch.dict(os.environ, {"TOKENIZERS_PARALLELISM": "false", "USE_TOKEN": "true", "PIN_TOKEN": "1"}, clear=True):
        assert redacted(text) == text
        assert redacted("true and false, 1 of 1") == "true and false, 1 of 1"


def test_plain_data_is_redacted_inside() -> None:
    plain = {"empty_token": "", "key": "train/0001", "number": 3, "none": None}
    secret = {
        "data": "s3://a:bcdefgh1@bucket",
        "password": "hunter2222",
        "nested": [{"uri": ("https://x:yyyyyyyy@h/",)}],
    }
    hidden = {"data": f"s3://{HIDDEN}@bucket", "password": HIDDEN, "nested": [{"uri": [f"https://{HIDDEN}@h/"]}]}
    assert redacted_values(plain | secret) == plain | hidden


@given(secret=SECRETS, other=SECRETS, uri=st.sampled_from(URIS))
def test_a_uri_without_secrets_still_tells_one_from_another(secret: str, other: str, uri: str) -> None:
    assume(secret != other and not secret.split("/")[0].isdecimal())
    quoted, others = quote(secret, safe=""), quote(other, safe="")
    bare = uri.format(secret="", plain="")
    assume(quoted not in bare)
    shown = without_secrets(uri.format(secret=quoted, plain=quoted))
    assert quoted not in shown
    if "?" in uri and uri.startswith("https://"):
        stays = "ignature=" in uri or "sig=" in uri  # when it is signed anew
        assert (shown == without_secrets(uri.format(secret=others, plain=others))) is stays
    else:
        assert holds_password(uri.format(secret=quoted, plain=quoted))


@pytest.mark.parametrize(
    "uri",
    [
        "/data/a@b:c/d?token=1.jpg",
        "s3://bucket/a:b@c?token=1.jpg",
        "https://host:8080/a@b.jpg?width=3",
        "sftp://me@host:22/a@b.jpg",
        "memory://a/b:c@d",
        "http://[fd00::1]:8080/photo@2x.jpg",
        "s3://arn:aws:s3:eu-west-1:1234:accesspoint/a/photo@2x.jpg",
        "https://host/get?key=photos/1.jpg&author=bob&keyword=cat",
        "https://host/x?st=paris&sip=9",
        "a:b@c.jpg",
    ],
)
def test_what_holds_no_secret_stays_as_it_is(uri: str) -> None:
    assert not holds_password(uri)
    assert without_secrets(uri) == uri
