// matmul_tensor: a tile of BM × BN outputs a workgroup, by cooperative matrices: both operands decoded to f16 in workgroup
// memory (BYTES: before, to E4M3 or I8), sums in f32 (I8: i32). A subgroup of 32 has FM × FN fragments.
// Numerics: bounded. Operands are f16 relative to their lines' anchors: exact down to 2^-24 of the scale, see
//           lib/operand_halves.wgsl; sums are the device's. BYTES: operands that shaders/bytes_pack.wgsl made, of lines for
//           which eight bits are exact; the same kernel in f16 has the other tiles, lib/window.wgsl.
// Order:    k is read in chunks of 128, a stage of 32 positions being 8 of each of the chunk's four blocks of 32: an invocation
//           then decodes codes of one block, which it loaded at once. Any order serves that both operands share.
//           BYTES: stages of 64 positions, as they lie.
// Dispatch: tiles_m · tiles_n · batch workgroups, spread over x and y

const BM = SUBGROUPS_M * FM * FRAGMENT;
const BN = SUBGROUPS_N * FN * FRAGMENT;
const STRIP_ROWS = SUBGROUPS_M * FRAGMENT;
// Units of 16 bytes, PER_UNIT positions each, of a row of a stage; the fifth spreads the rows over the banks.
const PITCH = 5u;
// SLICES groups of subgroups share a tile: each has every SLICES-th chunk of k to itself, and memory of its own.
const TILE_UNITS = (BM + BN) * PITCH;
// A strip of sums, in vectors of LANES.
const LANES = 4u;
const STRIP_VECTORS = STRIP_ROWS * BN / LANES;
// Four invocations a row; A_UNITS and B_UNITS rows an invocation.
const ROW_STEP = WG / SLICES / 4u;
const A_ROW0 = 0u;
const B_ROW0 = BM;
const A_SIDE = BM;
const B_SIDE = BN;
// A tile that is kept k by k: see lib/loader_columns.wgsl.
const A_PITCH = BM / 8u + 1u;
const B_PITCH = BN / 8u + 1u;

var<private> own_part: u32;
var<private> own_thread: u32;
var<private> own_lane: u32;
var<private> own_slice: u32;

fn lane_part() -> u32 { return own_part; }

// Rows beyond the last are read as the last; they are not stored.
fn a_within(row: u32, limit: u32) -> u32 { return select(min(row, limit), row, A_WHOLE); }
fn b_within(row: u32, limit: u32) -> u32 { return select(min(row, limit), row, B_WHOLE); }

// Where the fragment of 16 (8) rows from `row` on and of positions s · FRAGMENT_K … lies.
fn a_fragment(row: u32, s: u32) -> u32 {
    if (A_COLUMNS) { return s * FRAGMENT * A_PITCH + row / 8u; }
    return row * PITCH + s * (FRAGMENT_K / PER_UNIT);
}

fn b_fragment(row: u32, s: u32) -> u32 {
    if (B_COLUMNS) { return B_ROW0 * PITCH + s * FRAGMENT * B_PITCH + row / 8u; }
    return (B_ROW0 + row) * PITCH + s * (FRAGMENT_K / PER_UNIT);
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    let tile = tile_place(wg.y * wgs.x + wg.x, lane);
    if (!tile_uniformly_there(tile, lane)) { return; }
    if (!tile_taken(tile, lane)) { return; }
    own_slice = lane / (WG / SLICES);
    let subgroup = lane % (WG / SLICES) / 32u;
    let subgroup_m = subgroup / SUBGROUPS_N;
    let a_row = subgroup_m * FRAGMENT;
    let b_row = subgroup % SUBGROUPS_N * (FN * FRAGMENT);
    own_part = lane % 4u;
    own_lane = lane % 32u;
    own_thread = lane % (WG / SLICES);
    // Within eight rows 0, 4, 1, 5, …: then eight neighbours write to all banks.
    let q = own_thread / 4u;
    let r0 = (q & ~7u) | ((q & 1u) << 2u) | ((q >> 1u) & 3u);
    let a_limit = tile.row + tile.rows - 1u;
    let b_limit = p.n - 1u;
    var a_units: array<a_Unit, A_UNITS>;
    var b_units: array<b_Unit, B_UNITS>;
    var sums: Sums;
    sums_zero(&sums);

    // Slices have as many chunks or one less; what a slice loads beyond the last it does not multiply.
    let ks = tile_k(tile, lane);
    let last = ks.x + (max(ks.y - ks.x, 1u) - 1u) / 128u * 128u;
    let first = ks.x + own_slice * 128u;
    a_open(&a_units, tile.row, a_limit, r0);
    b_open(&b_units, tile.col, b_limit, r0);
    a_ahead(&a_units, tile.row, a_limit, r0, min(first, last));
    b_ahead(&b_units, tile.col, b_limit, r0, min(first, last));
    a_decode(&a_units, 0u);
    b_decode(&b_units, 0u);
    for (var k0 = 0u; k0 < ks.y - ks.x; k0 += SLICES * 128u) {
        let k = k0 + first;
        let here = min(k, last);
        let next = min(k + SLICES * 128u, last);
        for (var j = 0u; j < STAGES; j++) { // unroll
            a_put(&a_units, r0, j);
            b_put(&b_units, r0, j);
            stage_barrier();
            a_load(&a_units, tile.row, a_limit, r0, here, next, j);
            b_load(&b_units, tile.col, b_limit, r0, here, next, j);
            if (SLICES == 1u || k < ks.y) { multiply(&sums, a_row, b_row, j); }
            a_decode(&a_units, (j + 1u) % STAGES);
            b_decode(&b_units, (j + 1u) % STAGES);
            stage_barrier();
        }
    }
    // Slices that did not wait for each other do now.
    if (SUBGROUPS_M * SUBGROUPS_N == 1u) { workgroupBarrier(); }
    for (var i = 0u; i < FM; i++) { // unroll
        strip_fragments(&sums, i, subgroup_m, b_row, lane);
        workgroupBarrier();
        if (SLICES > 1u) {
            strip_join(lane);
            workgroupBarrier();
        }
        strip_store(tile, i * STRIP_ROWS, lane);
        workgroupBarrier();
    }
}
