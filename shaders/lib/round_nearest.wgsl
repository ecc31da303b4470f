// Rounding to nearest, ties to even. Twin: Round::NearestEven in src/formats/element.rs.
const STOCHASTIC = false;
// Of a quotient that is not exact: four significant bits and one to round, E4M3's need, and one to spare.
const QUOTIENT_BITS = 7u;
fn elem_increment(fixed: u32, r: u32) -> u32 {
    return (1u << (FRACTION_BITS - 1u)) - 1u + ((fixed >> FRACTION_BITS) & 1u);
}
