// Sixteen codes by mx_encode, one at a time: every format. Twin: Job::encode in src/kernels/quantize.rs.

// Eight codes; r holds an element's random half in its upper 16 bits.
fn encode8(v: array<u32, 8>, scale: u32, ts: u32, r: array<u32, 8>) -> array<u32, 8> {
    return array<u32, 8>(mx_encode(v[0], scale, ts, r[0] >> 16u), mx_encode(v[1], scale, ts, r[1] >> 16u),
                         mx_encode(v[2], scale, ts, r[2] >> 16u), mx_encode(v[3], scale, ts, r[3] >> 16u),
                         mx_encode(v[4], scale, ts, r[4] >> 16u), mx_encode(v[5], scale, ts, r[5] >> 16u),
                         mx_encode(v[6], scale, ts, r[6] >> 16u), mx_encode(v[7], scale, ts, r[7] >> 16u));
}

fn encode16(a: array<u32, 8>, b: array<u32, 8>, scale: u32, ts: u32, ra: array<u32, 8>, rb: array<u32, 8>) -> Codes {
    return pack16(encode8(a, scale, ts, ra), encode8(b, scale, ts, rb));
}
