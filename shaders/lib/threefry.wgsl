// Threefry-4x32-13, counted by logical element index. Source and twin: src/rng.rs.

// Needs add and add4 from lib/add*.wgsl.

fn threefry_rotl(x: u32, n: u32) -> u32 { return (x << n) | (x >> (32u - n)); }

// Four rounds; the partners of words 0 and 2 alternate.
fn threefry_rounds(v: vec4<u32>, r0: vec4<u32>, r1: vec4<u32>) -> vec4<u32> {
    var x = v;
    x.x = add(x.x, x.y); x.y = threefry_rotl(x.y, r0.x) ^ x.x; x.z = add(x.z, x.w); x.w = threefry_rotl(x.w, r0.y) ^ x.z;
    x.x = add(x.x, x.w); x.w = threefry_rotl(x.w, r0.z) ^ x.x; x.z = add(x.z, x.y); x.y = threefry_rotl(x.y, r0.w) ^ x.z;
    x.x = add(x.x, x.y); x.y = threefry_rotl(x.y, r1.x) ^ x.x; x.z = add(x.z, x.w); x.w = threefry_rotl(x.w, r1.y) ^ x.z;
    x.x = add(x.x, x.w); x.w = threefry_rotl(x.w, r1.z) ^ x.x; x.z = add(x.z, x.y); x.y = threefry_rotl(x.y, r1.w) ^ x.z;
    return x;
}

fn threefry4x32(counter: vec4<u32>, key: vec4<u32>) -> vec4<u32> {
    let parity = 0x1bd11bdau ^ key.x ^ key.y ^ key.z ^ key.w;
    var x = counter + key;
    x = threefry_rounds(x, vec4<u32>(10u, 26u, 11u, 21u), vec4<u32>(13u, 27u, 23u, 5u));
    x = add4(x, vec4<u32>(key.y, key.z, key.w, parity + 1u));
    x = threefry_rounds(x, vec4<u32>(6u, 20u, 17u, 11u), vec4<u32>(25u, 10u, 18u, 20u));
    x = add4(x, vec4<u32>(key.z, key.w, parity, key.x + 2u));
    x = threefry_rounds(x, vec4<u32>(10u, 26u, 11u, 21u), vec4<u32>(13u, 27u, 23u, 5u));
    x = add4(x, vec4<u32>(key.w, parity, key.x, key.y + 3u));
    // Round 13 of 13.
    x.x = add(x.x, x.y); x.y = threefry_rotl(x.y, 6u) ^ x.x;
    x.z = add(x.z, x.w); x.w = threefry_rotl(x.w, 20u) ^ x.z;
    return x;
}

// The random halves of the eight elements of group `index` past the 64-bit base, low halves first.
fn threefry_group(base: vec2<u32>, index: u32, key: vec4<u32>) -> vec4<u32> {
    let low = base.x + index;
    let high = base.y + u32(low < index);
    return threefry4x32(vec4<u32>(low, high, 0u, 0u), key);
}

// The same, each in the upper 16 bits of a word.
fn threefry_halves(w: vec4<u32>) -> array<u32, 8> {
    return array<u32, 8>(w.x << 16u, w.x, w.y << 16u, w.y, w.z << 16u, w.z, w.w << 16u, w.w);
}
