"""f32 to MXFP4 (blocks of 32, OCP's floor scale, nearest even) in numpy and ml_dtypes: the CPU engine's baseline.

Usage: numpy_baseline.py ROWS COLS. Prints JSON. Needs numpy and ml_dtypes (tests/golden/requirements.txt).
"""
import json
import sys
import time

import ml_dtypes
import numpy as np


def quantize(x):
    blocks = x.reshape(-1, 32)
    amax = np.abs(blocks).max(axis=1, keepdims=True)
    exponent = np.frexp(amax)[1] - 1 - 2
    exponent = np.clip(exponent, -127, 127)
    scaled = np.clip(np.ldexp(blocks, -exponent), -6, 6)
    codes = scaled.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    packed = codes[:, 0::2] | (codes[:, 1::2] << 4)
    return packed, (exponent + 127).astype(np.uint8)


rows, cols = int(sys.argv[1]), int(sys.argv[2])
x = np.random.default_rng(0).standard_normal((rows, cols), dtype=np.float32)
quantize(x[:64])
times = []
for _ in range(5):
    start = time.perf_counter()
    quantize(x)
    times.append(time.perf_counter() - start)
print(json.dumps({
    "what": "numpy + ml_dtypes f32→mxfp4 rows nearest",
    "seconds": sorted(times)[len(times) // 2],
    "million_elements_per_second": rows * cols / sorted(times)[len(times) // 2] / 1e6,
    "numpy": np.__version__, "ml_dtypes": ml_dtypes.__version__,
}))
