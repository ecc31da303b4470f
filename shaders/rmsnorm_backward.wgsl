// rmsnorm_backward: with n = x · rstd and w = dy · gain, dx = rstd · (w − n · mean(w · n)), added to what dx holds if RESIDUAL;
// and each workgroup's part of dgain = Σ over rows of dy · n.
// Layout:   x, dy, dx[rows, quads of 4 columns] · gain[quads] · rstd[rows] · parts[groups, quads]; quads ≤ LANES · HELD
// Numerics: f32; a slot's rows in ascending order, then its workgroup's slots
// Dispatch: ceil(rows / p.per_group) workgroups, spread over x and y; LANES invocations a row, which they hold in registers
// Twin:     src/kernels/rmsnorm.rs

struct Params {
    rows: u32,
    quads: u32,
    per_group: u32, // rows of a workgroup
    inverse: f32,   // 1 / columns
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<x_Quad>;
@group(0) @binding(2) var<storage, read> gain: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> rstd: array<f32>;
@group(0) @binding(4) var<storage, read> dy: array<dy_Quad>;
@group(0) @binding(5) var<storage, read_write> dx: array<dx_Quad>;
@group(0) @binding(6) var<storage, read_write> parts: array<vec4<f32>>;

const SLOTS = WG / LANES;

var<workgroup> wg_parts: array<vec4<f32>, WG>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    let group = wg.y * wgs.x + wg.x;
    let begin = group * p.per_group;
    if (begin >= p.rows) { return; }
    let end = min(begin + p.per_group, p.rows);
    let first = lane % LANES;
    var part: array<vec4<f32>, HELD>;
    var n: array<vec4<f32>, HELD>;
    var w: array<vec4<f32>, HELD>;
    for (var i = 0u; i < HELD; i++) { // unroll
        part[i] = vec4<f32>();
    }

    for (var base = begin; base < end; base += SLOTS) {
        let row = base + lane / LANES;
        let there = row < end;
        let start = row * p.quads;
        let r = rstd[min(row, end - 1u)];
        var products = 0.0;
        for (var i = 0u; i < HELD; i++) { // unroll
            let q = first + i * LANES;
            n[i] = vec4<f32>();
            w[i] = vec4<f32>();
            if (there && q < p.quads) {
                let d = dy_get(dy[start + q]);
                n[i] = x_get(x[start + q]) * r;
                w[i] = d * gain[q];
                part[i] += d * n[i];
            }
            products += dot(w[i], n[i]);
        }
        let mean = row_sum(products, lane) * p.inverse;
        for (var i = 0u; i < HELD; i++) { // unroll
            let q = first + i * LANES;
            if (there && q < p.quads) {
                var d = (w[i] - n[i] * mean) * r;
                if (RESIDUAL) { d += dx_get(dx[start + q]); }
                dx[start + q] = dx_set(d);
            }
        }
    }

    for (var i = 0u; i < HELD; i++) { // unroll
        workgroupBarrier();
        wg_parts[lane] = part[i];
        workgroupBarrier();
        let q = first + i * LANES;
        if (lane < LANES && q < p.quads) {
            var sum = wg_parts[lane];
            for (var slot = 1u; slot < SLOTS; slot++) { sum += wg_parts[slot * LANES + lane]; }
            parts[group * p.quads + q] = sum;
        }
    }
}
