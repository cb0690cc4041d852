"""A Hub on loopback for the real client, with counters and faults for tests."""

from .client import Hub
from .faults import (
    Answer,
    Delay,
    DropDownload,
    DropUpload,
    Faults,
    LoseAnswer,
    Request,
    Run,
    WebPage,
    is_commit,
    is_download_of,
    is_upload,
)
from .repository import Blob, Commit, HubError, Repository
from .server import HubServer, User


__all__ = [
    "Answer",
    "Blob",
    "Commit",
    "Delay",
    "DropDownload",
    "DropUpload",
    "Faults",
    "Hub",
    "HubError",
    "HubServer",
    "LoseAnswer",
    "Repository",
    "Request",
    "Run",
    "User",
    "WebPage",
    "is_commit",
    "is_download_of",
    "is_upload",
]
