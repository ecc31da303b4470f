// adamw: one step of AdamW on one parameter, eight consecutive elements an invocation; nothing where norm says not finite.
// Layout:   grad[quads], w[quads], moments as lib/moments_*.wgsl · norm[4] of gradient_norm_total.wgsl
// Numerics: f32, bounded; what is stored in fewer bits is rounded stochastically
// Dispatch: ceil(quads / (2 · WG)) workgroups, spread over x and y
// Twin:     src/kernels/adamw.rs

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    let index = wg.y * wgs.x + wg.x;
    let group = index * WG + lane;
    let slot = lane / LANES;
    let block = index * SLOTS + slot;
    let live = norm[0].z != 0.0 && 2u * group < p.quads;
    let whole = 2u * group + 1u < p.quads;
    moments_clear(lane);
    if (MOMENTS_SHARE) { workgroupBarrier(); }
    var x = Updated();
    if (live) {
        x = updated(group, block, whole);
        moments_amax(slot, x.moments);
    }
    if (MOMENTS_SHARE) { workgroupBarrier(); }
    if (live) {
        w_put(group, whole, x.w);
        moments_put(group, block, slot, lane % LANES == 0u, whole, x.moments);
    }
}
