// Eight consecutive elements of x as f32 bits; element offsets are multiples of eight.
// Needs the binding x and the constant X_TYPE. Twin: Dense::f32_bits in src/engine/buffer.rs.

alias XWord = vec4<u32>;

fn load8(at: u32) -> array<u32, 8> {
    if (X_TYPE == X_F32) {
        let a = x[at / 4u];
        let b = x[at / 4u + 1u];
        return array<u32, 8>(a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w);
    }
    let h = x[at / 8u];
    return array<u32, 8>(widen(h.x & 0xffffu), widen(h.x >> 16u), widen(h.y & 0xffffu), widen(h.y >> 16u),
                         widen(h.z & 0xffffu), widen(h.z >> 16u), widen(h.w & 0xffffu), widen(h.w >> 16u));
}

fn load1(at: u32) -> u32 {
    if (X_TYPE == X_F32) { return x[at / 4u][at % 4u]; }
    return widen((x[at / 8u][(at / 2u) % 4u] >> (16u * (at & 1u))) & 0xffffu);
}
