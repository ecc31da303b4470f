// matmul_skinny: M rows of A (decoding) times all lines of B, each read once: a workgroup takes RN lines of B; an invocation
// takes 32 positions of k of every (WG / LANES)-th of them, and its products go through workgroup memory to the invocation
// that adds them in ascending order.
// Numerics: as shaders/matmul.wgsl, and the same bits in the exact tier.
// Dispatch: tiles_m · tiles_n · batch workgroups, spread over x and y
// Twin:     src/kernels/matmul/cpu.rs

const LANES = 32u;
const ABREAST = WG / LANES;
alias Lines = array<Line, PASSES>;
const TERMS = LANES * SEGMENTS;
const BM = M;
const BN = RN;
const STRIP_ROWS = M;

// Term t of output o: terms[o · TERMS + (t ^ (o % 32))], so that neither writing nor adding meets one bank twice. At the end
// the strip of sums.
var<workgroup> terms: array<f32, M * RN * TERMS>;

fn strip_get(i: u32) -> f32 { return terms[i]; }
fn strip_get4(i: u32) -> vec4<f32> { return vec4<f32>(terms[i], terms[i + 1u], terms[i + 2u], terms[i + 3u]); }
fn strip_put(i: u32, bits: u32) { terms[i] = bitcast<f32>(bits); }

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    let tile = tile_place(wg.y * wgs.x + wg.x, lane);
    if (!tile_uniformly_there(tile, lane)) { return; }
    let l = lane % LANES;
    let abreast = lane / LANES;
    var lines: Lines;
    for (var u = 0u; u < PASSES; u++) { // unroll
        lines[u] = line_open(min(tile.col + u * ABREAST + abreast, p.n - 1u));
    }
    var sum = 0.0;
    for (var k0 = 0u; k0 < p.k; k0 += LANES * 32u) {
        let k = k0 + l * 32u;
        // All loads first.
        for (var u = 0u; u < PASSES; u++) { // unroll
            line_fetch(&lines, u, min(tile.col + u * ABREAST + abreast, p.n - 1u), k);
        }
        for (var u = lane; u < M * 4u * LANES; u += WG) {
            stage_a(tile, u / (4u * LANES), u / LANES % 4u, u % LANES, k0 + (u % LANES) * 32u + u / LANES % 4u * 8u);
        }
        workgroupBarrier();
        for (var m = 0u; m < M; m++) { // unroll
            let a = line_a(m, l);
            for (var u = 0u; u < PASSES; u++) { // unroll
                line_terms(&lines, u, u * ABREAST + abreast, m, a, l);
            }
        }
        workgroupBarrier();
        if (lane < M * RN) {
            for (var t = 0u; t < TERMS; t++) {
                sum += terms[lane * TERMS + (t ^ (lane % 32u))];
            }
        }
    }
    workgroupBarrier();
    if (lane < M * RN) { terms[lane] = sum; }
    workgroupBarrier();
    strip_store(tile, 0u, lane);
}

fn a_index(tile: Tile, m: u32) -> u32 { return min(tile.row + m, tile.row + tile.rows - 1u); }

fn put_term(m: u32, n: u32, t: u32, term: f32) {
    let o = m * RN + n;
    terms[o * TERMS + (t ^ (o % 32u))] = term;
}
