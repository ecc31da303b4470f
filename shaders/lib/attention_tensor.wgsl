// What the attention kernels on cooperative matrices share. A workgroup has TILE rows of queries (of keys) to itself, as
// fragments in registers, and goes through the other side STEP rows at a time. Its subgroups of 32 are TILE / 16 down, with 16
// rows each, times ACROSS, which share the columns of scores and of results.
//
// Workgroup memory, in units of 16 bytes: two tiles of STEP rows of bf16, PITCH units a row, and MATRICES matrices of
// TILE × STEP scores, S_PITCH units a row: f32 as they leave the fragments, whose layout only the device knows; then, in
// place and half as wide, the bf16 that the next product reads. A row's last unit is padding: it spreads rows over the banks.
// An invocation has S_UNITS groups of eight neighbouring columns of one row of scores, and results go the same way, STEP
// columns of a row at a time.
//
// The fragments are lib/attention_coop.wgsl's or lib/attention_emulated.wgsl's.

const UNITS = WIDTH / 8u;
const PITCH = UNITS + 1u;
const S_PITCH = STEP / 4u + 1u;
const FIRST = 0u;
const SECOND = STEP * PITCH;
const SCORES = 2u * STEP * PITCH;
const SCORES_2 = SCORES + TILE * S_PITCH;
const MEMORY = SCORES + MATRICES * TILE * S_PITCH;
// Invocations of a row.
const SHARERS = WG / TILE;

var<private> own_lane: u32;     // in the subgroup
var<private> own_rows: u32;     // the subgroup's first, in the tile
var<private> own_across: u32;   // which of the subgroups of these rows
var<private> own_row: u32;      // of scores, in the tile
var<private> own_part: u32;     // which S_UNITS of that row

var<workgroup> shared_rows: array<f32, WG>;

fn take_place(lane: u32) {
    let subgroup = lane / 32u;
    own_lane = lane % 32u;
    own_rows = subgroup / ACROSS * 16u;
    own_across = subgroup % ACROSS;
    own_row = own_rows + lane % 16u;
    own_part = own_across * 2u + own_lane / 16u;
}

const LOG2E = 1.44269504;

// What each invocation has of its row, told to the row's others: there after a barrier.
fn tell(v: f32) { shared_rows[own_row * SHARERS + own_part] = v; }
fn told(i: u32) -> f32 { return shared_rows[own_row * SHARERS + i]; }

// The first column of the invocation's u-th group of eight.
fn own_column(u: u32) -> u32 { return 8u * (own_part * S_UNITS + u); }
fn own_unit(at: u32, u: u32) -> u32 { return at + own_row * S_PITCH + own_column(u) / 4u; }

alias Own = array<vec4<f32>, 2u * S_UNITS>;

fn own_get(own: ptr<function, Own>, at: u32) {
    for (var u = 0u; u < S_UNITS; u++) { // unroll
        (*own)[2u * u] = bitcast<vec4<f32>>(memory_get(own_unit(at, u)));
        (*own)[2u * u + 1u] = bitcast<vec4<f32>>(memory_get(own_unit(at, u) + 1u));
    }
}

fn own_scale(at: u32, factor: f32) {
    for (var u = 0u; u < S_UNITS; u++) {
        for (var h = 0u; h < 2u; h++) {
            let unit = own_unit(at, u) + h;
            memory_put(unit, bitcast<vec4<u32>>(bitcast<vec4<f32>>(memory_get(unit)) * factor));
        }
    }
}

fn eight(low: vec4<f32>, high: vec4<f32>) -> vec4<u32> { return vec4<u32>(y_set(low), y_set(high)); }

// As an operand, over what other invocations may have to read before.
fn own_put(own: ptr<function, Own>, at: u32) {
    for (var u = 0u; u < S_UNITS; u++) { // unroll
        memory_put(at + own_row * S_PITCH + own_column(u) / 8u, eight((*own)[2u * u], (*own)[2u * u + 1u]));
    }
}

// Results times a factor of the row to y; `origin`: the unit of the sequence's first row. All rounds of STEP columns go
// through the memory of the scores.
fn store(sums: ptr<function, Results>, factor: f32, origin: u32, pitch: u32, first: u32) {
    for (var r = 0u; r < ROUNDS; r++) { // unroll
        rows_barrier();
        results_put(sums, r, SCORES);
        rows_barrier();
        store_round(r, factor, origin, pitch, first + own_row);
    }
}

fn store_round(r: u32, factor: f32, origin: u32, pitch: u32, row: u32) {
    for (var u = 0u; u < S_UNITS; u++) {
        let column = own_column(u);
        let unit = (column / (S_FRAGMENTS * 16u) * (O_FRAGMENTS * 16u) + r * (S_FRAGMENTS * 16u) + column % (S_FRAGMENTS * 16u)) / 8u;
        if (row < p.seq && unit < p.quads / 2u) {
            let low = bitcast<vec4<f32>>(memory_get(own_unit(SCORES, u)));
            let high = bitcast<vec4<f32>>(memory_get(own_unit(SCORES, u) + 1u));
            y_data[origin + row * pitch + unit] = eight(low * factor, high * factor);
        }
    }
}
