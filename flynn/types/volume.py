"""Volumes: the controller's record, and the host's. See spec/host section 12 and spec/controller section 5.9."""

from __future__ import annotations

from datetime import datetime

from flynn.types.codec import Json, Wire, always, zero_time

# Metadata keys of a volume that hosts read or write.
META_QUOTA = "flynn.quota"  # bytes; what a creator may ask for
META_SNAPSHOT_OF = "flynn.snapshot-of"
META_CLONE_OF = "flynn.clone-of"
META_DELETE_ON_STOP = "flynn-controller.delete_on_stop"


class Volume(Wire):
    """A volume in the controller's books."""

    id: str = always("")
    host_id: str = always("")
    type: str = always("")
    state: str = always("")  # pending, created, destroyed
    path: str = ""
    delete_on_stop: bool = False
    app: str = ""
    release: str = ""
    job: str | None = None
    job_type: str = ""
    meta: dict[str, str] = {}
    created_at: datetime | None = None
    updated_at: datetime | None = None
    decommissioned_at: datetime | None = None


class VolumeInfo(Wire):
    """A volume on a host."""

    id: str = always("")
    type: str = always("")  # data, squashfs or ext2
    meta: dict[str, str] = {}
    created_at: datetime = zero_time()


class VolumeEvent(Wire):
    type: str  # create or destroy
    volume: VolumeInfo


class VolumeRequest(Wire):
    """Body of `POST /storage/providers/<id>/volumes`: the parts of a VolumeInfo that a caller may choose."""

    id: str = ""
    type: str = ""
    meta: dict[str, str] = {}


class ProviderSpec(Wire):
    id: str = always("")
    kind: str = always("")
    metadata: Json = None


class ProviderStatus(Wire):
    """How a host's storage for volumes is; part of the host's status."""

    id: str = always("")
    kind: str = always("")
    volumes: int = always(0)
    size_bytes: int = always(0)  # 0 = not known
    free_bytes: int = always(0)
    trouble: str = ""  # why it cannot be used, or not for long


class PullCoordinate(Wire):
    host_id: str = always("")
    snapshot_id: str = always("")
