// Sixteen codes by mx_encode, one at a time: every format. Twin: Job::encode in src/kernels/quantize.rs.

// Eight codes; r holds their random halves, low ones first.
fn encode8(v: array<u32, 8>, scale: u32, ts: u32, r: vec4<u32>) -> array<u32, 8> {
    return array<u32, 8>(mx_encode(v[0], scale, ts, r.x & 0xffffu), mx_encode(v[1], scale, ts, r.x >> 16u),
                         mx_encode(v[2], scale, ts, r.y & 0xffffu), mx_encode(v[3], scale, ts, r.y >> 16u),
                         mx_encode(v[4], scale, ts, r.z & 0xffffu), mx_encode(v[5], scale, ts, r.z >> 16u),
                         mx_encode(v[6], scale, ts, r.w & 0xffffu), mx_encode(v[7], scale, ts, r.w >> 16u));
}

fn encode16(a: array<u32, 8>, b: array<u32, 8>, scale: u32, ts: u32, ra: vec4<u32>, rb: vec4<u32>) -> Codes {
    return pack16(encode8(a, scale, ts, ra), encode8(b, scale, ts, rb));
}
