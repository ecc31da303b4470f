//! The random numbers of stochastic rounding: a published counter-based generator, counted by logical
//! element index.
//!
//! Threefry-4x32 with 13 rounds (Salmon, Moraes, Dror, Shaw: "Parallel Random Numbers: As Easy as 1, 2, 3",
//! SC'11; 13 rounds pass BigCrush and have known answers in Random123's `kat_vectors`). It needs only
//! 32-bit add, rotate and xor, which WGSL has; Philox would need a 64-bit product, which WGSL has not.
//!
//! One call gives the bits of eight elements. For the element (row, col) of a matrix with `cols` columns:
//!
//! ```text
//! key     = [seed lo, seed hi, stream lo, stream hi]
//! counter = [g lo, g hi, 0, 0]        g = row · ⌈cols/8⌉ + ⌊col/8⌋
//! r       = 16-bit half number (col mod 8) of the four output words, low halves first
//! ```
//!
//! So the bits belong to the element: not to a tile, a thread, an axis, a block size or an engine.
//! Changing any of this is a breaking release (a test below pins values). Shader:
//! `shaders/lib/threefry.wgsl`.

use crate::Rounding;
use crate::formats::element::Round;

const ROTATIONS: [[u32; 2]; 8] =
    [[10, 26], [11, 21], [13, 27], [23, 5], [6, 20], [17, 11], [25, 10], [18, 20]];
/// Skein's key-schedule constant, cut to 32 bits.
const PARITY: u32 = 0x1BD1_1BDA;
/// The rounds used for rounding bits.
pub const ROUNDS: usize = 13;

/// Threefry-4x32 with `R` rounds.
#[inline(always)]
pub fn threefry4x32<const R: usize>(counter: [u32; 4], key: [u32; 4]) -> [u32; 4] {
    several::<R, 1>(counter.map(|word| [word]), key).map(|[word]| word)
}

/// [`threefry4x32`] of `N` counters, word by word, so that it vectorises.
#[inline(always)]
fn several<const R: usize, const N: usize>(
    counters: [[u32; N]; 4],
    key: [u32; 4],
) -> [[u32; N]; 4] {
    let k = [key[0], key[1], key[2], key[3], PARITY ^ key[0] ^ key[1] ^ key[2] ^ key[3]];
    let mut x = counters;
    for i in 0..4 {
        x[i] = x[i].map(|word| word.wrapping_add(k[i]));
    }
    for round in 0..R {
        // The partners of words 0 and 2 alternate: (1, 3), then (3, 1).
        let [a, b] = if round % 2 == 0 { [1, 3] } else { [3, 1] };
        let [ra, rb] = ROTATIONS[round % 8];
        for n in 0..N {
            x[0][n] = x[0][n].wrapping_add(x[a][n]);
            x[a][n] = x[a][n].rotate_left(ra) ^ x[0][n];
            x[2][n] = x[2][n].wrapping_add(x[b][n]);
            x[b][n] = x[b][n].rotate_left(rb) ^ x[2][n];
        }
        if round % 4 == 3 {
            let injection = (round / 4 + 1) as u32;
            for i in 0..4 {
                let word = k[(injection as usize + i) % 5];
                let word = if i == 3 { word.wrapping_add(injection) } else { word };
                x[i] = x[i].map(|x| x.wrapping_add(word));
            }
        }
    }
    x
}

/// The random bits of one tensor's stochastic rounding.
#[derive(Clone, Copy, Debug)]
pub struct RoundingBits {
    key: [u32; 4],
    groups_per_row: u64,
}

impl RoundingBits {
    /// The bits for a matrix with `cols` columns, or `None` for rounding to nearest.
    pub fn new(rounding: Rounding, cols: usize) -> Option<RoundingBits> {
        match rounding {
            Rounding::NearestEven => None,
            Rounding::Stochastic { .. } => {
                Some(RoundingBits { key: key(rounding), groups_per_row: cols.div_ceil(8) as u64 })
            }
        }
    }

    /// The bits of eight consecutive elements of `row`, from column `8 · group` on.
    #[inline(always)]
    pub fn group(&self, row: usize, group: usize) -> [u16; 8] {
        self.groups([(row, group)])[0]
    }

    /// The bits of several groups: (row, group) each.
    #[inline(always)]
    pub(crate) fn groups<const N: usize>(&self, of: [(usize, usize); N]) -> [[u16; 8]; N] {
        let g = of.map(|(row, group)| row as u64 * self.groups_per_row + group as u64);
        let counters = [g.map(|g| g as u32), g.map(|g| (g >> 32) as u32), [0; N], [0; N]];
        let words = several::<ROUNDS, N>(counters, self.key);
        std::array::from_fn(|n| std::array::from_fn(|i| (words[i / 2][n] >> (16 * (i % 2))) as u16))
    }

    /// The bits of the element (row, col).
    pub fn element(&self, row: usize, col: usize) -> u16 {
        self.group(row, col / 8)[col % 8]
    }

    /// How the element (row, col) is rounded.
    pub fn round(bits: Option<&RoundingBits>, row: usize, col: usize) -> Round {
        bits.map_or(Round::NearestEven, |b| Round::Stochastic(b.element(row, col)))
    }
}

/// The generator's key for a rounding; zero for rounding to nearest, which draws nothing.
pub(crate) fn key(rounding: Rounding) -> [u32; 4] {
    match rounding {
        Rounding::NearestEven => [0; 4],
        Rounding::Stochastic { seed, stream } => {
            [seed as u32, (seed >> 32) as u32, stream as u32, (stream >> 32) as u32]
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Random123 `kat_vectors`, threefry4x32: all zero, all ones, and digits of π.
    #[test]
    fn known_answers() {
        let pi = [
            0x243f_6a88,
            0x85a3_08d3,
            0x1319_8a2e,
            0x0370_7344,
            0xa409_3822,
            0x299f_31d0,
            0x082e_fa98,
            0xec4e_6c89u32,
        ];
        let ones = [u32::MAX; 4];
        let (ctr, key) = (pi[..4].try_into().unwrap(), pi[4..].try_into().unwrap());
        assert_eq!(
            threefry4x32::<13>([0; 4], [0; 4]),
            [0x531c_7e4f, 0x3949_1ee5, 0x2c85_5a92, 0x3d6a_bf9a]
        );
        assert_eq!(
            threefry4x32::<13>(ones, ones),
            [0xc418_9358, 0x1c9c_c83a, 0xd588_1c67, 0x6a0a_89e0]
        );
        assert_eq!(
            threefry4x32::<13>(ctr, key),
            [0x4aa7_1d8f, 0x7347_38c2, 0x431f_c6a8, 0xae6d_ebf1]
        );
        assert_eq!(
            threefry4x32::<20>([0; 4], [0; 4]),
            [0x9c6c_a96a, 0xe17e_ae66, 0xfc10_ecd4, 0x5256_a7d8]
        );
    }

    /// Changing these values is a breaking release.
    #[test]
    fn value_stability() {
        let bits = RoundingBits::new(Rounding::Stochastic { seed: 42, stream: 7 }, 20).unwrap();
        let drawn: Vec<u16> = (16..20).map(|col| bits.element(3, col)).collect();
        assert_eq!(bits.element(3, 17), bits.group(3, 2)[1]);
        let several = [(3, 2), (0, 0), (1 << 31, 1), (7, 2)];
        assert_eq!(bits.groups(several), several.map(|(row, group)| bits.group(row, group)));
        assert_eq!(drawn, [46996, 8750, 19773, 45976]);
    }
}
