// dequantize: codes and scales → y, rows of whole vector blocks along the rows; one unit an invocation.
// Layout:   codes[rows · units, UNIT_WORDS words] · scales[rows · blocks bytes] · y[rows, cols], cols % BLOCK == 0
// Numerics: exact in f32 (MX) or rounded once (NVFP4), to infinity above f32's range; then rounded to nearest
//           even for f16 and bf16. Integer-only; bit-exact with the twin.
// Dispatch: ceil(units / WG) workgroups, spread over x and y
// Twin:     src/kernels/dequantize.rs

struct Params {
    units: u32,             // in this dispatch
    codes_offset: u32,      // words
    scales_offset: u32,     // bytes
    y_offset: u32,          // elements, a multiple of UNIT
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> codes: array<u32>;
@group(0) @binding(2) var<storage, read> scales: array<u32>;
@group(0) @binding(3) var<storage, read> state: array<u32>;    // [2]: the tensor-wide scale, see quantize.wgsl
@group(0) @binding(4) var<storage, read_write> y: array<vec4<u32>>;

// Four codes from a little-endian bit stream, as f32 bits.
fn decode4(stream: u32, scale: u32, ts: u32) -> vec4<u32> {
    const MASK = (1u << BITS) - 1u;
    return vec4<u32>(mx_decode(stream & MASK, scale, ts),
                     mx_decode((stream >> BITS) & MASK, scale, ts),
                     mx_decode((stream >> (2u * BITS)) & MASK, scale, ts),
                     mx_decode((stream >> (3u * BITS)) & MASK, scale, ts));
}

fn store8(at: u32, a: vec4<u32>, b: vec4<u32>) {
    if (Y_TYPE == X_F32) {
        y[at / 4u] = a;
        y[at / 4u + 1u] = b;
    } else {
        y[at / 8u] = vec4<u32>(narrow(a.x) | (narrow(a.y) << 16u), narrow(a.z) | (narrow(a.w) << 16u),
                               narrow(b.x) | (narrow(b.y) << 16u), narrow(b.z) | (narrow(b.w) << 16u));
    }
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    let unit = (wg.y * wgs.x + wg.x) * WG + lane;
    if (unit >= p.units) { return; }
    let block = p.scales_offset + unit * UNIT / BLOCK;
    let scale = (scales[block / 4u] >> (8u * (block % 4u))) & 0xffu;
    var ts = 0u;
    if (TENSOR_SCALED) { ts = state[2]; }
    let at = p.codes_offset + unit * UNIT_WORDS;
    let out = p.y_offset + unit * UNIT;
    let w0 = codes[at];
    if (BITS == 4u) {
        store8(out, decode4(w0, scale, ts), decode4(w0 >> 16u, scale, ts));
    } else if (BITS == 8u) {
        store8(out, decode4(w0, scale, ts), decode4(codes[at + 1u], scale, ts));
    } else {
        let w1 = codes[at + 1u];
        let w2 = codes[at + 2u];
        store8(out, decode4(w0, scale, ts), decode4((w0 >> 24u) | (w1 << 8u), scale, ts));
        store8(out + 8u, decode4((w1 >> 16u) | (w2 << 16u), scale, ts), decode4(w2 >> 8u, scale, ts));
    }
}
