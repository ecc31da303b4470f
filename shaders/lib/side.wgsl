// One side of shaders/quantize_both.wgsl: an invocation takes a unit of a line from the tile, transforms and encodes it.
// Compiled once a side, in a namespace of its own (Source::module). Twin: src/kernels/quantize_both.rs.
//
// The Walsh-Hadamard matrix of size 16 · PARTS is the Kronecker product of one of size PARTS, across a group's units, and
// one of size 16 within a unit. Additions come in one order, strides from the largest to 1: a butterfly of any stride gives
// a + b and a − b. Those across units are in lib/outer_*.wgsl.

const LANES = BLOCK / UNIT;                 // invocations of a block
const WG_BLOCKS = WG / LANES;
const LINE_UNITS = select(TILE_COLS, TILE_ROWS, COLUMNS) / UNIT;
const DRAWS_PITCH = TILE_COLS / 2u + 1u;
// Smaller magnitudes are zeros to the transform, so that every sum is a multiple of 2^-121 and none is subnormal; a group
// with larger ones is NaN, so that no sum overflows.
const SMALLEST = 0x0e800000u;               // 2^-98
const TOO_LARGE = 0x7b800000u;              // 2^120

// The random words of a tile drawn for columns: a word has the halves of two columns.
var<workgroup> wg_draws: array<u32, DRAWS>;
var<workgroup> wg_finite: atomic<u32>;

alias Unit16 = array<vec4<u32>, 4>;

// What comes before the tile's barrier; row0 is x's.
fn prepare(row0: u32, col0: u32, lane: u32) {
    if (AMAX_ONLY && lane == 0u) { atomicStore(&wg_finite, 0u); }
    if (!DRAWS_TILE) { return; }
    for (var i = 0u; i < TILE / 8u / WG; i++) {
        let at = i * WG + lane;
        let row = at / (TILE_COLS / 8u);
        let group = at % (TILE_COLS / 8u);
        let w = threefry_group(vec2<u32>(), (row0 + row) * row_groups() + col0 / 8u + group, p.sides[SIDE].key);
        let to = row * DRAWS_PITCH + group * 4u + skew(row);
        wg_draws[to] = w.x;
        wg_draws[to + 1u] = w.y;
        wg_draws[to + 2u] = w.z;
        wg_draws[to + 3u] = w.w;
    }
}

// Eight rows' random halves of a column of the tile, in the upper 16 bits.
fn drawn(col: u32, row: u32) -> array<u32, 8> {
    let at = row * DRAWS_PITCH + col / 2u + skew(row);
    let shift = 16u * (1u - (col & 1u));
    return array<u32, 8>(wg_draws[at] << shift, wg_draws[at + DRAWS_PITCH] << shift,
                         wg_draws[at + 2u * DRAWS_PITCH] << shift, wg_draws[at + 3u * DRAWS_PITCH] << shift,
                         wg_draws[at + 4u * DRAWS_PITCH] << shift, wg_draws[at + 5u * DRAWS_PITCH] << shift,
                         wg_draws[at + 6u * DRAWS_PITCH] << shift, wg_draws[at + 7u * DRAWS_PITCH] << shift);
}

// Four elements of a line of the tile.
fn tile_quad(line: u32, at: u32) -> vec4<u32> {
    if (COLUMNS) {
        let i = at * PITCH + line + skew(at);
        return vec4<u32>(wg_tile[i], wg_tile[i + PITCH], wg_tile[i + 2u * PITCH], wg_tile[i + 3u * PITCH]);
    }
    let i = line * PITCH + at + skew(line);
    return vec4<u32>(wg_tile[i], wg_tile[i + 1u], wg_tile[i + 2u], wg_tile[i + 3u]);
}

// Elements 4i to 4i + 3 of a unit, which is `part` of its group, as a transform adds them.
struct Summands { v: vec4<f32>, magnitude: vec4<u32> }

fn summands(line: u32, unit: u32, part: u32, i: u32) -> Summands {
    let bits = tile_quad(line, unit * UNIT + 4u * i);
    let magnitude = bits & vec4<u32>(0x7fffffffu);
    let s = p.sides[SIDE].signs[part / 2u] >> (part % 2u * 16u + 4u * i);
    let flipped = bits ^ (vec4<u32>(s << 31u, s << 30u, s << 29u, s << 28u) & vec4<u32>(0x80000000u));
    return Summands(bitcast<vec4<f32>>(select(flipped, vec4<u32>(), magnitude < vec4<u32>(SMALLEST))), magnitude);
}

fn transformed(line: u32, unit: u32) -> Unit16 {
    var u = Unit16();
    if (!HADAMARD) {
        for (var i = 0u; i < 4u; i++) { // unroll
            u[i] = tile_quad(line, unit * UNIT + 4u * i);
        }
        return u;
    }
    var largest = 0u;
    var v = array<vec4<f32>, 4>();
    for (var i = 0u; i < 4u; i++) { // unroll
        let outer = outer_quad(line, unit, i);
        v[i] = outer.v;
        largest = max(max(largest, max(outer.magnitude.x, outer.magnitude.y)), max(outer.magnitude.z, outer.magnitude.w));
    }
    let nan = outer_largest(largest) >= TOO_LARGE;
    let a0 = v[0] + v[2];
    let a1 = v[1] + v[3];
    let a2 = v[0] - v[2];
    let a3 = v[1] - v[3];
    v = array<vec4<f32>, 4>(a0 + a1, a0 - a1, a2 + a3, a2 - a3);
    for (var i = 0u; i < 4u; i++) { // unroll
        let c = vec4<f32>(v[i].xy + v[i].zw, v[i].xy - v[i].zw);
        // One zero: the sign of a difference of equals is not everywhere the same. A zero that the compiler cannot know.
        u[i] = bitcast<vec4<u32>>(vec4<f32>(c.x + c.y, c.x - c.y, c.z + c.w, c.z - c.w) * FACTOR + p.sides[SIDE].zero);
    }
    // One NaN makes its block NaN; for the tensor's amax none of the group may count.
    u[0].x = select(u[0].x, F32_NAN, nan);
    if (AMAX_ONLY && nan) { u = Unit16(); }
    return u;
}

// Three quarters of each, rounded to nearest even; NaN and infinity stay.
fn three_quarters(v: vec4<u32>) -> vec4<u32> {
    let magnitude = v & vec4<u32>(0x7fffffffu);
    let e = max(magnitude >> vec4<u32>(23u), vec4<u32>(1u));
    // In units of 2^(e - 152): a result of 24 bits loses two of them, and a smaller one is a binade down, unless it is subnormal.
    let m3 = 3u * (magnitude - ((e - 1u) << vec4<u32>(23u)));
    let down = select(vec4<u32>(), vec4<u32>(1u), (m3 < vec4<u32>(0x2000000u)) & (e > vec4<u32>(1u)));
    let shift = 2u - down;
    let rounded = (m3 + (1u - down) + ((m3 >> shift) & vec4<u32>(1u))) >> shift;
    let result = (v & vec4<u32>(0x80000000u)) | (((e - 1u - down) << vec4<u32>(23u)) + rounded);
    return select(result, v, magnitude >= vec4<u32>(F32_INFINITY));
}

fn finite4(v: vec4<u32>) -> u32 {
    let magnitude = v & vec4<u32>(0x7fffffffu);
    let m = select(vec4<u32>(), magnitude, magnitude < vec4<u32>(F32_INFINITY));
    return max(max(m.x, m.y), max(m.z, m.w));
}

// row0 is the matrix's.
fn run(matrix: u32, row0: u32, col0: u32, lane: u32) {
    let unit = lane % LINE_UNITS;
    let in_line = lane / LINE_UNITS;
    var u = transformed(in_line, unit);
    if (THREE_QUARTERS) {
        for (var i = 0u; i < 4u; i++) { // unroll
            u[i] = three_quarters(u[i]);
        }
    }
    if (AMAX_ONLY) {
        atomicMax(&wg_finite, max(max(finite4(u[0]), finite4(u[1])), max(finite4(u[2]), finite4(u[3]))));
        workgroupBarrier();
        if (lane == 0u) { atomicMax(&state[1], atomicLoad(&wg_finite)); }
        return;
    }
    let of_matrix = select(row0, col0, COLUMNS) + in_line;
    let lines = select(p.rows, p.cols, COLUMNS);
    let line = matrix * lines + of_matrix;
    let at = select(col0, row0, COLUMNS) + unit * UNIT;
    let len = select(p.cols, p.rows, COLUMNS);
    // Units of the last block's padding are written too.
    let live = matrix < p.matrices && of_matrix < lines && at / BLOCK * BLOCK < len;

    let a = array<u32, 8>(u[0].x, u[0].y, u[0].z, u[0].w, u[1].x, u[1].y, u[1].z, u[1].w);
    let b = array<u32, 8>(u[2].x, u[2].y, u[2].z, u[2].w, u[3].x, u[3].y, u[3].z, u[3].w);
    let amax = block_amax(max(amax8(a), amax8(b)), lane);
    let ts = tile_tensor_scale(0u, matrix + row0 + col0 + lane == 0u);
    let scale = scale_from_amax(amax, p.sides[SIDE].carry, ts);
    if (live && unit % LANES == 0u) { tile_put_scale(line * p.sides[SIDE].blocks + at / BLOCK, line, 0u, scale); }
    var c = Codes();
    if (live) {
        if (scale != SCALE_NAN) {
            var ra = array<u32, 8>();
            var rb = array<u32, 8>();
            if (DRAWS_TILE) {
                ra = drawn(in_line, unit * UNIT);
                rb = drawn(in_line, unit * UNIT + 8u);
            } else if (STOCHASTIC) {
                let group = line * row_groups() + at / 8u;
                ra = threefry_halves(threefry_group(vec2<u32>(), group, p.sides[SIDE].key));
                rb = threefry_halves(threefry_group(vec2<u32>(), group + 1u, p.sides[SIDE].key));
            }
            c = encode16(a, b, scale, ts, ra, rb);
        }
        codes_store(line * p.sides[SIDE].line_units + at / UNIT, c);
    }
    if (COUNT) {
        var n = vec4<u32>();
        if (live) {
            n = vec4<u32>(0u, 0u, u32(scale == SCALE_NAN && unit % LANES == 0u), min(max(at, len) - at, UNIT));
        }
        if (live && scale != SCALE_NAN) {
            for (var i = 0u; i < 8u; i++) { // unroll
                n.x += u32(mx_clips(a[i], scale, ts)) + u32(mx_clips(b[i], scale, ts));
                n.y += u32((a[i] << 1u) != 0u && (codes_get(c, i) & MAGNITUDE_MASK) == 0u);
                n.y += u32((b[i] << 1u) != 0u && (codes_get(c, i + 8u) & MAGNITUDE_MASK) == 0u);
            }
        }
        counters_add(SIDE, n);
    }
}
