//! The twin's fast variant for what is asked for most: f32 rows of whole blocks under E8M0 scales. The same codes as
//! `Job::block`, from loops without branches that the compiler turns into vector instructions; tests/formats.rs holds both
//! to the same reference.

use super::{DType, Draws, Job, Round, ScaleFormat, block, scale};
use crate::formats::Element;
use crate::formats::element::INFINITY;

pub(super) struct Rows<'a> {
    element: Element,
    block: usize,
    carry: u32,
    x: &'a [u32],
    blocks_per_row: usize,
    draws: Draws<'a>,
}

/// Below this scale f32's subnormals matter, which the loops take for normal numbers; they round to zero above.
const MIN_SCALE: u8 = 40;

impl<'a> Rows<'a> {
    /// The fast variant, if it covers the job. Along rows, vector blocks: the caller's condition.
    pub(super) fn of(job: &'a Job<'_>) -> Option<Rows<'a>> {
        let spec = job.desc.spec;
        let covered = job.dtype == DType::F32
            && spec.scale == ScaleFormat::E8M0
            && job.layout.cols.is_multiple_of(spec.block.len());
        covered.then(|| Rows {
            element: spec.element,
            block: spec.block.len(),
            carry: job.carry,
            x: job.x,
            blocks_per_row: job.layout.blocks(),
            draws: job.draws,
        })
    }

    /// Quantizes the blocks from number `first` on, as many as `scales` holds; returns how many are not finite.
    pub(super) fn blocks(&self, first: usize, codes: &mut [u8], scales: &mut [u8]) -> u32 {
        #[cfg(target_arch = "x86_64")]
        if std::is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has AVX2, as just checked.
            return unsafe { self.blocks_avx2(first, codes, scales) };
        }
        self.by_element(first, codes, scales)
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2")]
    fn blocks_avx2(&self, first: usize, codes: &mut [u8], scales: &mut [u8]) -> u32 {
        self.by_element(first, codes, scales)
    }

    /// Makes the element a constant of the loops.
    #[inline(always)]
    fn by_element(&self, first: usize, codes: &mut [u8], scales: &mut [u8]) -> u32 {
        match self.element {
            Element::E2M1 => self.run(Element::E2M1, first, codes, scales),
            Element::E2M3 => self.run(Element::E2M3, first, codes, scales),
            Element::E3M2 => self.run(Element::E3M2, first, codes, scales),
            Element::E4M3 => self.run(Element::E4M3, first, codes, scales),
            Element::E5M2 => self.run(Element::E5M2, first, codes, scales),
            Element::Int8 => self.run(Element::Int8, first, codes, scales),
        }
    }

    #[inline(always)]
    fn run(&self, element: Element, first: usize, codes: &mut [u8], scales: &mut [u8]) -> u32 {
        let bytes = self.block * element.bits() as usize / 8;
        let mut nonfinite = 0;
        for (i, (out, scale)) in codes.chunks_exact_mut(bytes).zip(scales).enumerate() {
            let number = first + i;
            let x = &self.x[number * self.block..(number + 1) * self.block];
            let mut amax = 0;
            for v in x {
                amax = amax.max(v & 0x7fff_ffff);
            }
            *scale = scale::e8m0_from_amax(element, self.carry, amax);
            if amax >= INFINITY {
                out.fill(0);
                nonfinite += 1;
                continue;
            }
            let mut drawn = [[0; 8]; 128 / 8];
            if let Draws::Elements(bits) = self.draws {
                let (row, b) = (number / self.blocks_per_row, number % self.blocks_per_row);
                for (g, drawn) in drawn[..self.block / 8].chunks_mut(4).enumerate() {
                    let first = b * self.block / 8 + 4 * g;
                    let groups = bits.groups::<4>(std::array::from_fn(|i| (row, first + i)));
                    drawn.copy_from_slice(&groups[..drawn.len()]);
                }
            }
            let mut buffer = [0u8; 128];
            // Sixteen at a time: a length that the compiler knows.
            for (j, (codes, x)) in buffer.chunks_exact_mut(16).zip(x.chunks_exact(16)).enumerate() {
                let half = match self.draws {
                    Draws::Nearest => None,
                    Draws::Elements(_) => {
                        let drawn = [drawn[2 * j], drawn[2 * j + 1]];
                        Some(std::array::from_fn::<u16, 16, _>(|k| drawn[k / 8][k % 8]))
                    }
                    Draws::Given(draws) => {
                        let draws = &draws[number * self.block + 16 * j..][..16];
                        Some(std::array::from_fn(|k| draws[k]))
                    }
                };
                match half {
                    _ if *scale < MIN_SCALE => {
                        for k in 0..16 {
                            let round =
                                half.map_or(Round::NearestEven, |h| Round::Stochastic(h[k]));
                            codes[k] = element.encode(x[k], *scale, round);
                        }
                    }
                    None => {
                        for k in 0..16 {
                            codes[k] = encode_normal(element, x[k], *scale, Round::NearestEven);
                        }
                    }
                    Some(r) => {
                        for k in 0..16 {
                            codes[k] =
                                encode_normal(element, x[k], *scale, Round::Stochastic(r[k]));
                        }
                    }
                }
            }
            block::pack(element.bits(), &buffer[..self.block], out);
        }
        nonfinite
    }
}

/// [`Element::encode`] for a scale of at least [`MIN_SCALE`], without a branch.
#[inline(always)]
fn encode_normal(element: Element, x: u32, scale: u8, round: Round) -> u8 {
    let m = (x & 0x7f_ffff) | 0x80_0000;
    let e = ((x >> 23) & 0xff) as i32;
    element.assemble(x >> 31, element.round(m << 7, e - i32::from(scale), round))
}
