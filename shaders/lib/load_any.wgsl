// Elements of x as f32 bits, at any offset. Needs the binding x and the constant X_TYPE.
// Twin: Dense::f32_bits in src/engine/buffer.rs.

alias XWord = u32;

fn load1(at: u32) -> u32 {
    if (X_TYPE == X_F32) { return x[at]; }
    return widen((x[at / 2u] >> (16u * (at & 1u))) & 0xffffu);
}

fn load8(at: u32) -> array<u32, 8> {
    return array<u32, 8>(load1(at), load1(at + 1u), load1(at + 2u), load1(at + 3u),
                         load1(at + 4u), load1(at + 5u), load1(at + 6u), load1(at + 7u));
}
