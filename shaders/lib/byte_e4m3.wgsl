// E4M3 by its definition: a sign, four bits of exponent with bias 7, three of mantissa; S1111111 is NaN.

alias Sum = f32;

fn byte_value(byte: u32) -> Sum {
    let exponent = (byte >> 3u) & 15u;
    let fraction = f32(byte & 7u);
    if ((byte & 0x7fu) == 0x7fu) { return bitcast<f32>(F32_NAN); }
    let power = bitcast<f32>((max(exponent, 1u) + 120u - 3u) << 23u);
    let magnitude = select(fraction, fraction + 8.0, exponent > 0u) * power;
    return select(magnitude, -magnitude, (byte & 0x80u) != 0u);
}

fn sum_of(a: Sum, b: Sum, sum: Sum) -> Sum { return fma(a, b, sum); }
