"""Golden vectors for the `microscaling` crate: `python generate.py` rewrites the .safetensors files beside it.

Every vector comes from a published implementation of the OCP Microscaling (MX) v1.0 formats (ml_dtypes, gfloat,
torchao) or from the definitions in exact.py, and wherever two of them can be compared the comparison is asserted:
regenerating is itself a test. float32 data is stored as its uint32 bit pattern. Where torchao's float arithmetic
departs from the definition its output is stored as it is, beside the exact one; the departures are classified,
counted and printed, and any of another kind fails an assertion.
"""

import json
import os
import platform
import struct
from fractions import Fraction as F
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

# torch's vectorised log2, which torchao's RCEIL uses, may differ in the last bit between instruction sets; the
# baseline kernels make the output independent of the machine. To be set before torch is imported.
os.environ["ATEN_CPU_CAPABILITY"] = "default"

import gfloat
import gfloat.formats as gff
import ml_dtypes
import numpy as np
import safetensors.numpy
import torch
from gfloat import RoundMode
from torchao.prototype.mx_formats import mx_tensor, nvfp4_tensor
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.kernels import unpack_uint4
from torchao.prototype.mx_formats.utils import to_blocked

import exact
import inputs
from exact import E2M1, E4M3, ELEMS, FLOATS, INT8, MODES, pow2
from inputs import F32_MAX, to_bits, to_f32, ulps

QNAN = np.uint32(0x7FC00000)
GFLOAT = {e: getattr(gff, f"format_info_ocp_{e.name}") for e in ELEMS}
ML_DTYPES = dict(zip(FLOATS, (ml_dtypes.float4_e2m1fn, ml_dtypes.float6_e2m3fn, ml_dtypes.float6_e3m2fn,
                              ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)))
TORCHAO = dict(zip(FLOATS, (torch.float4_e2m1fn_x2, mx_tensor.DTYPE_FP6_E2M3, mx_tensor.DTYPE_FP6_E3M2,
                            torch.float8_e4m3fn, torch.float8_e5m2)))


def frac(x):
    return F(float(x))


# ------------------------------------------------------------ oracles


@lru_cache(maxsize=None)
def decode_table(elem):
    """float32 of every code: ml_dtypes == gfloat == the definition (INT8: gfloat == two's complement / 64)."""
    codes = np.arange(1 << elem.bits, dtype=np.uint8)
    table = codes.view(np.int8) / np.float32(64) if elem is INT8 else codes.view(ML_DTYPES[elem]).astype(np.float32)
    other = np.array([gfloat.decode_float(GFLOAT[elem], int(c)).fval for c in codes], np.float32)
    table, other = (to_f32(np.where(np.isnan(t), QNAN, to_bits(t))) for t in (table, other))
    values = elem.values()
    assert np.array_equal(to_bits(table), to_bits(other)) and [frac(v) for v in table[: len(values)]] == values
    return table


def encode(elem, x, mode=RoundMode.TiesToEven, **random):
    """gfloat's rounding and encoding of finite float32, saturating; to nearest even also as ml_dtypes does it.

    gfloat's INT8 reaches -2.0 (code -128); the crate saturates symmetrically, hence the limit after rounding."""
    top = np.float32(elem.max)
    rounded = gfloat.round_ndarray(GFLOAT[elem], x.astype(np.float64), mode, sat=True, **random)
    assert elem is INT8 or np.abs(rounded).max() <= top
    codes = gfloat.encode_ndarray(GFLOAT[elem], np.clip(rounded, -top, top)).astype(np.uint8)
    if mode == RoundMode.TiesToEven:
        clamped = np.clip(x, -top, top)  # ml_dtypes does not saturate E4M3 and E5M2
        other = np.rint(clamped * 64).astype(np.int8) if elem is INT8 else clamped.astype(ML_DTYPES[elem])
        assert np.array_equal(codes, other.view(np.uint8))
    return codes


def torchao_mx(elem, mode, x):
    """torchao's to_mx: (E8M0 bytes, one code a byte)."""
    scale, data = mx_tensor.to_mx(torch.from_numpy(x), TORCHAO[elem], 32, ScaleCalculationMode[mode.upper()])
    data = unpack_uint4(data) if elem is E2M1 else data
    return scale.view(torch.uint8).numpy().reshape(-1), data.view(torch.uint8).numpy().reshape(x.shape)


# ------------------------------------------------------------ elements.safetensors


def elements():
    out = {}
    e8m0 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    other = [gfloat.decode_float(gff.format_info_ocp_e8m0, b).fval for b in range(256)]
    assert np.array_equal(e8m0, np.array(other, np.float32), equal_nan=True) and np.isnan(e8m0[255])
    assert [frac(v) for v in e8m0[:255]] == [pow2(b - 127) for b in range(255)]
    out["decode.e8m0"] = np.where(np.isnan(e8m0), QNAN, to_bits(e8m0))

    bf16 = to_f32(np.arange(65536, dtype=np.uint32) << 16)
    out["bf16.valid"] = np.isfinite(bf16).astype(np.uint8)
    for elem in ELEMS:
        out[f"decode.{elem.name}"] = to_bits(decode_table(elem))
        # Inf gives the saturated code, NaN the marker 0xFF; `bf16.valid` is 0 for both.
        codes = encode(elem, np.clip(np.nan_to_num(bf16, nan=0, posinf=F32_MAX, neginf=-F32_MAX), -F32_MAX, F32_MAX))
        out[f"bf16.{elem.name}"] = np.where(np.isnan(bf16), np.uint8(0xFF), codes)

        values = np.array([float(v) for v in elem.values()], np.float32)
        mids, top = (values[1:] + values[:-1]) / 2, values[-1:]
        assert all(frac(m) == (frac(a) + frac(b)) / 2 for m, a, b in zip(mids, values, values[1:]))
        x = [mids, ulps(mids, -1), ulps(mids, 1), values, ulps(top, 1), 2 * top, ulps(np.zeros(1), 1), [F32_MAX]]
        x = np.concatenate(x, dtype=np.float32)
        x = np.concatenate([x, -x])
        codes = encode(elem, x)
        for v, c in zip(x, codes):  # the definition and gfloat's scalar functions say the same
            scalar = max(gfloat.round_float(GFLOAT[elem], float(v), sat=True), -float(elem.max))
            assert elem.code(abs(frac(v)), np.signbit(v)) == c == gfloat.encode_float(GFLOAT[elem], scalar)
        out[f"midpoints.{elem.name}.x"], out[f"midpoints.{elem.name}.code"] = to_bits(x), codes
    return out


# ------------------------------------------------------------ blocks.safetensors


def blocks():
    x = inputs.blocks(np.random.default_rng(1))
    out = {"x": to_bits(x)}
    magnitude, negative = [[abs(frac(v)) for v in row] for row in x], np.signbit(x)

    @lru_cache(maxsize=None)
    def codes(elem, i, scale):
        return [elem.code(v / scale, s) for v, s in zip(magnitude[i], negative[i])]

    print(f"blocks: {len(x)}; those where torchao is not exact:")
    for elem in ELEMS:
        for mode in MODES:
            key = f"{elem.name}.{mode}"
            byte = np.array([exact.scale_byte(elem, mode, max(m)) for m in magnitude], np.uint8)
            code = np.array([codes(elem, i, pow2(int(b) - 127)) for i, b in enumerate(byte)], np.uint8)
            out |= {f"{key}.exact_scale": byte, f"{key}.exact_code": code}
            if elem is INT8:  # not in torchao
                continue
            ao_byte, ao_code = out[f"{key}.scale"], out[f"{key}.code"] = torchao_mx(elem, mode, x)
            # Two kinds of departure. Byte 0: torchao divides by 2^-126 though the byte says 2^-127 (RCEIL: by 1).
            # Scale: RCEIL's ceil(log2(amax / max)) in float32 loses a small excess over a power of two, in the
            # quotient or in the logarithm, and the byte is one too small.
            divisor = [pow2(int(b) - 127) if b else F(1) if mode == "rceil" else pow2(-126) for b in ao_byte]
            assert ao_code.tolist() == [codes(elem, i, d) for i, d in enumerate(divisor)]
            scale, zero = ao_byte != byte, (ao_byte == byte) & (ao_code != code).any(1)
            assert np.all(byte[zero] == 0)
            for i in np.flatnonzero(scale):
                excess = max(magnitude[i]) / elem.max / pow2(int(ao_byte[i]) - 127) - 1
                assert mode == "rceil" and ao_byte[i] == byte[i] - 1 and 0 < excess < pow2(-17)
            print(f"  {key:10}  byte 0: {zero.sum():2} of {(byte == 0).sum():2}  scale: {scale.sum():2}")
        gfloat_blocks(elem, x, out)

    # NaN gives byte 255 in torchao. It does not look for Inf, whose exponent field 128 gives 128 - emax: byte 253.
    bad = inputs.nonfinite(x)
    out["nonfinite.x"], out["nonfinite.torchao_scale"] = to_bits(bad), torchao_mx(E2M1, "floor", bad)[0]
    assert np.array_equal(out["nonfinite.torchao_scale"], np.where(np.isnan(bad).any(1), 255, 253))
    return out


def gfloat_blocks(elem, x, out):
    """gfloat's quantize_block with compute_scale_amax is FLOOR: the same bytes, and the values of the same codes."""
    info = next(b for b in gff.all_block_formats if b.etype is GFLOAT[elem])
    rows = x.astype(np.float64)  # float32 would make its floor(log2(amax)) wrong just below a power of two
    scale = np.array([gfloat.compute_scale_amax(elem.emax, r) for r in rows])
    value = np.stack([gfloat.quantize_block(info, r, gfloat.compute_scale_amax) for r in rows])
    byte, code = out[f"{elem.name}.floor.exact_scale"], out[f"{elem.name}.floor.exact_code"]
    assert np.array_equal(scale, 2.0 ** (byte - 127.0))
    differs = decode_table(elem)[code] * scale[:, None] != value
    # INT8: gfloat goes down to the code -128 where the crate stops at -127.
    assert not differs.any() or elem is INT8 and np.all(code[differs] == 0x81)
    assert np.all((value / scale[:, None])[differs] == -2)
    with np.errstate(over="ignore"):  # -128 under the byte 254 is -2^128
        bits = to_bits(value)
    assert np.array_equal(to_f32(bits).astype(np.float64), np.where(np.abs(value) < 2.0**128, value, -np.inf))
    assert np.array_equal(np.signbit(value) & (value == 0), (code == 1 << (elem.bits - 1)))  # signed zeros
    out[f"{elem.name}.gfloat.scale"], out[f"{elem.name}.gfloat.value"] = byte, bits
    if elem is INT8:
        print(f"  int8.gfloat gives the code -128 to {differs.sum()} elements in {differs.any(1).sum()} blocks")


# ------------------------------------------------------------ stochastic.safetensors


def stochastic():
    """gfloat's StochasticFast with 16 random bits, checked against its exact condition."""
    rng, out = np.random.default_rng(2), {}
    for elem in ELEMS:
        x, r = inputs.stochastic(rng, elem, 3000)
        codes = encode(elem, x, RoundMode.StochasticFast, srbits=r, srnumbits=16)
        for v, ri, c in zip(x, r.tolist(), codes):
            assert c == exact.stochastic_code(elem, abs(frac(v)), np.signbit(v), ri)
            scalar = gfloat.round_float(GFLOAT[elem], float(v), RoundMode.StochasticFast, True, ri, 16)
            assert c == gfloat.encode_float(GFLOAT[elem], max(scalar, -float(elem.max)))
        out |= {f"x.{elem.name}": to_bits(x), f"r.{elem.name}": r.astype(np.uint16), f"code.{elem.name}": codes}
    return out


# ------------------------------------------------------------ nvfp4.safetensors


def nvfp4():
    rng, out, agree = np.random.default_rng(3), {}, []

    def near_tie(v, elem):
        return len({exact.rne(v * (1 + d), elem.mbits, elem.emin) for d in (-pow2(-21), pow2(-21))}) == 2

    print("nvfp4: where torchao is not exact:")
    for t, x in enumerate(inputs.nvfp4(rng)):
        amax = np.abs(x).max()
        st = to_f32([exact.f32_bits(frac(amax) / 2688)])
        ao_st = nvfp4_tensor.per_tensor_amax_to_scale(torch.tensor([amax]))
        assert x.dtype == np.float32 and 2.0**-126 <= st[0] == ao_st.item()
        rows, fst = x.reshape(-1, 16), frac(st[0])
        quotient = [frac(a) / (6 * fst) for a in np.abs(rows).max(1)]
        sb = [exact.nvfp4_block_scale(q) for q in quotient]
        byte = np.array([E4M3.code(s, False) for s in sb], np.uint8)
        scaled = [[abs(frac(v)) / (s * fst) if s else F(0) for v in r] for r, s in zip(rows, sb)]
        code = np.array([[E2M1.code(v, n) for v, n in zip(*r)] for r in zip(scaled, np.signbit(rows))], np.uint8)
        ao_byte, ao_code = nvfp4_tensor.nvfp4_quantize(torch.from_numpy(x), 16, ao_st)
        ao_byte, ao_code = ao_byte.view(torch.uint8).numpy().reshape(-1), unpack_uint4(ao_code).numpy().reshape(-1, 16)
        out |= {f"t{t}.x": to_bits(x), f"t{t}.st": to_bits(st)}
        out |= {f"t{t}.exact_scale": byte.reshape(32, 4), f"t{t}.exact_code": code.reshape(32, 64)}
        out |= {f"t{t}.torchao_scale": ao_byte.reshape(32, 4), f"t{t}.torchao_code": ao_code.reshape(32, 64)}
        if np.array_equal(byte, ao_byte) and np.array_equal(code, ao_code):
            agree.append(t)
        # Departures: torchao's block scale is at least 2^-6, the smallest normal, also for zero blocks (least); its
        # two float32 divisions may cross an E4M3 midpoint (scale); x * ((1/st)/sb) may cross one of E2M1 (code).
        small = np.array([q < pow2(-6) for q in quotient])
        least, scale = small & (byte != ao_byte), ~small & (byte != ao_byte)
        assert np.all(ao_byte[small] == 0x08) and all(near_tie(quotient[i], E4M3) for i in np.flatnonzero(scale))
        wrong = np.argwhere((code != ao_code) & (byte == ao_byte)[:, None])
        assert all(near_tie(scaled[i][j], E2M1) for i, j in wrong)
        least_codes = (code != ao_code)[least].any(1).sum()
        print(f"  t{t}: least {least.sum()} blocks ({least_codes} with other codes, {quotient.count(0)} zero), "
              f"scale {scale.sum()} blocks, code {len(wrong)} elements under the same scale")
    assert agree[:2] == [0, 1]

    # Dequantisation: elem * sb * st rounded once to float32, half of the tensor scales near the ends of the range.
    n = 2000
    code, sb = rng.integers(0, 16, n), rng.integers(0, 0x7F, n)
    field = [rng.integers(1, 8, n), rng.integers(246, 255, n)] + 2 * [rng.integers(1, 255, n)]
    field = np.choose(rng.integers(0, 4, n), field)
    st = (field << 23 | rng.integers(0, 1 << 23, n)).astype(np.uint32)
    factors = [decode_table(E2M1)[code], decode_table(E4M3)[sb], to_f32(st)]
    value = [exact.f32_bits(abs(frac(a)) * frac(b) * frac(c), np.signbit(a)) for a, b, c in zip(*factors)]
    value = np.array(value, np.uint32)
    with np.errstate(over="ignore"):  # in float64 the product is exact (2 + 4 + 24 bits) and its cast the one rounding
        assert np.array_equal(to_bits(np.prod(np.array(factors, np.float64), 0)), value)
    exponent = value >> 23 & 0xFF
    assert (exponent == 255).sum() > 50 and ((exponent == 0) & (to_f32(value) != 0)).sum() > 50
    out |= {"decode.code": code.astype(np.uint8), "decode.sb": sb.astype(np.uint8)}
    out |= {"decode.st": st, "decode.value": value}
    return out, {"agree": ",".join(map(str, agree))}


# ------------------------------------------------------------ orders of scales

SHAPES = [(128, 4), (256, 8), (1, 1), (130, 9), (33, 12), (384, 3), (100, 17)]


def layouts():
    """Random bytes [lines, groups], torchao's 128x4 order, and the 32x8 one as the permutation that AMD publishes."""
    out, rng = {}, np.random.default_rng(11)
    for rows, cols in SHAPES:
        x = rng.integers(0, 256, (rows, cols), dtype=np.uint8)
        tiled = to_blocked(torch.from_numpy(x)).numpy()
        # Every byte is there, and what was added is zero.
        assert np.array_equal(np.sort(tiled)[-x.size:], np.sort(x.ravel())) and not np.sort(tiled)[: tiled.size - x.size].any()
        padded = np.pad(x, ((0, -rows % 32), (0, -cols % 8)))
        view = padded.reshape(padded.shape[0] // 32, 2, 16, padded.shape[1] // 8, 2, 4)
        name = f"{rows}x{cols}"
        out |= {f"{name}.rows": x, f"{name}.128x4": tiled, f"{name}.32x8": view.transpose(0, 3, 5, 2, 4, 1).ravel()}
    return out


# ------------------------------------------------------------ writing


def write(name, tensors, extra=()):
    meta = {m: version(m) for m in ("gfloat", "ml_dtypes", "numpy", "torch", "torchao")}
    meta |= {"python": platform.python_version(), "command": "python generate.py"} | dict(extra)
    assert all(a.dtype in (np.uint8, np.uint16, np.uint32) for a in tensors.values())
    blob = safetensors.numpy.save({k: np.ascontiguousarray(a) for k, a in tensors.items()}, metadata=meta)
    # The library writes the metadata in random order; sorted, the same data always give the same bytes.
    size = struct.unpack("<Q", blob[:8])[0]
    header = json.loads(blob[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode().ljust(size)
    blob = blob[:8] + text + blob[8 + size :]
    read = safetensors.numpy.load(blob)
    assert len(text) == size and read.keys() == tensors.keys()
    assert all(np.array_equal(read[k], a) for k, a in tensors.items())
    Path(__file__).with_name(name).write_bytes(blob)
    print(f"{name}: {len(tensors)} tensors, {len(blob)} bytes")


if __name__ == "__main__":
    torch.set_num_threads(1)
    write("elements.safetensors", elements())
    write("blocks.safetensors", blocks())
    write("stochastic.safetensors", stochastic())
    write("nvfp4.safetensors", *nvfp4())
    write("layouts.safetensors", layouts())
