// Moments in eight bits: m as E4M3, v as the square of an unsigned E4M4, each under a power of two a block of 128; rounded
// stochastically, v so that its own expectation is kept. Definitions, reasons and twin: src/kernels/adamw/fp8.rs.

@group(0) @binding(4) var<storage, read_write> moments: array<vec4<u32>>;  // a group: eight codes of m, eight of v
@group(0) @binding(5) var<storage, read_write> units: array<u32>;          // a block: m's scale, v's in byte 1

const MOMENTS_SHARE = true;
const M_SCALE_MIN = 10u;
const V_SCALE_MIN = 64u;
const V_SCALE_MAX = 171u;
const F32_LARGEST = 0x7f7fffffu;

var<workgroup> wg_m: array<atomic<u32>, SLOTS>;
var<workgroup> wg_v: array<atomic<u32>, SLOTS>;

fn m_scale(amax: u32) -> u32 {
    let a = min(amax, F32_LARGEST);
    return u32(max(i32(a >> 23u) - 8 + i32((a & 0x7fffffu) > 0x600000u), i32(M_SCALE_MIN)));
}

fn v_scale(amax: u32) -> u32 {
    let a = min(amax, F32_LARGEST);
    let e = i32(a >> 23u) - 127 + i32((a & 0x7fffffu) > 0x704000u);
    return u32(clamp(((e - 36) >> 1u) + 127, i32(V_SCALE_MIN), i32(V_SCALE_MAX)));
}

fn m_decode(code: u32, scale: u32) -> f32 {
    let magnitude = code & 0x7fu;
    let k = max(magnitude >> 3u, 1u) - 1u;
    let x = f32(magnitude - 8u * k) * bitcast<f32>((k + scale - 9u) << 23u);
    return select(x, -x, (code & 0x80u) != 0u);
}

fn v_decode(code: u32, scale: u32) -> f32 {
    let k = max(code >> 4u, 1u) - 1u;
    let root = code - 16u * k;
    return f32(root * root) * bitcast<f32>((127u + 2u * (k + scale) - 254u) << 23u);
}

// The 24-bit significand of a normal number; zero for what is below.
fn significand(bits: u32) -> u32 { return select(0u, (bits & 0x7fffffu) | 0x800000u, (bits >> 23u) != 0u); }

fn m_encode(x: u32, scale: u32, r: u32) -> u32 {
    let a = min(x & 0x7fffffffu, F32_LARGEST);
    let d = i32(a >> 23u) - i32(scale) + 6;
    let fixed = (significand(a) << 7u) >> u32(clamp(-d, 0, 31));
    let increment = ((r >> 16u) << 11u) | (1u << 10u);
    return ((x >> 24u) & 0x80u) | min((u32(max(d, 0)) << 3u) + ((fixed + increment) >> 27u), 0x7eu);
}

fn v_encode(x: u32, scale: u32, r: u32) -> u32 {
    let a = min(x & 0x7fffffffu, F32_LARGEST);
    // v in squared units of the code: significand · 2^(e − 23), then in those of the code's binade k.
    let e = i32(a >> 23u) - 127 - 2 * (i32(scale) - 127);
    let k = clamp((e - 8) >> 1u, 0, 14);
    let up = min(e - 2 * k - 8, 1);
    // 15 bits after the point.
    let square = select(significand(a) << u32(max(up, 0)), significand(a) >> u32(clamp(-up, 0, 31)), up < 0);
    let whole = square >> 15u;
    var root = u32(sqrt(f32(max(whole, 1u))));
    if (root * root > whole) { root -= 1u; }
    if ((root + 1u) * (root + 1u) <= whole) { root += 1u; }
    // Between root² and (root + 1)², up with the probability that keeps the expectation of the square.
    let rest = square - ((root * root) << 15u);
    root += u32(4u * rest >= (2u * root + 1u) * (131071u - 2u * (r >> 16u)));
    // Never to zero.
    root = max(root, u32(a != 0u));
    return min(16u * u32(k) + root, 255u);
}

fn m_word(x: vec4<f32>, scale: u32, r: vec4<u32>) -> u32 {
    let b = bitcast<vec4<u32>>(x);
    return m_encode(b.x, scale, r.x) | (m_encode(b.y, scale, r.y) << 8u) | (m_encode(b.z, scale, r.z) << 16u) | (m_encode(b.w, scale, r.w) << 24u);
}

fn v_word(x: vec4<f32>, scale: u32, r: vec4<u32>) -> u32 {
    let b = bitcast<vec4<u32>>(x);
    return v_encode(b.x, scale, r.x) | (v_encode(b.y, scale, r.y) << 8u) | (v_encode(b.z, scale, r.z) << 16u) | (v_encode(b.w, scale, r.w) << 24u);
}

fn m_quad(word: u32, scale: u32) -> vec4<f32> {
    return vec4<f32>(m_decode(word & 0xffu, scale), m_decode((word >> 8u) & 0xffu, scale), m_decode((word >> 16u) & 0xffu, scale), m_decode(word >> 24u, scale));
}

fn v_quad(word: u32, scale: u32) -> vec4<f32> {
    return vec4<f32>(v_decode(word & 0xffu, scale), v_decode((word >> 8u) & 0xffu, scale), v_decode((word >> 16u) & 0xffu, scale), v_decode(word >> 24u, scale));
}

fn moments_get(group: u32, block: u32, whole: bool) -> Moments {
    let c = moments[group];
    let unit = units[block];
    // A new state is all zero, scales too.
    let ms = max(unit & 0xffu, M_SCALE_MIN);
    let vs = clamp((unit >> 8u) & 0xffu, V_SCALE_MIN, V_SCALE_MAX);
    return Moments(Eight(m_quad(c.x, ms), m_quad(c.y, ms)), Eight(v_quad(c.z, vs), v_quad(c.w, vs)));
}

fn moments_clear(lane: u32) {
    if (lane < SLOTS) {
        atomicStore(&wg_m[lane], 0u);
        atomicStore(&wg_v[lane], 0u);
    }
}

fn eight_amax(x: Eight) -> u32 {
    let a = max(bitcast<vec4<u32>>(x.lo) & vec4<u32>(0x7fffffffu), bitcast<vec4<u32>>(x.hi) & vec4<u32>(0x7fffffffu));
    return max(max(a.x, a.y), max(a.z, a.w));
}

fn moments_amax(slot: u32, x: Moments) {
    atomicMax(&wg_m[slot], eight_amax(x.m));
    atomicMax(&wg_v[slot], eight_amax(x.v));
}

// After a barrier. first: of the block's invocations.
fn moments_put(group: u32, block: u32, slot: u32, first: bool, whole: bool, x: Moments) {
    let ms = m_scale(atomicLoad(&wg_m[slot]));
    let vs = v_scale(atomicLoad(&wg_v[slot]));
    if (first) { units[block] = ms | (vs << 8u); }
    let r = draw(group, 1u);
    let s = draw(group, 2u);
    moments[group] = vec4<u32>(m_word(x.m.lo, ms, vec4<u32>(r[0], r[1], r[2], r[3])), m_word(x.m.hi, ms, vec4<u32>(r[4], r[5], r[6], r[7])),
                               v_word(x.v.lo, vs, vec4<u32>(s[0], s[1], s[2], s[3])), v_word(x.v.hi, vs, vec4<u32>(s[4], s[5], s[6], s[7])));
}
