// The ALU tier's inner loop: f32 products and sums.

alias Word = f32;
alias Eight = array<f32, 8>;
const STAGE = 16u;
const WORDS = 16u;

fn stage(r: u32, part: u32, x: Eight) {
    for (var j = 0u; j < 8u; j++) { memory[(part * 8u + j) * (ROWS / 4u) + r / 4u][r % 4u] = x[j]; }
}

fn stage_factor(at: u32, factor: f32) { }

fn a_eight(i: u32, k: u32) -> Eight { return a_values8(i, k); }
fn b_eight(i: u32, k: u32) -> Eight { return b_values8(i, k); }
fn a_segment_factor(i: u32, k: u32) -> f32 { return 1.0; }
fn b_segment_factor(i: u32, k: u32) -> f32 { return 1.0; }

fn accumulate(sums: ptr<function, array<vec4<f32>, TM * TN / 4u>>, ty: u32, tx: u32) {
    for (var w = 0u; w < WORDS; w++) {
        let row = w * (ROWS / 4u);
        var b: array<vec4<f32>, TN / 4u>;
        for (var j = 0u; j < TN / 4u; j++) { b[j] = memory[row + BM / 4u + j * ACROSS + tx]; }
        for (var i = 0u; i < TM / 4u; i++) {
            let a = memory[row + i * DOWN + ty];
            for (var j = 0u; j < TN / 4u; j++) {
                let n = 4u * i * (TN / 4u) + j;
                (*sums)[n] = fma(b[j], vec4<f32>(a.x), (*sums)[n]);
                (*sums)[n + TN / 4u] = fma(b[j], vec4<f32>(a.y), (*sums)[n + TN / 4u]);
                (*sums)[n + 2u * (TN / 4u)] = fma(b[j], vec4<f32>(a.z), (*sums)[n + 2u * (TN / 4u)]);
                (*sums)[n + 3u * (TN / 4u)] = fma(b[j], vec4<f32>(a.w), (*sums)[n + 3u * (TN / 4u)]);
            }
        }
    }
}
