// The random halves of a part of 16 rows and four columns: two words a row. Every invocation draws for itself, twice as
// much as it needs. Same result as lib/draws_subgroup.wgsl.

alias Draws = array<vec2<u32>, 16>;

fn draw_row(row: u32, col: u32) -> vec2<u32> {
    let w = threefry_group(p.counter, row * p.groups + col / 8u, p.key);
    return select(w.xy, w.zw, (col & 4u) != 0u);
}

fn draw_part(row: u32, col: u32, lane: u32) -> Draws {
    if (!STOCHASTIC) { return Draws(); }
    return Draws(draw_row(row + 0u, col), draw_row(row + 1u, col), draw_row(row + 2u, col), draw_row(row + 3u, col), draw_row(row + 4u, col), draw_row(row + 5u, col), draw_row(row + 6u, col), draw_row(row + 7u, col),
                 draw_row(row + 8u, col), draw_row(row + 9u, col), draw_row(row + 10u, col), draw_row(row + 11u, col), draw_row(row + 12u, col), draw_row(row + 13u, col), draw_row(row + 14u, col), draw_row(row + 15u, col));
}
