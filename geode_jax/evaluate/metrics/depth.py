"""Depth errors over valid pixels (Sec. IV-A): RMSE, MAE and the share with delta < 1.25."""

import numpy as np


class DepthMetrics:
    """Accumulates depth errors over batches, every valid pixel with the same weight.

    A pixel is valid where the target is finite and positive (0 is "unknown" in the array contract)
    and the optional mask is True. A prediction that is not finite counts: RMSE and MAE become NaN
    or infinite, and it fails the delta test, as does a prediction <= 0.
    """

    def __init__(self):
        self.pixels = 0
        self._squared = 0.0
        self._absolute = 0.0
        self._inside = 0

    def update(self, prediction, target, mask=None) -> None:
        """Adds a batch; see `measure`."""
        self.add(*self.measure(prediction, target, mask))

    @staticmethod
    def measure(prediction, target, mask=None) -> tuple[int, float, float, int]:
        """Returns the number of valid pixels, the sums of e^2 and |e|, the number inside delta.

        Args:
          prediction: [...] metres (or the export's scene units), any shape.
          target: the same shape and unit, 0 or non-finite where unknown.
          mask: optional bool, broadcast to that shape; False excludes.

        Raises:
          ValueError: the shapes of prediction and target differ.
        """
        prediction = np.asarray(prediction, np.float64)
        target = np.asarray(target, np.float64)
        if prediction.shape != target.shape:
            raise ValueError(f"depth: prediction {prediction.shape} but target {target.shape}")
        valid = np.isfinite(target) & (target > 0)
        if mask is not None:
            valid &= np.asarray(mask, bool)
        prediction, target = prediction[valid], target[valid]

        with np.errstate(over="ignore"):  # errors too large for float64 become infinite
            error = prediction - target
            # max(p/t, t/p) < 1.25 without dividing by a prediction of 0.
            inside = int(np.sum((prediction < 1.25 * target) & (target < 1.25 * prediction)))
            return error.size, float(np.sum(error**2)), float(np.sum(np.abs(error))), inside

    def add(self, pixels: int, squared: float, absolute: float, inside: int) -> None:
        """Adds the results of `measure`."""
        self.pixels += pixels
        self._squared += squared
        self._absolute += absolute
        self._inside += inside

    def result(self) -> dict[str, float]:
        """Returns `depth_rmse`, `depth_mae` (in the unit of the input) and `depth_delta1`.

        The result is empty without a valid pixel.
        """
        if not self.pixels:
            return {}
        return {
            "depth_rmse": float(np.sqrt(self._squared / self.pixels)),
            "depth_mae": self._absolute / self.pixels,
            "depth_delta1": self._inside / self.pixels,
        }
