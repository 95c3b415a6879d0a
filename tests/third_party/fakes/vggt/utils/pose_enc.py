"""absT_quaR_FoV to matrices."""

import torch
from scipy.spatial.transform import Rotation


def pose_encoding_to_extri_intri(encoding, image_size_hw):
    """[1, S, 9] -> camera-from-world [1, S, 3, 4] and intrinsics [1, S, 3, 3]."""
    rotation = torch.tensor(Rotation.from_quat(encoding[0, :, 3:7].numpy()).as_matrix())
    extrinsic = torch.cat([rotation, encoding[0, :, :3, None]], dim=-1)
    h, w = image_size_hw
    intrinsic = torch.zeros(len(extrinsic), 3, 3)
    intrinsic[:, 0, 0] = w / 2 / torch.tan(encoding[0, :, 8] / 2)
    intrinsic[:, 1, 1] = h / 2 / torch.tan(encoding[0, :, 7] / 2)
    intrinsic[:, 0, 2], intrinsic[:, 1, 2], intrinsic[:, 2, 2] = w / 2, h / 2, 1
    return extrinsic[None].float(), intrinsic[None]
