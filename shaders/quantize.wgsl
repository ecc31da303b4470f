// quantize: rows of x → codes and scales, blocks along the rows; one unit of a block an invocation.
// Layout:   x[rows, cols] · codes[rows, blocks · BLOCK · BITS/32 words] · scales[rows, blocks bytes], tight
// Numerics: integer-only; bit-exact with the twin, NaN, ±0 and subnormals included. OCP MX v1.0, section 6.3.
// Dispatch: ceil(rows · blocks · BLOCK / UNIT / WG) workgroups, spread over x and y
// Twin:     src/kernels/quantize.rs

struct Params {
    rows: u32,              // of x, in this dispatch
    cols: u32,              // logical
    blocks: u32,            // of a row, the last one padded
    x_offset: u32,          // elements before the first row
    codes_offset: u32,      // units before the first row
    scales_offset: u32,     // words before the first row
    carry: u32,             // the scale rule, see scale_from_amax
    tensor_scale: u32,      // f32 bits, or 0: from the amax in `state`
    key: vec4<u32>,         // of the random numbers
    counter: vec2<u32>,     // of the first row's first group
    groups: u32,            // random groups of a row, ceil(cols / 8)
    one: u32,               // 1
    anchor_row: u32,        // of the tensor's anchors, the first row's of this dispatch
}

// What the host can ask about afterwards: [0] blocks with NaN or infinity, [1] the tensor's amax (an input),
// [2] its scale (written here), both NVFP4's and f32 bits; then the anchors.
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<XWord>;
@group(0) @binding(2) var<storage, read_write> codes: array<CodesWord>;
@group(0) @binding(3) var<storage, read_write> scales: array<u32>;
@group(0) @binding(4) var<storage, read_write> state: array<atomic<u32>>;

const LANES = BLOCK / UNIT;                 // invocations of a block
const WG_BLOCKS = WG / LANES;

var<workgroup> wg_scales: array<u32, WG_BLOCKS>;

@compute @workgroup_size(WG)
fn main(in: Invocation) {
    let lane = invocation_lane(in);
    let first = (in.wg.y * in.wgs.x + in.wg.x) * WG;
    let unit = first + lane;
    let units = p.blocks * LANES;           // of a row
    let live = unit < p.rows * units;
    var row = 0u;
    var col = 0u;
    if (!CONTIGUOUS) {
        row = unit / units;
        col = (unit - row * units) * UNIT;
    }

    var a = array<u32, 8>();
    var b = array<u32, 8>();
    if (live) {
        if (CONTIGUOUS) {
            a = load8(p.x_offset + unit * UNIT);
            b = load8(p.x_offset + unit * UNIT + 8u);
        } else {
            let at = p.x_offset + row * p.cols + col;
            a = load8_within(at, col, p.cols);
            b = load8_within(at + 8u, col + 8u, p.cols);
        }
    }
    // Drawn here, while the loads are on their way.
    var ra = array<u32, 8>();
    var rb = array<u32, 8>();
    if (STOCHASTIC) {
        var group = unit * 2u;
        if (!CONTIGUOUS) { group = row * p.groups + col / 8u; }
        ra = threefry_halves(threefry_group(p.counter, group, p.key));
        rb = threefry_halves(threefry_group(p.counter, group + 1u, p.key));
    }
    let amax = block_amax(max(amax8(a), amax8(b)), lane);

    var ts = p.tensor_scale;
    if (TENSOR_SCALED) {
        if (ts == 0u) { ts = tensor_scale_from_amax(atomicLoad(&state[1])); }
        if (unit == 0u) { atomicStore(&state[2], ts); }
    }
    let scale = scale_from_amax(amax, p.carry, ts);
    if (lane % LANES == 0u) {
        wg_scales[lane / LANES] = select(0u, scale, live);
        if (live && scale == SCALE_NAN) { atomicAdd(&state[0], 1u); }
    }

    if (live) {
        var c = Codes();
        if (scale != SCALE_NAN) { c = encode16(a, b, scale, ts, ra, rb); }
        codes_store(p.codes_offset + unit, c);
    }

    workgroupBarrier();
    if (lane < WG_BLOCKS / 4u) {
        let block = first / LANES + lane * 4u;
        if (block < p.rows * p.blocks) {
            let s = vec4<u32>(wg_scales[lane * 4u], wg_scales[lane * 4u + 1u], wg_scales[lane * 4u + 2u], wg_scales[lane * 4u + 3u]);
            scales[p.scales_offset + block / 4u] = s.x | (s.y << 8u) | (s.z << 16u) | (s.w << 24u);
            let line = block / p.blocks;
            if ((block + 3u) / p.blocks == line) {
                anchor_raise(p.anchor_row + line, max(max(anchor_of(s.x), anchor_of(s.y)), max(anchor_of(s.z), anchor_of(s.w))));
            } else {
                // Lines end among the four, or the tensor does.
                for (var i = 0u; i < min(4u, p.rows * p.blocks - block); i++) {
                    anchor_raise(p.anchor_row + (block + i) / p.blocks, anchor_of(wg_scales[lane * 4u + i]));
                }
            }
        }
    }
}
