"""The definitions behind the golden vectors, in exact rational arithmetic.

Written from the OCP Microscaling (MX) v1.0 specification and from the definition of NVFP4; nothing here uses
floating point or the libraries that generate.py compares it with.
"""

from dataclasses import dataclass
from fractions import Fraction as F


def pow2(e):
    return F(1 << e) if e >= 0 else F(1, 1 << -e)


def floor_log2(v):
    e = v.numerator.bit_length() - v.denominator.bit_length()
    return e if v >= pow2(e) else e - 1


def ceil_log2(v):
    e = floor_log2(v)
    return e if v == pow2(e) else e + 1


def rne(v, mbits, emin):
    """v >= 0 to the nearest number with mbits fraction bits and smallest normal exponent emin, ties to even
    (as Fraction.__round__ does), unbounded above."""
    if v == 0:
        return v
    quantum = pow2(max(floor_log2(v), emin) - mbits)
    return round(v / quantum) * quantum


def f32_bits(v, negative=False):
    """v >= 0 rounded to float32, as its bits; overflow gives infinity."""
    v, sign = rne(v, 23, -126), int(negative) << 31
    if v >= pow2(128):
        return sign | 0x7F800000
    field = max(floor_log2(v), -126) + 127 if v else 1
    mantissa = int(v / pow2(field - 127 - 23))  # with the hidden bit, which adds one to the field below
    return sign | ((field - 1) << 23) + mantissa


@dataclass(frozen=True)
class Elem:
    name: str
    bits: int
    mbits: int
    emin: int  # exponent of the smallest normal
    emax: int  # exponent of the largest
    max: F

    def values(self):
        """The non-negative finite values, in the order of their codes 0, 1, ..."""
        out = []
        for code in range(1 << (self.bits - 1)):
            field, fraction = code >> self.mbits, code & ((1 << self.mbits) - 1)
            hidden = (1 << self.mbits) if field else 0
            out.append((hidden + fraction) * pow2(max(field, 1) - 1 + self.emin - self.mbits))
            if out[-1] == self.max:
                return out

    def code(self, v, negative):
        """The code of the magnitude v: nearest even, saturating, zero keeps its sign. INT8 has no -0 and,
        saturating at +-127, never gives the code -128."""
        v = min(rne(v, self.mbits, self.emin), self.max)
        e = max(floor_log2(v), self.emin) if v else self.emin
        code = ((e - self.emin) << self.mbits) + int(v / pow2(e - self.mbits))
        if not negative:
            return code
        return -code & 0xFF if self is INT8 else code | 1 << (self.bits - 1)


E2M1 = Elem("e2m1", 4, 1, 0, 2, F(6))
E4M3 = Elem("e4m3", 8, 3, -6, 8, F(448))
FLOATS = [
    E2M1,
    Elem("e2m3", 6, 3, 0, 2, F(15, 2)),
    Elem("e3m2", 6, 2, -2, 4, F(28)),
    E4M3,
    Elem("e5m2", 8, 2, -14, 15, F(57344)),
]
# Value = code / 64: the constant quantum 2^-6 is that of a format with emin = 0, mbits = 6 and no value above 2.
INT8 = Elem("int8", 8, 6, 0, 0, F(127, 64))
ELEMS = FLOATS + [INT8]
MODES = ["floor", "ceil", "rceil", "even"]


def scale_byte(elem, mode, amax):
    """The E8M0 byte of a block whose largest magnitude is amax."""
    if amax == 0:
        return 0
    if mode == "floor":
        s = floor_log2(amax) - elem.emax
    elif mode == "ceil":
        s = ceil_log2(amax) - elem.emax
    elif mode == "rceil":
        s = ceil_log2(amax / elem.max)
    else:  # even: amax to 1 + mbits significant bits, half up
        quantum = pow2(floor_log2(amax) - elem.mbits)
        s = floor_log2(int(amax / quantum + F(1, 2)) * quantum) - elem.emax
    return min(max(s + 127, 0), 254)


def nvfp4_block_scale(quotient):
    """The E4M3 value for amax / (6 * tensor scale): nearest even, within 2^-9 (smallest E4M3) and 448, 0 for 0."""
    return min(max(rne(quotient, 3, -6), pow2(-9)), E4M3.max) if quotient else F(0)


def stochastic_code(elem, v, negative, r):
    """Away from zero iff delta + (r + 1/2) / 2^16 >= 1, delta the fraction of the quantum above the lower neighbour."""
    quantum = pow2((max(floor_log2(v), elem.emin) if v else elem.emin) - elem.mbits)
    lower = v // quantum
    return elem.code((lower + (v / quantum - lower + F(2 * r + 1, 1 << 17) >= 1)) * quantum, negative)
