"""Poses of RGB-D sequences."""

import numpy as np
import pytest

from geode_jax.sources.rgbd.sequence import Dropped, pose_of_row, rigid


@pytest.mark.parametrize("quaternion", [(0, 0, 0, 0), (1e-200, 0, 0, 0), (1e200, 0, 0, 1)])
def test_a_quaternion_without_a_direction_has_no_rotation(quaternion):
    pose = pose_of_row((1.0, 2.0, 3.0, *quaternion))
    assert np.isnan(pose[:3, :3]).all() and pose[:3, 3].tolist() == [1, 2, 3]
    with pytest.raises(Dropped, match="pose not finite"):
        rigid(pose)
