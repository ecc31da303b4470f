// Eight consecutive elements of x as f32 bits, at any offset. Needs the binding x and the constant X_TYPE.
// Twin: DType::f32_bits in src/engine/buffer.rs.

alias XWord = u32;

// The element at offset `at`, or zero; without a branch: what is not there is read from the row's start.
fn load1_if(at: u32, safe: u32, there: bool) -> u32 {
    let index = select(safe, at, there);
    if (X_TYPE == X_F32) { return select(0u, x[index], there); }
    return select(0u, widen((x[index / 2u] >> (16u * (index & 1u))) & 0xffffu), there);
}

// From column `col` of a row of `cols`; zero from its end on.
fn load8_within(at: u32, col: u32, cols: u32) -> array<u32, 8> {
    let safe = at - col;
    return array<u32, 8>(load1_if(at, safe, col < cols), load1_if(at + 1u, safe, col + 1u < cols),
                         load1_if(at + 2u, safe, col + 2u < cols), load1_if(at + 3u, safe, col + 3u < cols),
                         load1_if(at + 4u, safe, col + 4u < cols), load1_if(at + 5u, safe, col + 5u < cols),
                         load1_if(at + 6u, safe, col + 6u < cols), load1_if(at + 7u, safe, col + 7u < cols));
}

fn load4_within(at: u32, col: u32, cols: u32) -> array<u32, 4> {
    let safe = at - col;
    return array<u32, 4>(load1_if(at, safe, col < cols), load1_if(at + 1u, safe, col + 1u < cols),
                         load1_if(at + 2u, safe, col + 2u < cols), load1_if(at + 3u, safe, col + 3u < cols));
}

fn load8(at: u32) -> array<u32, 8> { return load8_within(at, 0u, 8u); }
