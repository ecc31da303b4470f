// The exact tier's inner loop: integer dot products of a segment, scaled and added in ascending order.

alias Word = u32;
alias Eight = vec2<u32>;
const STAGE = 32u;
const WORDS = 8u;
const SEGMENT_WORDS = WORDS / SEGMENTS;
// The integer sum s is counted from the bits of 1.5 · 2^23, so that they are the float 1.5 · 2^23 + s, |s| < 2^22.
const MAGIC = 0x4b400000i;

var<workgroup> factors: array<f32, ROWS * SEGMENTS>;

fn stage(r: u32, part: u32, words: Eight) {
    memory[(part * 2u) * (ROWS / 4u) + r / 4u][r % 4u] = words.x;
    memory[(part * 2u + 1u) * (ROWS / 4u) + r / 4u][r % 4u] = words.y;
}

fn stage_factor(at: u32, factor: f32) { factors[at] = factor; }

fn a_eight(i: u32, k: u32) -> Eight { return a_ints8(i, k); }
fn b_eight(i: u32, k: u32) -> Eight { return b_ints8(i, k); }
fn a_segment_factor(i: u32, k: u32) -> f32 { return a_factor(i, k); }
fn b_segment_factor(i: u32, k: u32) -> f32 { return b_factor(i, k); }

fn dots(x: u32, b: vec4<u32>) -> vec4<i32> {
    return vec4<i32>(dot4I8Packed(x, b.x), dot4I8Packed(x, b.y), dot4I8Packed(x, b.z), dot4I8Packed(x, b.w));
}

fn accumulate(sums: ptr<function, array<vec4<f32>, TM * TN / 4u>>, ty: u32, tx: u32) {
    for (var segment = 0u; segment < SEGMENTS; segment++) {
        var s: array<vec4<i32>, TM * TN / 4u>;
        for (var i = 0u; i < TM * TN / 4u; i++) { s[i] = vec4<i32>(MAGIC); }
        for (var w = segment * SEGMENT_WORDS; w < (segment + 1u) * SEGMENT_WORDS; w++) {
            let row = w * (ROWS / 4u);
            var b: array<vec4<u32>, TN / 4u>;
            for (var j = 0u; j < TN / 4u; j++) { b[j] = memory[row + BM / 4u + j * ACROSS + tx]; }
            for (var i = 0u; i < TM / 4u; i++) {
                let a = memory[row + i * DOWN + ty];
                for (var j = 0u; j < TN / 4u; j++) {
                    s[(4u * i + 0u) * (TN / 4u) + j] += dots(a.x, b[j]);
                    s[(4u * i + 1u) * (TN / 4u) + j] += dots(a.y, b[j]);
                    s[(4u * i + 2u) * (TN / 4u) + j] += dots(a.z, b[j]);
                    s[(4u * i + 3u) * (TN / 4u) + j] += dots(a.w, b[j]);
                }
            }
        }
        for (var j = 0u; j < TN / 4u; j++) {
            let at = segment * ROWS + BM + (j * ACROSS + tx) * 4u;
            let fb = vec4<f32>(factors[at], factors[at + 1u], factors[at + 2u], factors[at + 3u]);
            for (var i = 0u; i < TM; i++) {
                let fa = factors[segment * ROWS + i / 4u * (DOWN * 4u) + ty * 4u + i % 4u];
                let n = i * (TN / 4u) + j;
                // Exact products: fused or not, the sum is the same.
                (*sums)[n] = fma(bitcast<vec4<f32>>(s[n]) - vec4<f32>(12582912.0), fb * fa, (*sums)[n]);
            }
        }
    }
}
