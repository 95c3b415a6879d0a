"""The export of a run: its folder; exports of rooms and RGB-D folders are made where missing."""

import zlib
from pathlib import Path

from geode_jax.errors import UserError
from geode_jax.exports import Export
from geode_jax.runs.settings import DataSettings, Settings
from geode_jax.runtime.lock import beside, locked
from geode_jax.sources.rgbd.export import VERSION as RGBD_VERSION
from geode_jax.sources.rgbd.export import make_rgbd_export
from geode_jax.sources.rooms.export import PRODUCER, make_rooms


def prepare_export(data: DataSettings) -> Path:
    """Returns the folder of the export, which is made first if it is rooms or an RGB-D folder."""
    folder = export_folder(data)
    makes = data.rgbd or data.export == "rooms"
    if makes and not (folder / "manifest.json").exists():
        with locked(beside(folder), str(folder), wait=True):
            if not (folder / "manifest.json").exists():  # made while this process waited
                _make_export(data, folder)
    elif data.export == "rooms" and not data.rgbd:
        producer = Export(folder).manifest["producer"]
        if producer != PRODUCER:
            raise UserError(
                f"{folder}: made by {producer['commit']}, this is {PRODUCER['commit']}; delete it"
            )
    return folder


def refuse_stand_ins(settings: Settings, export: Export) -> None:
    """Refuses to train on stand-ins for VGGT's tokens of real scenes, unless that is asked for.

    Such tokens are made from the depth that is their target. Rooms have no others, and an RGB-D
    folder that a configuration converts asks for them.

    Raises:
        UserError: the model would see them, and the settings do not allow it.
    """
    data, producer = settings.data, export.manifest["producer"]
    sees = settings.loss.vision and data.vision == "vggt/tokens"
    asked = data.stand_in_tokens or data.rgbd or producer["project"] == PRODUCER["project"]
    if sees and export.manifest["tokens_contain_depth"] and not asked:
        raise UserError(
            f"{export.folder}: its vggt/tokens are no VGGT's but made from the depth that is the "
            f"target: third_party/vggt/export_vggt.py --export {export.folder} --out DIR writes "
            "VGGT's; data.stand_in_tokens=True trains on these"
        )


def _make_export(data: DataSettings, folder: Path) -> None:
    if data.rgbd:
        make_rgbd_export(
            data.rgbd,
            folder,
            intrinsic=data.rgbd_intrinsic or None,
            depth_scale=data.rgbd_depth_scale,
        )
    else:
        make_rooms(folder, scenes=data.rooms_scenes, seed=data.rooms_seed, images=data.rooms_images)


def export_folder(data: DataSettings) -> Path:
    """Returns the folder of a run's export, which may not have been made yet."""
    if data.rgbd:
        source = Path(data.rgbd).resolve()
        what = f"{RGBD_VERSION} {source} {data.rgbd_intrinsic} {data.rgbd_depth_scale}"
        # Another folder of this name, other options or another converter give another export.
        return Path(data.root) / f"rgbd_{source.name}_{zlib.crc32(what.encode()):08x}"
    if data.export == "rooms":
        pictures = f"_i{data.rooms_images}" if data.rooms_images else ""
        return Path(data.root) / f"rooms_{data.rooms_scenes}_s{data.rooms_seed}{pictures}"
    if not data.export:
        raise UserError("config: data.export: this size trains on your export; name its folder")
    return Path(data.export)
