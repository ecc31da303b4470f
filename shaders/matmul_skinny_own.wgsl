// matmul_skinny_own: as shaders/matmul_skinny.wgsl with lib/terms_halves.wgsl, for which it stands where rows are very few: an
// invocation decodes its own positions of A into registers, so that nothing waits for A; what it will need next of a line it
// loads as soon as it has used the line; and terms take turns between two halves of workgroup memory, so that one barrier
// does for 1024 positions.
// Numerics: as shaders/matmul_skinny.wgsl: the same bits.
// Dispatch: tiles_m · tiles_n · batch workgroups, spread over x and y
// Twin:     src/kernels/matmul/cpu.rs

const LANES = 32u;
const ABREAST = WG / LANES;
const BM = M;
const BN = RN;
const STRIP_ROWS = M;
const HALF = M * RN * LANES;

// Term t of output o: terms[HALF · (0 or 1) + o · LANES + (t ^ (o % 32))]. At the end the strip of sums.
var<workgroup> terms: array<f32, 2u * HALF>;

fn strip_get(i: u32) -> f32 { return terms[i]; }
fn strip_get4(i: u32) -> vec4<f32> { return vec4<f32>(terms[i], terms[i + 1u], terms[i + 2u], terms[i + 3u]); }
fn strip_put(i: u32, bits: u32) { terms[i] = bitcast<f32>(bits); }

// 32 codes and the word of their scale.
struct Block { codes: vec4<u32>, scale: u32 }

fn a_block(line: u32, k: u32) -> Block {
    if (k >= p.k) { return Block(vec4<u32>(), 0u); }
    return Block(a_codes[line * (p.a_pitch / 4u) + k / 32u], a_scales[a_scale_at(line, k) / 4u]);
}

fn b_block(line: u32, k: u32) -> Block {
    if (k >= p.k) { return Block(vec4<u32>(), 0u); }
    return Block(b_codes[line * (p.b_pitch / 4u) + k / 32u], b_scales[b_scale_at(line, k) / 4u]);
}

fn a_scale_at(line: u32, k: u32) -> u32 { return line / A_LINES * p.a_blocks + k / A_BLOCK; }
fn b_scale_at(line: u32, k: u32) -> u32 { return line / B_LINES * p.b_blocks + k / B_BLOCK; }

fn half_sum(w: u32, x: vec2<f16>, y: vec2<f16>, z: vec2<f16>, v: vec2<f16>, before: vec2<f16>) -> vec2<f16> {
    var sum = fma(half2(nibble_pair(w, 12u)), x, before);
    sum = fma(half2(nibble_pair(w, 8u)), y, sum);
    sum = fma(half2(nibble_pair(w, 4u)), z, sum);
    return fma(half2(nibble_pair(w, 0u)), v, sum);
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    let tile = tile_place(wg.y * wgs.x + wg.x, lane);
    if (!tile_uniformly_there(tile, lane)) { return; }
    let l = lane % LANES;
    let abreast = lane / LANES;
    var line: array<u32, PASSES>;
    var anchor: array<u32, PASSES>;
    var block: array<Block, PASSES>;
    for (var u = 0u; u < PASSES; u++) { // unroll
        let j = min(tile.col + u * ABREAST + abreast, p.n - 1u);
        line[u] = b_i0 + j;
        anchor[u] = b_anchor(j);
        block[u] = b_block(line[u], l * 32u);
    }
    var a_line: array<u32, M>;
    var a_anchors: array<u32, M>;
    var a_next: array<Block, M>;
    for (var m = 0u; m < M; m++) { // unroll
        let i = min(tile.row + m, tile.row + tile.rows - 1u);
        a_line[m] = a_i0 + i;
        a_anchors[m] = a_anchor(i);
        a_next[m] = a_block(a_line[m], l * 32u);
    }
    // The last invocations add, so that not all of it falls to the first subgroup, which stores.
    let adder = lane - (WG - M * RN);
    let own = adder * LANES + adder % 32u;
    var sum = 0.0;
    var base = 0u;
    for (var k0 = 0u; k0 < p.k; k0 += LANES * 32u) {
        let k = k0 + l * 32u;
        let next = k + LANES * 32u;
        for (var m = 0u; m < M; m++) { // unroll
            var a: array<vec2<f16>, 16>;
            for (var w = 0u; w < 4u; w++) { // unroll
                for (var s = 0u; s < 4u; s++) { // unroll
                    a[4u * w + s] = half2(nibble_pair(a_next[m].codes[w], 12u - 4u * s)) * vec2<f16>(2048.0h);
                }
            }
            // What is summed counts in 2^-17, for A's times 2^-3 and B's times 2^-14, and must be in quarters.
            let fa = a_factor((a_next[m].scale >> (8u * (a_scale_at(a_line[m], k) % 4u))) & 0xffu, a_anchors[m]) * 524288.0;
            a_next[m] = a_block(a_line[m], next);
            for (var u = 0u; u < PASSES; u++) { // unroll
                let c = block[u].codes;
                let x = vec2<f32>(half_sum(c.y, a[4], a[5], a[6], a[7], half_sum(c.x, a[0], a[1], a[2], a[3], vec2<f16>())));
                let y = vec2<f32>(half_sum(c.w, a[12], a[13], a[14], a[15], half_sum(c.z, a[8], a[9], a[10], a[11], vec2<f16>())));
                let fb = b_factor((block[u].scale >> (8u * (b_scale_at(line[u], k) % 4u))) & 0xffu, anchor[u]);
                let o = m * RN + u * ABREAST + abreast;
                terms[base + o * LANES + (l ^ (o % 32u))] = ((x.x + x.y) + (y.x + y.y)) * (fa * fb);
                if (m == M - 1u) { block[u] = b_block(line[u], next); }
            }
        }
        workgroupBarrier();
        if (lane >= WG - M * RN) {
            for (var t = 0u; t < 32u; t++) { // unroll
                sum += terms[base + (own ^ t)];
            }
        }
        base = HALF - base;
    }
    workgroupBarrier();
    if (lane >= WG - M * RN) { terms[adder] = sum; }
    workgroupBarrier();
    strip_store(tile, 0u, lane);
}
