"""Where artefacts are kept, on disks and in object stores, and how they get there whole."""

from nexus_ray.storage.cache_root import cache_root
from nexus_ray.storage.copies import local_directory, local_file
from nexus_ray.storage.digests import digest
from nexus_ray.storage.files import (
    atomic_directory,
    atomic_file,
    make_directory,
    storage_error,
    write_json,
    write_text,
)
from nexus_ray.storage.places import Place, PlaceField, is_remote, place_of
from nexus_ray.storage.reading import (
    exists,
    file_sizes,
    in_parallel,
    member,
    read_bytes,
    read_json,
    read_text,
    remove,
    sha256_file,
    size_of,
    sizes_of,
)
from nexus_ray.storage.retries import retrying

__all__ = [
    "Place",
    "PlaceField",
    "atomic_directory",
    "atomic_file",
    "cache_root",
    "digest",
    "exists",
    "file_sizes",
    "in_parallel",
    "is_remote",
    "local_directory",
    "local_file",
    "make_directory",
    "member",
    "place_of",
    "read_bytes",
    "read_json",
    "read_text",
    "remove",
    "retrying",
    "sha256_file",
    "size_of",
    "sizes_of",
    "storage_error",
    "write_json",
    "write_text",
]
