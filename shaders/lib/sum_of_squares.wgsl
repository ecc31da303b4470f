// Sums of squares that neither overflow nor underflow: total · 4^(exponent − 127), with a total near one. Powers of two
// change no bit of a sum. Twin: src/kernels/gradient_norm.rs, in f64.
// A partial sum in memory: the total's bits, the exponent, the first tensor with a non-finite value or NONE, 0.

const NONE = 0xffffffffu;

struct Sum { total: f32, exponent: u32 }

// 4^−d, or zero where it no longer counts.
fn shrink(d: u32) -> f32 { return bitcast<f32>(u32(max(127 - 2 * i32(d), 0)) << 23u); }

fn plus(a: Sum, b: Sum) -> Sum {
    let exponent = max(a.exponent, b.exponent);
    return Sum(a.total * shrink(exponent - a.exponent) + b.total * shrink(exponent - b.exponent), exponent);
}

var<workgroup> wg_total: array<f32, WG>;
var<workgroup> wg_exponent: array<u32, WG>;
var<workgroup> wg_tensor: array<u32, WG>;

// The workgroup's sum in a fixed order, and the smallest of the tensors, into element 0, for invocation 0 to read.
fn reduce(lane: u32, sum: Sum, tensor: u32) {
    wg_total[lane] = sum.total;
    wg_exponent[lane] = sum.exponent;
    wg_tensor[lane] = tensor;
    for (var half = WG / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if (lane < half) {
            let s = plus(Sum(wg_total[lane], wg_exponent[lane]), Sum(wg_total[lane + half], wg_exponent[lane + half]));
            wg_total[lane] = s.total;
            wg_exponent[lane] = s.exponent;
            wg_tensor[lane] = min(wg_tensor[lane], wg_tensor[lane + half]);
        }
    }
}
