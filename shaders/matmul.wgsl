// matmul: a tile of BM × BN outputs a workgroup, TM × TN an invocation; both operands decoded into workgroup memory, STAGE
// positions of k at a time.
// Numerics: exact tier (lib/dots_exact.wgsl): bit-exact with the twin. ALU tier (lib/dots_alu.wgsl): f32 sums in ascending k.
// Dispatch: tiles_m · tiles_n · batch workgroups, spread over x and y
// Twin:     src/kernels/matmul/cpu.rs

// Word w (of a stage's) of row r: memory[w · ROWS/4 + r/4][r % 4]; rows are A's and then B's.
const ROWS = BM + BN;
const DOWN = BM / TM;
const ACROSS = BN / TN;
const STRIPS = BM / STRIP_ROWS;

var<workgroup> memory: array<vec4<Word>, max(WORDS * ROWS, STRIP_ROWS * BN) / 4u>;

fn strip_get(i: u32) -> f32 { return bitcast<f32>(memory[i / 4u][i % 4u]); }
fn strip_get4(i: u32) -> vec4<f32> { return bitcast<vec4<f32>>(memory[i / 4u]); }
fn strip_put(i: u32, bits: u32) { memory[i / 4u][i % 4u] = bitcast<Word>(bits); }

fn a_index(tile: Tile, r: u32) -> u32 { return min(tile.row + r, tile.row + tile.rows - 1u); }
fn b_index(tile: Tile, r: u32) -> u32 { return min(tile.col + r - BM, p.n - 1u); }

fn fetch(raws: ptr<function, array<Raw, UNITS>>, tile: Tile, lane: u32, k: u32) -> u32 {
    for (var u = 0u; u < UNITS; u++) { // unroll
        let at = u * WG + lane;
        let r = at % ROWS;
        if (r < BM) {
            (*raws)[u] = fetch_a(a_index(tile, r), k + at / ROWS * 8u);
        } else {
            (*raws)[u] = fetch_b(b_index(tile, r), k + at / ROWS * 8u);
        }
    }
    if (lane < ROWS * SEGMENTS) { return fetch_scale(tile, lane, k); }
    return 0u;
}

fn fetch_scale(tile: Tile, u: u32, k: u32) -> u32 {
    let r = u % ROWS;
    let at = k + u / ROWS * (STAGE / SEGMENTS);
    if (r < BM) { return fetch_scale_a(a_index(tile, r), at); }
    return fetch_scale_b(b_index(tile, r), at);
}

fn stage_factor(tile: Tile, u: u32, scale: u32) {
    let r = u % ROWS;
    if (r < BM) {
        stage_factor_a(u, a_index(tile, r), scale);
    } else {
        stage_factor_b(u, b_index(tile, r), scale);
    }
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    let tile = tile_place(wg.y * wgs.x + wg.x, lane);
    if (!tile_uniformly_there(tile, lane)) { return; }
    // Four rows (columns) are neighbours, groups of four DOWN · 4 (ACROSS · 4) apart.
    let ty = lane / ACROSS;
    let tx = lane % ACROSS;
    var sums: array<vec4<f32>, TM * TN / 4u>;
    for (var s = 0u; s < TM * TN / 4u; s++) { // unroll
        sums[s] = vec4<f32>();
    }

    // An invocation stages UNITS times eight positions of a row, and one or no scale; neighbours take neighbouring rows. What
    // lies beyond the tile is read from its last row, what lies beyond k is zero.
    var raws: array<Raw, UNITS>;
    let ks = tile_k(tile, lane);
    var scale = fetch(&raws, tile, lane, ks.x);
    for (var k = ks.x; k < ks.y; k += STAGE) {
        workgroupBarrier();
        for (var u = 0u; u < UNITS; u++) { // unroll
            let at = u * WG + lane;
            let r = at % ROWS;
            let part = at / ROWS;
            if (part >= STAGE / 8u) {
                // The last round may be short.
            } else if (r < BM) {
                stage_a(r, part, a_index(tile, r), k + part * 8u, raws[u]);
            } else {
                stage_b(r, part, b_index(tile, r), k + part * 8u, raws[u]);
            }
        }
        if (lane < ROWS * SEGMENTS) { stage_factor(tile, lane, scale); }
        for (var u = lane + WG; u < ROWS * SEGMENTS; u += WG) { stage_factor(tile, u, fetch_scale(tile, u, k)); }
        workgroupBarrier();
        // The next stage's, while this one's are multiplied.
        scale = fetch(&raws, tile, lane, k + STAGE);
        accumulate(&sums, ty, tx);
    }

    for (var strip = 0u; strip < STRIPS; strip++) {
        workgroupBarrier();
        for (var i = 0u; i < TM; i++) { // unroll
            let r = i / 4u * (DOWN * 4u) + ty * 4u + i % 4u;
            if (r / STRIP_ROWS == strip) {
                for (var j = 0u; j < TN / 4u; j++) { // unroll
                    let at = (r % STRIP_ROWS) * BN + (j * ACROSS + tx) * 4u;
                    memory[at / 4u] = bitcast<vec4<Word>>(sums[i * (TN / 4u) + j]);
                }
            }
        }
        workgroupBarrier();
        strip_store(tile, strip * STRIP_ROWS, lane);
    }
}
