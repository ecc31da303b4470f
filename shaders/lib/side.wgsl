// One side of shaders/quantize_both.wgsl: an invocation takes a unit of a line from the tile, transforms and encodes it.
// Compiled once a side, in a namespace of its own (Source::module). Twin: src/kernels/quantize_both.rs.
//
// The Walsh-Hadamard matrix of size 16 · PARTS is the Kronecker product of one of size PARTS, across a group's units, and
// one of size 16 within a unit. An invocation makes its own row of the first from the group's untouched units, so nothing
// is exchanged. Additions come in one order, strides from the largest to 1: a butterfly of any stride gives a + b and a − b.

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
        let to = row * DRAWS_PITCH + group * 4u;
        wg_draws[to] = w.x;
        wg_draws[to + 1u] = w.y;
        wg_draws[to + 2u] = w.z;
        wg_draws[to + 3u] = w.w;
    }
}

// Eight rows' random halves of a column of the tile, in the upper 16 bits.
fn drawn(col: u32, row: u32) -> array<u32, 8> {
    let at = row * DRAWS_PITCH + col / 2u;
    let shift = 16u * (1u - (col & 1u));
    return array<u32, 8>(wg_draws[at] << shift, wg_draws[at + DRAWS_PITCH] << shift,
                         wg_draws[at + 2u * DRAWS_PITCH] << shift, wg_draws[at + 3u * DRAWS_PITCH] << shift,
                         wg_draws[at + 4u * DRAWS_PITCH] << shift, wg_draws[at + 5u * DRAWS_PITCH] << shift,
                         wg_draws[at + 6u * DRAWS_PITCH] << shift, wg_draws[at + 7u * DRAWS_PITCH] << shift);
}

// Four elements of a line of the tile.
fn tile_quad(line: u32, at: u32) -> vec4<u32> {
    if (COLUMNS) {
        let i = at * PITCH + line;
        return vec4<u32>(wg_tile[i], wg_tile[i + PITCH], wg_tile[i + 2u * PITCH], wg_tile[i + 3u * PITCH]);
    }
    let i = line * PITCH + at;
    return vec4<u32>(wg_tile[i], wg_tile[i + 1u], wg_tile[i + 2u], wg_tile[i + 3u]);
}

fn transformed(line: u32, unit: u32) -> Unit16 {
    var u = Unit16();
    if (!HADAMARD) {
        for (var i = 0u; i < 4u; i++) { // unroll
            u[i] = tile_quad(line, unit * UNIT + 4u * i);
        }
        return u;
    }
    let group = unit / PARTS * PARTS;
    // This unit's row of the outer matrix: the sign of each stride's second operand.
    let f4 = select(1.0, -1.0, (unit & 4u) != 0u);
    let f2 = select(1.0, -1.0, (unit & 2u) != 0u);
    let f1 = select(1.0, -1.0, (unit & 1u) != 0u);
    var largest = vec4<u32>();
    var v = array<vec4<f32>, 4>();
    for (var i = 0u; i < 4u; i++) { // unroll
        var t = array<vec4<f32>, 8>();
        for (var j = 0u; j < PARTS; j++) { // unroll
            let bits = tile_quad(line, (group + j) * UNIT + 4u * i);
            let magnitude = bits & vec4<u32>(0x7fffffffu);
            largest = max(largest, magnitude);
            let s = p.sides[SIDE].signs[j / 2u] >> (j % 2u * 16u + 4u * i);
            let flipped = bits ^ (vec4<u32>(s << 31u, s << 30u, s << 29u, s << 28u) & vec4<u32>(0x80000000u));
            t[j] = bitcast<vec4<f32>>(select(flipped, vec4<u32>(), magnitude < vec4<u32>(SMALLEST)));
        }
        if (PARTS > 4u) {
            t[0] += t[4] * f4;
            t[1] += t[5] * f4;
            t[2] += t[6] * f4;
            t[3] += t[7] * f4;
        }
        if (PARTS > 2u) {
            t[0] += t[2] * f2;
            t[1] += t[3] * f2;
        }
        if (PARTS > 1u) { t[0] += t[1] * f1; }
        v[i] = t[0];
    }
    let a0 = v[0] + v[2];
    let a1 = v[1] + v[3];
    let a2 = v[0] - v[2];
    let a3 = v[1] - v[3];
    v = array<vec4<f32>, 4>(a0 + a1, a0 - a1, a2 + a3, a2 - a3);
    let nan = max(max(largest.x, largest.y), max(largest.z, largest.w)) >= TOO_LARGE;
    for (var i = 0u; i < 4u; i++) { // unroll
        let c = vec4<f32>(v[i].xy + v[i].zw, v[i].xy - v[i].zw);
        let d = bitcast<vec4<u32>>(vec4<f32>(c.x + c.y, c.x - c.y, c.z + c.w, c.z - c.w) * FACTOR);
        // One zero: the sign of a difference of equals is not everywhere the same.
        u[i] = select(select(d, vec4<u32>(), (d << vec4<u32>(1u)) == vec4<u32>()), vec4<u32>(F32_NAN), vec4<bool>(nan));
    }
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
