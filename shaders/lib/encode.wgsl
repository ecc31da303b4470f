// Sixteen codes by mx_encode, one at a time: every format. Twin: Job::encode in src/kernels/quantize.rs.

fn encode16(a: array<u32, 8>, b: array<u32, 8>, scale: u32, ts: u32, ra: array<u32, 8>, rb: array<u32, 8>) -> Codes {
    return pack16(encode8(a, scale, ts, ra), encode8(b, scale, ts, rb));
}
