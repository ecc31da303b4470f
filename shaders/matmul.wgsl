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
fn strip_put(i: u32, bits: u32) { memory[i / 4u][i % 4u] = bitcast<Word>(bits); }

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    let tile = tile_place(wg.y * wgs.x + wg.x);
    if (!tile_uniformly_there(tile, lane)) { return; }
    // Four rows (columns) are neighbours, groups of four DOWN · 4 (ACROSS · 4) apart.
    let ty = lane / ACROSS;
    let tx = lane % ACROSS;
    var sums: array<vec4<f32>, TM * TN / 4u>;
    for (var s = 0u; s < TM * TN / 4u; s++) { sums[s] = vec4<f32>(); }

    for (var k = 0u; k < p.k; k += STAGE) {
        workgroupBarrier();
        // Neighbouring invocations take neighbouring rows. What lies beyond the tile is read from its last row.
        for (var u = lane; u < ROWS * (STAGE / 8u); u += WG) {
            let r = u % ROWS;
            let part = u / ROWS;
            if (r < BM) {
                stage(r, part, a_eight(min(tile.row + r, tile.row + tile.rows - 1u), k + part * 8u));
            } else {
                stage(r, part, b_eight(min(tile.col + r - BM, p.n - 1u), k + part * 8u));
            }
        }
        for (var u = lane; u < ROWS * SEGMENTS; u += WG) {
            let r = u % ROWS;
            let at = k + u / ROWS * (STAGE / SEGMENTS);
            if (r < BM) {
                stage_factor(u, a_segment_factor(min(tile.row + r, tile.row + tile.rows - 1u), at));
            } else {
                stage_factor(u, b_segment_factor(min(tile.col + r - BM, p.n - 1u), at));
            }
        }
        workgroupBarrier();
        accumulate(&sums, ty, tx);
    }

    for (var strip = 0u; strip < STRIPS; strip++) {
        workgroupBarrier();
        for (var i = 0u; i < TM; i++) {
            let r = i / 4u * (DOWN * 4u) + ty * 4u + i % 4u;
            if (r / STRIP_ROWS == strip) {
                for (var j = 0u; j < TN / 4u; j++) {
                    let at = (r % STRIP_ROWS) * BN + (j * ACROSS + tx) * 4u;
                    memory[at / 4u] = bitcast<vec4<Word>>(sums[i * (TN / 4u) + j]);
                }
            }
        }
        workgroupBarrier();
        strip_store(tile, strip * STRIP_ROWS, lane);
    }
}
