"""Tone mapping of HDR clips to the standard range, with numpy.

The result is that of FFmpeg's usual chain ``zscale=t=linear:npl=100,format=gbrpf32le,
zscale=p=bt709,tonemap=hable:desat=0:peak=P,zscale=t=bt709`` (vf_tonemap.c; zimg's gamma.cpp for the
transfer functions), with P the peak in units of 100 cd/m2.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from runner.data.corrections.model import Transfer

if TYPE_CHECKING:
    import numpy as np

# cd/m2 of standard white, which is 1 in linear light here.
WHITE = 100.0
# The peak that is assumed when a clip does not state its own, in cd/m2; HLG's nominal one.
DEFAULT_PEAK = 1000.0

# From BT.2020 to BT.709 primaries (ITU-R BT.2087), in linear light.
_TO_BT709 = (
    (1.6604910, -0.5876411, -0.0728499),
    (-0.1245505, 1.1328999, -0.0083494),
    (-0.0181508, -0.1005789, 1.1187297),
)


def tone_map(image: np.ndarray, transfer: Transfer, peak: float) -> np.ndarray:
    """Bring an HDR picture to the standard range.

    Args:
        image: [H, W, 3] uint16, RGB with BT.2020 primaries, full range.
        transfer: pq (SMPTE ST 2084) or hlg (ARIB STD-B67).
        peak: the brightest light, in cd/m2, which becomes white.

    Returns:
        [H, W, 3] uint8, RGB with BT.709 primaries.
    """
    import numpy as np

    linear = _linear(transfer)[image] @ np.array(_TO_BT709, np.float32).T
    signal = np.maximum(linear.max(-1, keepdims=True), 1e-6)
    linear *= _hable(signal) / _hable(np.array(peak / WHITE, np.float32)) / signal
    # BT.1886, the display's gamma.
    return np.asarray(np.clip(linear, 0, 1) ** np.float32(1 / 2.4) * 255 + 0.5).astype(np.uint8)


@cache
def _linear(transfer: Transfer) -> np.ndarray:
    """Return the linear light of each 16-bit value; 1 is standard white."""
    import numpy as np

    value = np.arange(65536, dtype=np.float64) / 65535
    if transfer == "pq":
        # SMPTE ST 2084, up to 10,000 cd/m2.
        power = value ** (1 / 78.84375)
        light = np.maximum(power - 0.8359375, 0) / (18.8515625 - 18.6875 * power)
        return np.asarray(light ** (1 / 0.1593017578125) * 10_000 / WHITE, np.float32)
    # ARIB STD-B67, with a system gamma of 1.2 for each channel as zimg has it, up to 1,000 cd/m2.
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    scene = np.where(value <= 0.5, value**2 / 3, (np.exp((value - c) / a) + b) / 12)
    return np.asarray(scene**1.2 * 1000 / WHITE, np.float32)


def _hable(x: np.ndarray) -> np.ndarray:
    a, b, c, d, e, f = 0.15, 0.50, 0.10, 0.20, 0.02, 0.30
    return (x * (x * a + b * c) + d * e) / (x * (x * a + b) + d * f) - e / f
