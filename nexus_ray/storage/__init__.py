"""Where artefacts are kept, on disks and in object stores, and how they get there whole."""

from nexus_ray.storage.files import (
    atomic_directory,
    atomic_file,
    digest,
    make_directory,
    read_json,
    sha256_file,
    storage_error,
    write_json,
    write_text,
)
from nexus_ray.storage.places import Place, PlaceField, is_remote, place_of

__all__ = [
    "Place",
    "PlaceField",
    "atomic_directory",
    "atomic_file",
    "digest",
    "is_remote",
    "make_directory",
    "place_of",
    "read_json",
    "sha256_file",
    "storage_error",
    "write_json",
    "write_text",
]
