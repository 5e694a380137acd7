"""URI -> store: list, read many, put atomically, on local disk, S3 and (for reading) whatever fsspec drives.

The walk: ``open_store`` (opening) looks the scheme of a URI up in ``ATOMIC_SCHEMES`` (base) and returns its ``Store``
(base): ``LocalStore`` (local), ``S3Store`` (s3) or, for any other scheme, the read-only ``DriverStore`` (drivers).
``to_local`` (opening) fetches a file or folder for libraries that know nothing but paths. A new scheme that can be
written is a ``Store`` and one row of ``ATOMIC_SCHEMES``.
"""

from pipelines.storage.base import (
    ATOMIC_SCHEMES,
    THREADS,
    ObjectArchived,
    ObjectChanged,
    ObjectDenied,
    ObjectError,
    ObjectMissing,
    ObjectTooLarge,
    Store,
    StoredObject,
    TransientStorageError,
)
from pipelines.storage.opening import open_store, to_local

__all__ = [
    "ATOMIC_SCHEMES",
    "THREADS",
    "ObjectArchived",
    "ObjectChanged",
    "ObjectDenied",
    "ObjectError",
    "ObjectMissing",
    "ObjectTooLarge",
    "Store",
    "StoredObject",
    "TransientStorageError",
    "open_store",
    "to_local",
]
