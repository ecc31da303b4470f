// select_magnitude: the highest bin of a histogram above which at most `above` elements lie. The first round leaves the bin
// and how many may still lie above within it; the second one the threshold.
// Layout:   bins: see magnitudes.wgsl; behind the histograms [0] the first round's bin, [1] what is left of `above` ·
//           threshold[1], f32 bits
// Numerics: exact
// Dispatch: one workgroup
// Twin:     src/kernels/outliers.rs

struct Params { above: u32 }

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read_write> bins: array<u32>;
@group(0) @binding(2) var<storage, read_write> threshold: array<u32>;

const STRIP = BINS / WG;

var<workgroup> wg_sums: array<u32, WG>;

@compute @workgroup_size(WG)
fn main(@builtin(local_invocation_index) lane: u32) {
    var sum = 0u;
    for (var i = 0u; i < STRIP; i++) { sum += bins[ROUND * BINS + lane * STRIP + i]; }
    wg_sums[lane] = sum;
    workgroupBarrier();
    if (lane != 0u) { return; }
    var left = p.above;
    if (ROUND == 1u) { left = bins[2u * BINS + 1u]; }
    // From the top: strips, then the bins of the one in which it ends. Bin 0 takes what is left.
    var strip = WG - 1u;
    while (strip > 0u && wg_sums[strip] <= left) {
        left -= wg_sums[strip];
        strip--;
    }
    var bin = strip * STRIP + STRIP - 1u;
    while (bin > strip * STRIP && bins[ROUND * BINS + bin] <= left) {
        left -= bins[ROUND * BINS + bin];
        bin--;
    }
    if (ROUND == 0u) {
        bins[2u * BINS] = bin;
        bins[2u * BINS + 1u] = left;
    } else {
        threshold[0] = min((bins[2u * BINS] << 20u) | (bin << SHIFT) | LOW, LARGEST);
    }
}
