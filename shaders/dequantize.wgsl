// dequantize: codes and scales → y, rows of whole vector blocks along the rows.
// Layout:   codes[rows · cols · BITS/32 words] · scales[rows · blocks bytes] · y[rows, cols], cols % BLOCK == 0
// Numerics: exact in f32 (MX) or rounded once (NVFP4), to infinity above f32's range; then rounded to nearest
//           even for f16 and bf16. Integer-only; bit-exact with the twin.
// Dispatch: ceil(vectors / (WG · STEPS)) workgroups, spread over x and y; consecutive invocations write consecutive vectors
// Twin:     src/kernels/dequantize.rs

struct Params {
    vectors: u32,           // of 16 bytes, in this dispatch
    codes_offset: u32,      // words before the first
    scales_offset: u32,     // bytes before the first
    y_offset: u32,          // vectors before the first
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> codes: array<u32>;
@group(0) @binding(2) var<storage, read> scales: array<u32>;
@group(0) @binding(3) var<storage, read> state: array<u32>;    // [2]: the tensor-wide scale, see quantize.wgsl
@group(0) @binding(4) var<storage, read_write> y: array<vec4<u32>>;

const PER_VECTOR = select(8u, 4u, Y_TYPE == X_F32);
const CODES = 1u << BITS;

// The f32 bits of every code without a scale, and whether a scale changes them: 0 for zero, infinity and NaN, else 1.
var<workgroup> wg_values: array<vec2<u32>, CODES>;

// Whether every value of the format is normal in f32 under this scale.
fn in_range(scale: u32) -> bool { return !TENSOR_SCALED && scale >= 17u && scale <= 238u; }

// A code under an E8M0 scale in range: adds to the exponent.
fn scaled(code: u32, scale: u32) -> u32 {
    let value = wg_values[code];
    return value.x + value.y * ((scale - 127u) << 23u);
}

// 4 · BITS bits of the codes from element `at` on.
fn stream4(at: u32) -> u32 {
    let bit = at * BITS;
    let word = p.codes_offset + bit / 32u;
    let low = codes[word] >> (bit % 32u);
    if (BITS == 6u && bit % 32u > 8u) { return low | (codes[word + 1u] << (32u - bit % 32u)); }
    return low;
}

fn decode4(stream: u32, scale: u32, ts: u32) -> vec4<u32> {
    const MASK = CODES - 1u;
    let c = vec4<u32>(stream & MASK, (stream >> BITS) & MASK, (stream >> (2u * BITS)) & MASK, (stream >> (3u * BITS)) & MASK);
    if (in_range(scale)) {
        return vec4<u32>(scaled(c.x, scale), scaled(c.y, scale), scaled(c.z, scale), scaled(c.w, scale));
    }
    return vec4<u32>(mx_decode(c.x, scale, ts), mx_decode(c.y, scale, ts), mx_decode(c.z, scale, ts), mx_decode(c.w, scale, ts));
}

// Two values as 16 bits each. What is in range for bf16 is exact in it: no format has more than seven significant bits.
fn narrow2(a: u32, b: u32, scale: u32) -> u32 {
    if (Y_TYPE == X_BF16 && in_range(scale)) { return (a >> 16u) | (b & 0xffff0000u); }
    return narrow(a) | (narrow(b) << 16u);
}

// What a vector of y is made of.
struct Fetched { low: u32, high: u32, scale: u32 }

fn fetch(vector: u32) -> Fetched {
    // Beyond the end: the last vector once more, not to be stored.
    let at = min(vector, p.vectors - 1u) * PER_VECTOR;
    let block = p.scales_offset + at / BLOCK;
    let scale = (scales[block / 4u] >> (8u * (block % 4u))) & 0xffu;
    if (Y_TYPE == X_F32) { return Fetched(stream4(at), 0u, scale); }
    let low = stream4(at);
    if (BITS == 4u) { return Fetched(low, low >> 16u, scale); }
    return Fetched(low, stream4(at + 4u), scale);
}

fn store(vector: u32, f: Fetched, ts: u32) {
    if (vector >= p.vectors) { return; }
    let a = decode4(f.low, f.scale, ts);
    if (Y_TYPE == X_F32) {
        y[p.y_offset + vector] = a;
    } else {
        let b = decode4(f.high, f.scale, ts);
        y[p.y_offset + vector] = vec4<u32>(narrow2(a.x, a.y, f.scale), narrow2(a.z, a.w, f.scale),
                                           narrow2(b.x, b.y, f.scale), narrow2(b.z, b.w, f.scale));
    }
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    // All loads before the first store; what exceeds STEPS is dead code.
    let v = (wg.y * wgs.x + wg.x) * STEPS * WG + lane;
    let f0 = fetch(v + 0u * WG);
    let f1 = fetch(v + 1u * WG);
    let f2 = fetch(v + 2u * WG);
    let f3 = fetch(v + 3u * WG);
    var ts = 0u;
    if (TENSOR_SCALED) { ts = state[2]; }
    if (!TENSOR_SCALED && lane < CODES) {
        let value = mx_decode(lane, 127u, 0u);
        let exponent = value & F32_INFINITY;
        wg_values[lane] = vec2<u32>(value, u32(exponent != 0u && exponent != F32_INFINITY));
    }
    workgroupBarrier();
    if (STEPS > 0u) { store(v + 0u * WG, f0, ts); }
    if (STEPS > 1u) { store(v + 1u * WG, f1, ts); }
    if (STEPS > 2u) { store(v + 2u * WG, f2, ts); }
    if (STEPS > 3u) { store(v + 3u * WG, f3, ts); }
}
