"""The inputs of generate.py: float32 arrays that reach every corner, the same in every run."""

from fractions import Fraction

import numpy as np

import exact
from exact import E2M1, E4M3, ELEMS

F32_MAX = float(np.finfo(np.float32).max)


def to_bits(x):
    return np.ascontiguousarray(x, np.float32).view(np.uint32)


def to_f32(bits):
    return np.ascontiguousarray(bits, np.uint32).view(np.float32)


def ulps(x, n):
    """Step positive float32 values by n units in the last place."""
    return to_f32(to_bits(x).astype(np.int64) + n)


def values(elem):
    return np.array([float(v) for v in elem.values()])


def signs(rng, n):
    return rng.choice(np.array([-1, 1], np.float32), n)


def log_uniform(rng, low, high, n):
    """Between 2^low and 2^high (integers). No exp2, whose last bit depends on the machine."""
    return np.ldexp(rng.uniform(1, 2, n), rng.integers(low, high, n))


def blocks(rng):
    """Blocks of 32 finite float32, [n, 32]; each group is there for one kind of corner."""
    rows = []

    def with_amax(amax):
        """A block whose largest magnitude is amax, at a random place with a random sign."""
        u = np.where(rng.random(32) < 0.5, rng.random(32), log_uniform(rng, -12, 0, 32))
        row = (u * float(amax)).astype(np.float32) * signs(rng, 32)
        row[rng.integers(32)] = amax * signs(rng, None)
        rows.append(row)

    def around(values):
        for n in (-1, 0, 1):
            for amax in ulps(np.array(values, np.float32), n):
                with_amax(amax)

    # Gaussian, at exponents over the whole range; then log-uniform within the block.
    rows += [rng.standard_normal(32) * 2.0**e for e in range(-150, 126, 7)]
    rows += [log_uniform(rng, base - span, base, 32) * signs(rng, 32)
             for span in (4, 20, 60, 250) for base in (-100, -40, 0, 20, 90, 127)]
    # amax at powers of two and at max_elem * 2^k, one ulp either side.
    around([2.0**e for e in (-148, -126, -120, -30, -1, 0, 1, 60, 127)])
    around([float(e.max) * 2.0**k for e in ELEMS for k in (-127, -10, 0, 57, 110)])
    # EVEN: from the significand 2 - 2^-(mbits+1) on, rounding carries into the next binade.
    around([(2 - 2.0 ** -(m + 1)) * 2.0**k for m in (1, 2, 3, 6) for k in (-3, 0, 100)])
    # Where the byte goes from 0 to 1, for every emax.
    around([2.0 ** (emax - 126) for emax in (0, 2, 4, 8, 15)])
    # Subnormal amax: the smallest, around 2^-127, the largest, and INT8's EVEN boundary (significand 2 - 2^-7 is
    # 0x7F8000 here; an adder working on the bit pattern would carry from 0x7F0000 on).
    for bits in (1, 2, 3, 0x3FFFFF, 0x400000, 0x400001, 0x7F0000, 0x7F7FFF, 0x7F8000, 0x7FFFFF):
        with_amax(to_f32([bits])[0])
    # f32::MAX once, everywhere, and with alternating signs; zeros; one nonzero among zeros of either sign.
    with_amax(np.float32(F32_MAX))
    rows += [np.full(32, F32_MAX), F32_MAX * np.resize([1.0, -1.0], 32)]
    rows += [np.zeros(32), np.full(32, -0.0), 0.0 * signs(rng, 32)]
    for v in (1.0, -3.1, 1e-45, -1e-40, 2.0**-126, -F32_MAX):
        rows.append(0.0 * signs(rng, 32))
        rows[-1][rng.integers(32)] = v
    # Grids: multiples of a step that makes many exact ties.
    for top, step in ((6, 1 / 4), (6, 1 / 2), (7.5, 1 / 16), (28, 1 / 32), (127, 1 / 2), (448, 1 / 8)):
        n = int(top / step)
        rows += [np.append(rng.integers(-n, n + 1, 31) * step, top) * 2.0**k for k in (-20, 3)]
    x = np.stack([np.asarray(r, np.float32) for r in rows])
    assert np.isfinite(x).all()
    return x


def nonfinite(x):
    """A finite block of x with NaN, Inf or both put in (0 to 7), and zeros with unusual NaNs (8 and 9)."""
    bad = np.repeat(x[len(x) // 2][None], 10, 0)
    nan, inf = np.float32(np.nan), np.float32(np.inf)
    for row, special in zip(bad, ([nan], [-nan], [nan] * 32, [inf], [-inf], [inf] * 32, [inf, nan], [nan, -inf])):
        row[32 - len(special) :] = special
    bad[8:, :] = 0
    bad[8, 31], bad[9, 0] = to_f32([0x7F800001, 0xFFC0ABCD])  # a signalling NaN, a payload
    return bad


def stochastic(rng, elem, n):
    """n values in units of the element format, and 16 random bits for each."""
    r = rng.integers(0, 65536, n)
    r[rng.permutation(n)[: n // 5]] = np.resize([0, 65535, 32767, 32768], n // 5)
    v = values(elem)
    pick = rng.integers(0, len(v) - 1, n)
    base, gap, top, least = v[pick], np.diff(v)[pick], v[-1], v[1]
    kinds = [
        (0.05, base),  # exact
        (0.10, base + gap / 2),  # midpoints
        (0.20, log_uniform(rng, -40, 1, n) * least),  # below the smallest subnormal
        (0.40, log_uniform(rng, elem.emin - elem.mbits, elem.emax + 3, n)),  # log-uniform, to beyond the maximum
        (0.60, rng.uniform(0, 1.2 * top, n)),
        (0.90, base + gap * (1 - (r + 0.5) / 65536)),  # on the threshold of this very r (exact in float32)
        (1.00, log_uniform(rng, -149, 127, n)),  # all of float32
    ]
    x = np.select([np.arange(n) < n * upto for upto, _ in kinds], [k for _, k in kinds]).astype(np.float32)
    x = np.where(x > 0, ulps(x, rng.integers(-1, 2, n) * (x > least / 2)), x) * signs(rng, n)
    x[:6] = to_f32([0, 1 << 31, 1, 1 << 31 | 1, to_bits(F32_MAX)[0], to_bits(-F32_MAX)[0]])
    return x, r


def nvfp4(rng):
    """Tensors [32, 64]. torchao must agree exactly on the first two."""
    normal = rng.standard_normal((32, 64)).astype(np.float32)
    bf16 = to_f32(to_bits(normal) & np.uint32(0xFFFF0000))

    def with_st(x, k):
        """Set one element so that the tensor scale is exactly 2^k."""
        x = x.astype(np.float32)
        x[7, 11] = 2688 * 2.0**k
        assert np.abs(x).max() == x[7, 11]
        return x

    def per_block(a):
        return np.repeat(a, 16, 1).astype(np.float32)

    # 0: random mantissas, normal block scales. 1: block scales that are powers of two (so torchao's reciprocals
    # are exact) and elements that are multiples of a quarter of them (so every tie occurs).
    yield with_st(normal, -9)
    grid = rng.integers(-24, 25, (32, 64)) / 4
    grid[:, ::16] = 6
    yield with_st(grid * per_block(np.ldexp(1.0, rng.integers(-6, 8, (32, 4)))) * 2.0**-5, -5)
    # 2: any tensor scale. 3: block amplitudes over 2^-30..1, so subnormal and vanishing block scales; zero blocks.
    yield np.float32(0.37) * normal
    wide = bf16 * per_block(log_uniform(rng, -30, 0, (32, 4)))
    wide[3, :16], wide[4, :16], wide[5, :32] = 0.0, -0.0, 0.0 * signs(rng, 32)
    yield wide
    # 4: multiples of 1/8, so ties under block scales that are no powers of two. 5: up to f32::MAX.
    yield with_st(np.round(bf16 * 128) / 8, -5)
    yield np.clip(normal / np.abs(normal).max() * np.float32(F32_MAX), -np.float32(F32_MAX), np.float32(F32_MAX))
    # 6: every block scale and every element at a midpoint, or the float32 next to it on either side.
    st = to_f32([exact.f32_bits(Fraction(1, 2688))]).astype(np.float64)
    (sb, sb_mid), (_, elem_mid) = ((v, (v[1:] + v[:-1]) / 2) for v in (values(E4M3), values(E2M1)))
    pick = rng.integers(0x30, 0x7D, 128)
    x = rng.choice(elem_mid, (128, 16)) * sb[pick + rng.integers(0, 2, 128)][:, None] * st
    x[:, 0] = 6 * sb_mid[pick] * st
    x = ulps(x, rng.integers(-1, 2, x.shape)) * signs(rng, x.shape)
    x[77, 5] = 1.0
    yield x.reshape(32, 64)
