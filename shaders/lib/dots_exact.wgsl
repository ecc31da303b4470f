// The exact tier's inner loop: integer dot products of a segment, scaled and added in ascending order.

alias Word = u32;
// What is fetched ahead of a unit: the codes as they are.
alias Raw = vec2<u32>;
const WORDS = 8u;
const SEGMENT_WORDS = WORDS / SEGMENTS;
// The integer sum s is counted from the bits of 1.5 · 2^23, so that they are the float 1.5 · 2^23 + s, |s| < 2^22.
const MAGIC = 0x4b400000i;

var<workgroup> factors: array<f32, ROWS * SEGMENTS>;

fn fetch_a(i: u32, k: u32) -> Raw { return a_raw8(i, k); }
fn fetch_b(i: u32, k: u32) -> Raw { return b_raw8(i, k); }

fn stage_a(r: u32, part: u32, i: u32, k: u32, raw: Raw) { stage(r, part, a_ints(raw)); }
fn stage_b(r: u32, part: u32, i: u32, k: u32, raw: Raw) { stage(r, part, b_ints(raw)); }

fn stage(r: u32, part: u32, words: vec2<u32>) {
    memory[(part * 2u) * (ROWS / 4u) + r / 4u][r % 4u] = words.x;
    memory[(part * 2u + 1u) * (ROWS / 4u) + r / 4u][r % 4u] = words.y;
}

fn fetch_scale_a(i: u32, k: u32) -> u32 { return a_scale(i, k); }
fn fetch_scale_b(i: u32, k: u32) -> u32 { return b_scale(i, k); }
fn stage_factor_a(at: u32, i: u32, scale: u32) { factors[at] = a_factor(scale, a_anchor(i)); }
fn stage_factor_b(at: u32, i: u32, scale: u32) { factors[at] = b_factor(scale, b_anchor(i)); }

fn dots(x: u32, b: vec4<u32>) -> vec4<i32> {
    return vec4<i32>(dot4I8Packed(x, b.x), dot4I8Packed(x, b.y), dot4I8Packed(x, b.z), dot4I8Packed(x, b.w));
}

fn accumulate(sums: ptr<function, array<vec4<f32>, TM * TN / 4u>>, ty: u32, tx: u32) {
    for (var segment = 0u; segment < SEGMENTS; segment++) {
        var s: array<vec4<i32>, TM * TN / 4u>;
        for (var i = 0u; i < TM * TN / 4u; i++) { // unroll
            s[i] = vec4<i32>(MAGIC);
        }
        // Two words at a time: on NVIDIA's devices a sum of three takes one instruction, of the pipe that dot products do not
        // use, and drivers do not add within the dot product.
        for (var w = 0u; w < SEGMENT_WORDS; w += 2u) {
            let row = (segment * SEGMENT_WORDS + w) * (ROWS / 4u);
            let next = row + ROWS / 4u;
            var b: array<vec4<u32>, TN / 4u>;
            var d: array<vec4<u32>, TN / 4u>;
            for (var j = 0u; j < TN / 4u; j++) { // unroll
                b[j] = memory[row + BM / 4u + j * ACROSS + tx];
                d[j] = memory[next + BM / 4u + j * ACROSS + tx];
            }
            for (var i = 0u; i < TM / 4u; i++) { // unroll
                let a = memory[row + i * DOWN + ty];
                let c = memory[next + i * DOWN + ty];
                for (var j = 0u; j < TN / 4u; j++) { // unroll
                    s[(4u * i + 0u) * (TN / 4u) + j] += dots(a.x, b[j]) + dots(c.x, d[j]);
                    s[(4u * i + 1u) * (TN / 4u) + j] += dots(a.y, b[j]) + dots(c.y, d[j]);
                    s[(4u * i + 2u) * (TN / 4u) + j] += dots(a.z, b[j]) + dots(c.z, d[j]);
                    s[(4u * i + 3u) * (TN / 4u) + j] += dots(a.w, b[j]) + dots(c.w, d[j]);
                }
            }
        }
        for (var j = 0u; j < TN / 4u; j++) { // unroll
            let at = segment * ROWS + BM + (j * ACROSS + tx) * 4u;
            let fb = vec4<f32>(factors[at], factors[at + 1u], factors[at + 2u], factors[at + 3u]);
            for (var i = 0u; i < TM; i++) { // unroll
                let fa = factors[segment * ROWS + i / 4u * (DOWN * 4u) + ty * 4u + i % 4u];
                let n = i * (TN / 4u) + j;
                // Exact products: fused or not, the sum is the same. A power of two may come before the subtraction.
                if (A_SCALE_E4M3) {
                    (*sums)[n] = fma(bitcast<vec4<f32>>(s[n]) - vec4<f32>(12582912.0), fb * fa, (*sums)[n]);
                } else {
                    (*sums)[n] = fma(fma(bitcast<vec4<f32>>(s[n]), vec4<f32>(fa), vec4<f32>(-12582912.0 * fa)), fb, (*sums)[n]);
                }
            }
        }
    }
}
