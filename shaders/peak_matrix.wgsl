// peak_matrix: what the device's cooperative matrices reach, f16 to f32 or of bytes. A subgroup of 32 has 4 × 4 fragments of
// sums, and the four of A and of B that they take, loaded once.
// Layout:   x[2 · 4 · SIDE · LINE]: A's fragments, then B's, as small integers (bytes: four a word) · y[invocations]
// Numerics: every sum is an integer below 2^24; a subgroup's 32 values of y add up to the sum of all its fragments
// Dispatch: as many workgroups as y has room for

// LINE elements of memory to a line of what is loaded.
const FRAGMENT = SIDE * LINE;
const SUMS = SIDE * SIDE;

struct Params {
    seed: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;

var<workgroup> tiles: array<Loaded, 8u * FRAGMENT>;
var<workgroup> strip: array<f32, WG / 32u * SUMS>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    for (var i = lane; i < 8u * FRAGMENT; i += WG) { tiles[i] = Loaded(x[i]); }
    workgroupBarrier();
    var a: array<MatA, 4>;
    var b: array<MatB, 4>;
    for (var i = 0u; i < 4u; i++) { // unroll
        a[i] = coopLoadT<MatA>(&tiles[i * FRAGMENT], LINE);
        b[i] = coopLoad<MatB>(&tiles[(4u + i) * FRAGMENT], LINE);
    }
    var c: array<MatC, 16>;
    for (var f = 0u; f < 16u; f++) { // unroll
        c[f] = MatC();
    }
    for (var n = 0u; n < ITERATIONS; n++) {
        for (var i = 0u; i < 4u; i++) { // unroll
            for (var j = 0u; j < 4u; j++) { // unroll
                c[i * 4u + j] = coopMultiplyAdd(a[i], b[j], c[i * 4u + j]);
            }
        }
    }
    var s = f32(p.seed);
    for (var f = 0u; f < 16u; f++) { // unroll
        let at = lane / 32u * SUMS;
        let stride = SIDE;
        let sums = c[f] * ONE;
        coopStoreT(sums, &strip[at], stride);
        workgroupBarrier();
        for (var i = lane % 32u; i < SUMS; i += 32u) { s += strip[at + i]; }
        workgroupBarrier();
    }
    y[(wg.y * wgs.x + wg.x) * WG + lane] = s;
}
