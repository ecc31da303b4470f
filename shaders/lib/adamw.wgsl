// The AdamW step of eight consecutive elements of a parameter, which is taken as one long row.
// Needs lib/threefry.wgsl, quads for w, and one of lib/moments_*.wgsl. Twin: Step in src/kernels/adamw.rs.

struct Params {
    quads: u32,         // of the parameter
    one: u32,           // 1
    rows: u32,
    cols: u32,
    key: vec4<u32>,     // of the random numbers, for w; m's and v's follow in z
    rest1: f32,         // 1 − beta1
    beta2: f32,
    rest2: f32,         // 1 − beta2
    root: f32,          // 1 / sqrt(1 − beta2^step)
    epsilon: f32,
    rate: f32,          // lr / (1 − beta1^step)
    decay: f32,         // lr · weight_decay
    carry: u32,         // the scale rule of the packed weight
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> grad: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> norm: array<vec4<f32>>;    // norm, factor, 1 if finite, tensor
@group(0) @binding(3) var<storage, read_write> w: array<w_Quad>;

struct Eight { lo: vec4<f32>, hi: vec4<f32> }
struct Moments { m: Eight, v: Eight }
struct Updated { w: Eight, moments: Moments }

// Random halves of a group for w (0), m (1), v (2), in the upper 16 bits.
fn draw(group: u32, what: u32) -> array<u32, 8> {
    return threefry_halves(threefry_group(vec2<u32>(), group, vec4<u32>(p.key.xy, p.key.z + what, p.key.w)));
}

// Up when what bf16 lacks, plus the random half, carries: the probability is exactly the fraction.
fn bf16_stochastic4(x: vec4<f32>, r: vec4<u32>) -> vec4<f32> {
    let bits = bitcast<vec4<u32>>(x);
    let special = (bits & vec4<u32>(0x7fffffffu)) >= vec4<u32>(0x7f800000u);
    return bitcast<vec4<f32>>(select((bits + (r >> vec4<u32>(16u))) & vec4<u32>(0xffff0000u), bits, special));
}

fn bf16_stochastic(x: Eight, r: array<u32, 8>) -> Eight {
    return Eight(bf16_stochastic4(x.lo, vec4<u32>(r[0], r[1], r[2], r[3])), bf16_stochastic4(x.hi, vec4<u32>(r[4], r[5], r[6], r[7])));
}

fn step4(g: vec4<f32>, w: ptr<function, vec4<f32>>, m: ptr<function, vec4<f32>>, v: ptr<function, vec4<f32>>) {
    *m += p.rest1 * (g - *m);
    *v = p.beta2 * *v + p.rest2 * (g * g);
    *w -= p.rate * (*m / (sqrt(*v) * p.root + p.epsilon)) + p.decay * *w;
}

// The group's new values, w as it will be stored. whole: the group has all eight elements; otherwise four.
fn updated(group: u32, block: u32, whole: bool) -> Updated {
    let at = 2u * group;
    let old = moments_get(group, block, whole);
    var g = Eight(grad[at], vec4<f32>());
    var x = Eight(w_get(w[at]), vec4<f32>());
    if (whole) {
        g.hi = grad[at + 1u];
        x.hi = w_get(w[at + 1u]);
    }
    let factor = norm[0].y;
    var w0 = x.lo; var m0 = old.m.lo; var v0 = old.v.lo;
    var w1 = x.hi; var m1 = old.m.hi; var v1 = old.v.hi;
    step4(g.lo * factor, &w0, &m0, &v0);
    step4(g.hi * factor, &w1, &m1, &v1);
    x = Eight(w0, w1);
    if (MASTER_BF16) { x = bf16_stochastic(x, draw(group, 0u)); }
    return Updated(x, Moments(Eight(m0, m1), Eight(v0, v1)));
}

fn w_put(group: u32, whole: bool, x: Eight) {
    w[2u * group] = w_set(x.lo);
    if (whole) { w[2u * group + 1u] = w_set(x.hi); }
}
