// Moments in f32, or in bf16 rounded stochastically. Needs quads for m and v. Twin: src/kernels/adamw.rs.

@group(0) @binding(4) var<storage, read_write> m: array<m_Quad>;
@group(0) @binding(5) var<storage, read_write> v: array<v_Quad>;

const MOMENTS_SHARE = false;

fn moments_get(group: u32, block: u32, whole: bool) -> Moments {
    let at = 2u * group;
    var x = Moments(Eight(m_get(m[at]), vec4<f32>()), Eight(v_get(v[at]), vec4<f32>()));
    if (whole) {
        x.m.hi = m_get(m[at + 1u]);
        x.v.hi = v_get(v[at + 1u]);
    }
    return x;
}

fn moments_clear(lane: u32) {}
fn moments_amax(slot: u32, x: Moments) {}

fn moments_put(group: u32, block: u32, slot: u32, first: bool, whole: bool, exact: Moments) {
    let at = 2u * group;
    var x = exact;
    if (MOMENTS_BF16) { x = Moments(bf16_stochastic(x.m, draw(group, 1u)), bf16_stochastic(x.v, draw(group, 2u))); }
    m[at] = m_set(x.m.lo);
    v[at] = v_set(x.v.lo);
    if (whole) {
        m[at + 1u] = m_set(x.m.hi);
        v[at + 1u] = v_set(x.v.hi);
    }
}
