// The random halves of a part of 16 rows and four columns: two words a row. A group of eight columns belongs to two
// neighbouring invocations; each draws eight of its rows, and hands the other what is the other's.
// Same result as lib/draws_alone.wgsl.

alias Draws = array<vec2<u32>, 16>;

fn draw_part(row: u32, col: u32, lane: u32) -> Draws {
    if (!STOCHASTIC) { return Draws(); }
    let odd = (lane & 1u) == 1u;
    let first = row + select(0u, 8u, odd);
    let w0 = threefry_group(p.counter, (first + 0u) * p.groups + col / 8u, p.key);
    let w1 = threefry_group(p.counter, (first + 1u) * p.groups + col / 8u, p.key);
    let w2 = threefry_group(p.counter, (first + 2u) * p.groups + col / 8u, p.key);
    let w3 = threefry_group(p.counter, (first + 3u) * p.groups + col / 8u, p.key);
    let w4 = threefry_group(p.counter, (first + 4u) * p.groups + col / 8u, p.key);
    let w5 = threefry_group(p.counter, (first + 5u) * p.groups + col / 8u, p.key);
    let w6 = threefry_group(p.counter, (first + 6u) * p.groups + col / 8u, p.key);
    let w7 = threefry_group(p.counter, (first + 7u) * p.groups + col / 8u, p.key);
    let k0 = select(w0.xy, w0.zw, odd);
    let h0 = subgroupShuffleXor(select(w0.zw, w0.xy, odd), 1u);
    let k1 = select(w1.xy, w1.zw, odd);
    let h1 = subgroupShuffleXor(select(w1.zw, w1.xy, odd), 1u);
    let k2 = select(w2.xy, w2.zw, odd);
    let h2 = subgroupShuffleXor(select(w2.zw, w2.xy, odd), 1u);
    let k3 = select(w3.xy, w3.zw, odd);
    let h3 = subgroupShuffleXor(select(w3.zw, w3.xy, odd), 1u);
    let k4 = select(w4.xy, w4.zw, odd);
    let h4 = subgroupShuffleXor(select(w4.zw, w4.xy, odd), 1u);
    let k5 = select(w5.xy, w5.zw, odd);
    let h5 = subgroupShuffleXor(select(w5.zw, w5.xy, odd), 1u);
    let k6 = select(w6.xy, w6.zw, odd);
    let h6 = subgroupShuffleXor(select(w6.zw, w6.xy, odd), 1u);
    let k7 = select(w7.xy, w7.zw, odd);
    let h7 = subgroupShuffleXor(select(w7.zw, w7.xy, odd), 1u);
    return Draws(select(k0, h0, odd), select(k1, h1, odd), select(k2, h2, odd), select(k3, h3, odd), select(k4, h4, odd), select(k5, h5, odd), select(k6, h6, odd), select(k7, h7, odd),
                 select(h0, k0, odd), select(h1, k1, odd), select(h2, k2, odd), select(h3, k3, odd), select(h4, k4, odd), select(h5, k5, odd), select(h6, k6, odd), select(h7, k7, odd));
}
