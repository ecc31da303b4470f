// Eight consecutive elements of x as f32 bits; offsets and row lengths are multiples of eight.
// Needs the binding x and the constant X_TYPE. Twin: DType::f32_bits in src/engine/buffer.rs.

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

// The same from column `col` of a row of `cols`; zero from its end on.
fn load8_within(at: u32, col: u32, cols: u32) -> array<u32, 8> {
    if (col < cols) { return load8(at); }
    return array<u32, 8>();
}

// Four of them, from an offset that is a multiple of four.
fn load4_within(at: u32, col: u32, cols: u32) -> array<u32, 4> {
    if (col >= cols) { return array<u32, 4>(); }
    if (X_TYPE == X_F32) {
        let a = x[at / 4u];
        return array<u32, 4>(a.x, a.y, a.z, a.w);
    }
    let h = x[at / 8u];
    let w = select(h.xy, h.zw, (at & 4u) != 0u);
    return array<u32, 4>(widen(w.x & 0xffffu), widen(w.x >> 16u), widen(w.y & 0xffffu), widen(w.y >> 16u));
}
