// What lib/attention_coop.wgsl does, without cooperative matrices: an invocation keeps eight neighbours in a row of every
// fragment of sums, and that row of A. For tests where the device has no such matrices; slow.

var<workgroup> memory: array<vec4<u32>, MEMORY>;

fn memory_put(unit: u32, h: vec4<u32>) { memory[unit] = h; }
fn memory_get(unit: u32) -> vec4<u32> { return memory[unit]; }

fn rows_barrier() { workgroupBarrier(); }

alias Rows = array<vec4<u32>, UNITS>;
alias Results = array<vec4<f32>, 2u * O_FRAGMENTS>;

// Four elements of bf16 of a unit, the first or the last.
fn four(unit: vec4<u32>, last: bool) -> vec4<f32> { return y_get(select(unit.xy, unit.zw, last)); }

fn emulated_row() -> u32 { return own_rows + own_lane / 2u; }
// The first of eight columns, in a fragment.
fn emulated_column() -> u32 { return own_lane % 2u * 8u; }

fn rows_get(rows: ptr<function, Rows>) {
    for (var u = 0u; u < UNITS; u++) { (*rows)[u] = memory[emulated_row() * PITCH + u]; }
}

fn scores(rows: ptr<function, Rows>, tile: u32, to: u32) {
    for (var j = 0u; j < S_FRAGMENTS; j++) {
        for (var c = 0u; c < 8u; c++) {
            let column = (own_across * S_FRAGMENTS + j) * 16u + emulated_column() + c;
            var sum = 0.0;
            for (var u = 0u; u < UNITS; u++) {
                let a = (*rows)[u];
                let b = memory[tile + column * PITCH + u];
                sum += dot(four(a, false), four(b, false)) + dot(four(a, true), four(b, true));
            }
            memory[to + emulated_row() * S_PITCH + column / 4u][column % 4u] = bitcast<u32>(sum);
        }
    }
}

fn results_zero(sums: ptr<function, Results>) {
    for (var j = 0u; j < 2u * O_FRAGMENTS; j++) { (*sums)[j] = vec4<f32>(); }
}

fn accumulate(sums: ptr<function, Results>, left: u32, tile: u32) {
    for (var k = 0u; k < STEP; k++) {
        let a = four(memory[left + emulated_row() * S_PITCH + k / 8u], k % 8u >= 4u)[k % 4u];
        for (var j = 0u; j < O_FRAGMENTS; j++) {
            let b = memory[tile + k * PITCH + ((own_across * O_FRAGMENTS + j) * 16u + emulated_column()) / 8u];
            (*sums)[2u * j] = fma(vec4<f32>(a), four(b, false), (*sums)[2u * j]);
            (*sums)[2u * j + 1u] = fma(vec4<f32>(a), four(b, true), (*sums)[2u * j + 1u]);
        }
    }
}

fn emulated_unit(j: u32, at: u32) -> u32 {
    return at + emulated_row() * S_PITCH + ((own_across * S_FRAGMENTS + j) * 16u + emulated_column()) / 4u;
}

fn results_put(sums: ptr<function, Results>, r: u32, to: u32) {
    for (var j = 0u; j < S_FRAGMENTS; j++) {
        for (var h = 0u; h < 2u; h++) {
            memory[emulated_unit(j, to) + h] = bitcast<vec4<u32>>((*sums)[2u * (r * S_FRAGMENTS + j) + h]);
        }
    }
}

fn results_scale(sums: ptr<function, Results>, factor: f32) {
    for (var r = 0u; r < ROUNDS; r++) {
        results_put(sums, r, SCORES);
        rows_barrier();
        own_scale(SCORES, factor);
        rows_barrier();
        for (var j = 0u; j < S_FRAGMENTS; j++) {
            for (var h = 0u; h < 2u; h++) {
                (*sums)[2u * (r * S_FRAGMENTS + j) + h] = bitcast<vec4<f32>>(memory[emulated_unit(j, SCORES) + h]);
            }
        }
        rows_barrier();
    }
}
