// Stochastic rounding by 16 random bits: away from zero when fraction + (r + 1/2)/2^16 >= 1.
// Twin: Round::Stochastic in src/formats/element.rs.
const STOCHASTIC = true;
// Of a quotient that is not exact: two significant bits, 17 compared with the random ones, two to spare.
const QUOTIENT_BITS = 21u;
fn elem_increment(fixed: u32, r: u32) -> u32 {
    return (r << (FRACTION_BITS - 16u)) | (1u << (FRACTION_BITS - 17u));
}
