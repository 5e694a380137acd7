"""Prefixes of S3 buckets, over the asynchronous client that s3fs keeps.

Every request goes through ``S3Store._request``, which repeats it while storage does not answer and turns what botocore
raises into the errors of ``pipelines.storage.base``.
"""

from __future__ import annotations

import asyncio
import functools
import io
import os
from collections.abc import Coroutine, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from http import HTTPStatus
from typing import Any, BinaryIO, ClassVar, NamedTuple, TypeVar, cast

from aiobotocore.session import AioSession
from aiohttp import ClientError as HTTPError
from botocore import exceptions as boto
from botocore.parsers import ResponseParserError
from botocore.utils import parse_timestamp
from fsspec import AbstractFileSystem
from fsspec.spec import AbstractBufferedFile
from s3fs import S3FileSystem

from pipelines.process.environment import variables
from pipelines.process.redaction import redacted
from pipelines.process.retrying import Retries
from pipelines.storage.base import (
    LeftOut,
    ObjectArchived,
    ObjectChanged,
    ObjectDenied,
    ObjectError,
    ObjectMissing,
    ReadResults,
    Request,
    Requests,
    Store,
    StoredObject,
    TransientStorageError,
    check_size,
    is_transient,
    split_scheme,
)
from pspnet_core.errors import ConfigError, PspnetError

T = TypeVar("T")

_S3_CONFIG: Mapping[str, object] = {
    "connect_timeout": 5,
    "read_timeout": 30,
    "max_pool_connections": 64,
    "retries": {"total_max_attempts": 1},  # `Retries` repeats; two layers would multiply
}
_NO_ANSWER = (
    boto.HTTPClientError,
    boto.ConnectionError,
    boto.IncompleteReadError,
    boto.ChecksumError,
    boto.FlexibleChecksumError,
    ResponseParserError,
    HTTPError,
    ConnectionError,
    TimeoutError,
    asyncio.TimeoutError,
)
_RANGE_BUFFER = 1 << 18  # bytes; about what a request costs in time at 100 MB/s
_MISSING_CODES = frozenset({"NoSuchKey", "NotFound", "404"})
_CHANGED_CODES = frozenset({"PreconditionFailed", "412"})
_DEEDS = {"get_object": "read", "list_objects_v2": "list", "put_object": "write", "delete_object": "delete"}
_DENIED_CODES = frozenset({"AccessDenied", "403", "Forbidden"})
_TRANSIENT_CODES = frozenset(
    {"SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout", "RequestTimeoutException"}
    | {"ConditionalRequestConflict", "OperationAborted", "BadDigest", "XAmzContentSHA256Mismatch"}
    | {"Throttling", "ThrottlingException", "RequestThrottled", "RequestLimitExceeded"}
    | {"TooManyRequests", "BandwidthLimitExceeded"}
)
_CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE) for this endpoint"
_REGION = "the bucket is in another region: set AWS_DEFAULT_REGION"
_REMEDIES: Mapping[str, str] = {
    "NoSuchBucket": "there is no such bucket: create it or correct the name",
    "InvalidBucketName": "that is no valid bucket name: correct it",
    "InvalidAccessKeyId": f"the storage does not know this access key: {_CREDENTIALS}",
    "SignatureDoesNotMatch": f"the storage refused the secret key: {_CREDENTIALS}",
    "AuthFailure": f"the storage refused the credentials: {_CREDENTIALS}",
    "InvalidToken": "the storage refused the session token: set AWS_SESSION_TOKEN anew or unset it",
    "ExpiredToken": "the credentials have expired: renew them, then start the same command again",
    "ExpiredTokenException": "the credentials have expired: renew them, then start the same command again",
    "TokenRefreshRequired": "the credentials have expired: renew them, then start the same command again",
    "RequestTimeTooSkewed": "this machine's clock differs from the storage's: set it",
    "PermanentRedirect": _REGION,
    "AuthorizationHeaderMalformed": _REGION,
    "IllegalLocationConstraintException": _REGION,
    "301": _REGION,
    "NotImplemented": "this storage has no conditional requests; use one that honours If-None-Match",
}


class S3Store(Store):
    """A prefix of a bucket, on any server that speaks S3 and honours conditional requests.

    Endpoint, credentials and region come from the standard environment (``AWS_ENDPOINT_URL``,
    ``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ``AWS_PROFILE``, ``AWS_DEFAULT_REGION``...).
    """

    page_keys: ClassVar[int] = 1000  # of one answer to a listing; the most that S3 gives
    parts: ClassVar[int] = 16  # so many folders are enough to be listed at the same time
    asked_for: ClassVar[int] = 3  # objects of which one must be readable, or storage is away
    level_pages: ClassVar[int] = 4  # of what lies in a folder itself; one that holds more is a part as it is

    def __init__(self, root: str, *, field: str, retries: Retries) -> None:
        super().__init__(root, field=field, retries=retries)
        self._bucket, _, prefix = split_scheme(root)[1].partition("/")
        self._prefix = f"{prefix}/" if prefix else ""

    @staticmethod
    def normalise(scheme: str, rest: str) -> str:
        return f"s3://{rest.rstrip('/')}"

    @property
    def filesystem(self) -> AbstractFileSystem:
        return _s3_filesystem(os.getpid(), _aws_environment())

    def _list(self, prefix: str, left_out: LeftOut | None = None) -> Iterator[StoredObject]:
        return self._below(self._prefix + (f"{prefix}/" if prefix else ""))

    def _below(self, folder: str) -> Iterator[StoredObject]:
        """All objects whose full key starts with ``folder``."""
        for page in self._pages(folder):
            yield from self._objects(page)

    def _parts(self, left_out: LeftOut | None) -> Iterator[Iterator[StoredObject]]:
        """Goes down level by level until there are enough folders; pages of a single one come one after the other."""
        folders, whole = [self._prefix], list[str]()
        with ThreadPoolExecutor(self.parts) as pool:
            while folders and len(folders) + len(whole) < self.parts:
                levels = list(pool.map(lambda folder: self._level(folder, left_out), folders))
                whole += [folder for folder, level in zip(folders, levels, strict=True) if level is None]
                folders = [folder for level in levels if level for folder in level.folders]
                yield from (iter(level.objects) for level in levels if level)
        yield from (self._below_or_less(folder, left_out) for folder in (*whole, *folders))

    def _below_or_less(self, folder: str, left_out: LeftOut | None) -> Iterator[StoredObject]:
        """As ``_below``, but what may not be listed is left out."""
        try:
            yield from self._below(folder)
        except ConfigError as error:
            self._leave_out(folder, error, left_out)

    def _level(self, folder: str, left_out: LeftOut | None) -> _Level | None:
        """What lies in a folder itself; None where that is more than is worth knowing."""
        objects: list[StoredObject] = []
        folders: list[str] = []
        try:
            for number, page in enumerate(self._pages(folder, Delimiter="/")):
                if number == self.level_pages:
                    return None
                objects += self._objects(page)
                folders += [entry["Prefix"] for entry in page.get("CommonPrefixes", ())]
        except ConfigError as error:
            self._leave_out(folder, error, left_out)
        return _Level(objects, folders)

    def _leave_out(self, folder: str, error: ConfigError, left_out: LeftOut | None) -> None:
        """Tell of a folder that may not be listed, if somebody listens and it is not the whole; else raise."""
        if left_out is None or folder == self._prefix or not _is_denied(error):
            raise error
        left_out(f"s3://{self._bucket}/{folder}", error)

    def _pages(self, folder: str, **how: str) -> Iterator[Mapping[str, Any]]:
        """The answers to a listing, each but the first asked for while the one before it is used."""
        where = {"Bucket": self._bucket, "Prefix": folder, "MaxKeys": self.page_keys, **how}
        path = folder[len(self._prefix) :].rstrip("/")
        next_page: Future[dict[str, Any]] | None = self._submit(self._request("list_objects_v2", path, where))
        try:
            while next_page is not None:
                page = next_page.result()
                next_page = None
                if page.get("IsTruncated"):
                    more = {**where, "ContinuationToken": page["NextContinuationToken"]}
                    next_page = self._submit(self._request("list_objects_v2", path, more))
                yield page
        finally:
            if next_page is not None:
                next_page.cancel()

    def _objects(self, page: Mapping[str, Any]) -> Iterator[StoredObject]:
        for entry in page.get("Contents", ()):
            yield self._object(entry["Key"][len(self._prefix) :], entry["Size"], entry)

    def _object(self, path: str, size: int, answer: Mapping[str, Any]) -> StoredObject:
        return StoredObject(
            uri=self.uri_of(path),
            key=path,
            etag=answer["ETag"].strip('"'),
            bytes=size,
            modified=answer.get("LastModified"),
        )

    def look_up(self, path: str) -> StoredObject | None:
        try:
            answer = self._call("head_object", path, self._named(path))
        except ObjectMissing:
            return None
        return self._object(path, answer["ContentLength"], answer)

    def _named(self, path: str) -> dict[str, Any]:
        return {"Bucket": self._bucket, "Key": self._prefix + path}

    def _read(self, path: str, etag: str | None, most: int | None = None) -> bytes:
        return self._submit(self._get(path, etag, most)).result()

    def _read_many(self, requests: Requests, threads: int) -> ReadResults:
        return self._submit(self._get_many(requests, threads)).result()

    async def _get_many(self, requests: Requests, threads: int) -> ReadResults:
        # One event loop, not threads: as fast (the time goes into signing and parsing), and simpler to stop.
        free = asyncio.Semaphore(threads)

        async def get(request: Request) -> bytes | Exception:
            try:
                async with free:
                    return await self._get(*request)
            except Exception as error:
                return error

        tasks = [asyncio.ensure_future(get(request)) for request in requests]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _get(self, path: str, etag: str | None, most: int | None = None) -> bytes:
        condition = {} if etag is None else {"IfMatch": f'"{etag}"'}
        return self._body(path, etag, await self._request("get_object", path, {**self._named(path), **condition}, most))

    def _body(self, path: str, etag: str | None, answer: Mapping[str, Any]) -> bytes:
        if etag is not None and answer["ETag"].strip('"') != etag:  # a server that ignores If-Match
            raise ObjectChanged(self.uri_of(path))
        return cast(bytes, answer["Body"])

    def open(self, path: str) -> BinaryIO:
        found = self.look_up(path)
        if found is None:
            raise ObjectMissing(self.uri_of(path), f"there is no object {self.uri_of(path)}")
        return cast(BinaryIO, io.BufferedReader(_Ranges(self, found), _RANGE_BUFFER))

    def read_range(self, path: str, etag: str, start: int, stop: int) -> bytes:
        """Bytes ``start`` to ``stop - 1`` of the version ``etag``; raises as ``read_if``."""
        condition = {"IfMatch": f'"{etag}"', "Range": f"bytes={start}-{stop - 1}"}
        return self._body(path, etag, self._call("get_object", path, {**self._named(path), **condition}))

    def trouble(self) -> Exception | None:
        """A listing is asked for, whose answer says more than that to a HEAD, and a byte of some objects."""
        where = {"Bucket": self._bucket, "Prefix": self._prefix, "MaxKeys": self.asked_for}
        trouble: Exception | None = None
        try:
            for item in self._objects(self._call("list_objects_v2", "", where)):
                try:
                    self.read_range(item.key, item.etag, 0, 1)
                    return None
                except ObjectError:
                    return None
                except TransientStorageError as error:
                    trouble = error
        except ConfigError as error:
            return None if _is_denied(error) else error  # who may read need not be allowed to list
        except PspnetError as error:
            return error
        return trouble

    def put_if_absent(self, path: str, data: bytes) -> bool:
        return self._put(path, data, {"IfNoneMatch": "*"})

    def put_if_match(self, path: str, data: bytes, etag: str) -> bool:
        try:
            # What is there is ours where an earlier attempt's answer was lost.
            return self._put(path, data, {"IfMatch": f'"{etag}"'}) or self.read(path) == data
        except ObjectMissing:
            return False

    def delete(self, path: str) -> None:
        self._call("delete_object", path, self._named(path))

    def _put(self, path: str, data: bytes, condition: Mapping[str, str]) -> bool:
        try:
            self._call("put_object", path, {**self._named(path), "Body": data, **condition})
        except ObjectChanged:
            return False
        return True

    def _submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._client().loop)

    def _call(self, operation: str, path: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return self._submit(self._request(operation, path, arguments)).result()

    def _client(self) -> Any:
        return _s3_client(os.getpid(), _aws_environment())

    async def _request(
        self, operation: str, path: str, arguments: Mapping[str, Any], most: int | None = None
    ) -> dict[str, Any]:
        """One S3 operation, repeated while storage does not answer; a body comes back as bytes, at most so many."""

        async def attempt() -> dict[str, Any]:
            endpoint = "the default endpoint"
            try:
                client = await self._client().set_session()
                endpoint = client.meta.endpoint_url
                answer: dict[str, Any] = await getattr(client, operation)(**arguments)
                if operation == "get_object":
                    async with answer["Body"] as body:
                        check_size(self.uri_of(path), answer["ContentLength"], most)
                        answer["Body"] = await body.read()
                return answer
            except (boto.BotoCoreError, boto.ClientError, ResponseParserError, HTTPError, OSError, ValueError) as error:
                raise self._translate(error, operation, path, endpoint) from error

        return await self.retries.call_async(attempt, is_transient)

    def _translate(self, error: Exception, operation: str, path: str, endpoint: str) -> Exception:
        if isinstance(error, boto.ClientError):
            return self._translate_answer(error, operation, path, endpoint)
        if "CERTIFICATE_VERIFY_FAILED" in str(error):  # of several classes, by the version of the client
            remedy = f"the certificate of {redacted(endpoint)} cannot be verified: set AWS_CA_BUNDLE to its authority's"
            return ConfigError(self.field, self.root, remedy)
        if isinstance(error, _NO_ANSWER):
            return self._unreachable(path, endpoint, type(error).__name__)
        if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError):
            return ConfigError(self.field, self.root, f"no credentials for S3 were found: {_CREDENTIALS}")
        if isinstance(error, boto.ParamValidationError):
            return ConfigError(self.field, self.root, "that is no valid bucket name or key: correct it")
        if isinstance(error, boto.BotoCoreError | ValueError):  # profile, region, endpoint URL
            return ConfigError(self.field, self.root, f"check the AWS_ variables and ~/.aws/config: {error}")
        return error

    def _translate_answer(self, error: boto.ClientError, operation: str, path: str, endpoint: str) -> Exception:
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        uri, deed = self.uri_of(path), _DEEDS.get(operation, "look at")
        of_one = operation in ("get_object", "head_object")
        if code in _MISSING_CODES:
            return ObjectMissing(uri, f"there is no object {uri}")
        if code in _CHANGED_CODES:
            return ObjectChanged(uri)
        if code == "InvalidObjectState":
            return ObjectArchived(uri, f"{uri} is archived: restore it first")
        if code in _DENIED_CODES:
            remedy = f"these credentials may not {deed} it ({code})"
            return ObjectDenied(uri, f"{uri}: {remedy}") if of_one else ConfigError(self.field, uri, remedy)
        if code in _REMEDIES:
            return ConfigError(self.field, self.root, _REMEDIES[code])
        if code in _TRANSIENT_CODES or status >= 500 or status == HTTPStatus.TOO_MANY_REQUESTS:
            return self._unreachable(path, endpoint, code)
        message = error.response.get("Error", {}).get("Message", "")
        if of_one and HTTPStatus.BAD_REQUEST <= status < HTTPStatus.INTERNAL_SERVER_ERROR:  # another key encrypts it
            return ObjectDenied(uri, f"the storage refused to {deed} {uri} ({code}: {message})")
        return ConfigError(self.field, uri, f"the storage refused to {deed} it ({code}: {message})")

    def _unreachable(self, path: str, endpoint: str, reason: str) -> TransientStorageError:
        return TransientStorageError(
            f"{self.uri_of(path)}: no good answer from {redacted(endpoint)} after {self.retries.attempts} attempts "
            f"({reason}): check that the server runs, the network, and AWS_ENDPOINT_URL"
        )


def _is_denied(error: ConfigError) -> bool:
    cause = error.__cause__
    return isinstance(cause, boto.ClientError) and cause.response["Error"]["Code"] in _DENIED_CODES


class _Level(NamedTuple):
    """The objects in a folder itself, and the full prefixes of the folders in it."""

    objects: list[StoredObject]
    folders: list[str]


class _Ranges(AbstractBufferedFile):  # type: ignore[misc]
    """One version of an object as a stream: every read is a conditional range GET."""

    def __init__(self, store: S3Store, found: StoredObject) -> None:
        super().__init__(None, found.key, cache_type="none", size=found.bytes)
        self._store, self._etag = store, found.etag

    def _fetch_range(self, start: int, end: int) -> bytes:
        return self._store.read_range(self.path, self._etag, start, min(end, self.size))


def _aws_environment() -> int:
    """Changes when the settings do, so that a client is never used with credentials of the past."""
    return hash(frozenset(item for item in variables().items() if item[0].startswith("AWS_")))


# A client belongs to one process (a fork must not share its sockets) and to one set of credentials.
@functools.lru_cache(maxsize=4)
def _s3_client(process: int, environment: int) -> Any:
    session = AioSession()
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_parse_time)
    return S3FileSystem(session=session, config_kwargs=dict(_S3_CONFIG), skip_instance_cache=True)


@functools.lru_cache(maxsize=4)
def _s3_filesystem(process: int, environment: int) -> AbstractFileSystem:
    return S3FileSystem(use_listings_cache=False, config_kwargs=dict(_S3_CONFIG), skip_instance_cache=True)


def _parse_time(value: Any) -> datetime:
    """As botocore's own parser, but fast for the ISO form of listings: that was two thirds of their cost."""
    try:
        return datetime.fromisoformat(value.replace("Z", "+00:00"))
    except (AttributeError, ValueError):
        return cast(datetime, parse_timestamp(value))
