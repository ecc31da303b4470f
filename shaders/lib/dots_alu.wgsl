// The ALU tier's inner loop: f32 products and sums.

alias Word = f32;
// Nothing is fetched ahead.
alias Raw = u32;
const WORDS = 16u;

fn fetch_a(i: u32, k: u32) -> Raw { return 0u; }
fn fetch_b(i: u32, k: u32) -> Raw { return 0u; }

fn stage_a(r: u32, part: u32, i: u32, k: u32, raw: Raw) { stage(r, part, a_values8(i, k)); }
fn stage_b(r: u32, part: u32, i: u32, k: u32, raw: Raw) { stage(r, part, b_values8(i, k)); }

fn stage(r: u32, part: u32, x: array<f32, 8>) {
    var v = x;
    for (var j = 0u; j < 8u; j++) { // unroll
        memory[(part * 8u + j) * (ROWS / 4u) + r / 4u][r % 4u] = v[j];
    }
}

fn fetch_scale_a(i: u32, k: u32) -> u32 { return 0u; }
fn fetch_scale_b(i: u32, k: u32) -> u32 { return 0u; }
fn stage_factor_a(at: u32, i: u32, scale: u32) { }
fn stage_factor_b(at: u32, i: u32, scale: u32) { }

fn accumulate(sums: ptr<function, array<vec4<f32>, TM * TN / 4u>>, ty: u32, tx: u32) {
    for (var w = 0u; w < WORDS; w++) {
        let row = w * (ROWS / 4u);
        var b: array<vec4<f32>, TN / 4u>;
        for (var j = 0u; j < TN / 4u; j++) { // unroll
            b[j] = memory[row + BM / 4u + j * ACROSS + tx];
        }
        for (var i = 0u; i < TM / 4u; i++) { // unroll
            let a = memory[row + i * DOWN + ty];
            for (var j = 0u; j < TN / 4u; j++) { // unroll
                let n = 4u * i * (TN / 4u) + j;
                (*sums)[n] = fma(b[j], vec4<f32>(a.x), (*sums)[n]);
                (*sums)[n + TN / 4u] = fma(b[j], vec4<f32>(a.y), (*sums)[n + TN / 4u]);
                (*sums)[n + 2u * (TN / 4u)] = fma(b[j], vec4<f32>(a.z), (*sums)[n + 2u * (TN / 4u)]);
                (*sums)[n + 3u * (TN / 4u)] = fma(b[j], vec4<f32>(a.w), (*sums)[n + 3u * (TN / 4u)]);
            }
        }
    }
}
