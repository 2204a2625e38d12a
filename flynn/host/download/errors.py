"""Why a download failed.

DownloadFailed
  NoTrust       this host has no root to trust, or is given another than it has
  Refused       what the repository serves is not what its signatures promise; `reason` says in which way
  NotReleased   the signed list of files does not have it
  Unavailable   it could not be fetched; trying later may help
"""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """What kind of attack (or neglect of the repository) a refusal prevents."""

    SIGNATURE = "not signed by enough trusted keys"
    EXPIRED = "expired: nobody keeps the repository, or somebody keeps what is newer from this host"
    ROLLBACK = "older than what this host has seen before, or not the version that was announced"
    MISMATCH = "not the content that was signed"
    ENDLESS = "larger than what was signed"
    SLOW = "comes too slowly to be meant seriously"
    MALFORMED = "not what a repository serves"


class DownloadFailed(Exception):
    """Something was not downloaded."""


class NoTrust(DownloadFailed):
    """There is no root to trust."""


class NotReleased(DownloadFailed):
    """The repository has no such file, by its signed list."""


class Unavailable(DownloadFailed):
    """The repository does not answer, or not with what was asked for."""


class Refused(DownloadFailed):
    """The repository answered, and the answer must not be used."""

    def __init__(self, reason: Reason, what: str, detail: str) -> None:
        super().__init__(f"{what} refused, {reason} ({detail})")
        self.reason = reason
