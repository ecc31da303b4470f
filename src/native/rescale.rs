//! MXFP4 as NVFP4, exactly or not at all.
//!
//! A library that multiplies NVFP4 and refuses MXFP4 can multiply MXFP4 whose scales lie close together: each scale of 32
//! elements becomes two of 16, and a power of two common to the operand goes into the tensor-wide scale.
//!
//! UE4M3 holds 18 powers of two, 2⁻⁹ … 2⁸. With the shift s, every block that is not all zero needs exponent − s in that
//! range, which has a solution if and only if the exponents span at most 17. The elements stay as they are. A block of zeros
//! may have any scale, and gets 0. A NaN scale has no place: NVFP4 would count it, but the two formats' products treat lines
//! with NaN differently, so it is refused. Nothing is ever clamped.
//!
//! **Exact**: every element of the result has the value that it had ([`rescale`]); the factor of a product, [`alpha`], is a
//! power of two, finite and normal, or refused. Sums may still be added in another order.

use crate::formats::scale::E8M0_NAN;
use crate::{Block, Error, Layout, MXFP4, MxTensor, NVFP4, Result};

/// The exponents of the powers of two that UE4M3 holds.
pub const EXPONENTS: std::ops::RangeInclusive<i32> = -9..=8;

/// The UE4M3 byte of 2^`exponent`, if there is one.
pub fn ue4m3_power(exponent: i32) -> Option<u8> {
    match exponent {
        // Subnormals are multiples of 2⁻⁹.
        -9..=-7 => Some(1 << (exponent + 9)),
        -6..=8 => Some(((exponent + 7) << 3) as u8),
        _ => None,
    }
}

/// The least and the largest exponent of the blocks that are not all zero, or nothing if all are. Refuses NaN scales.
pub fn exponents(x: &MxTensor) -> Result<Option<[i32; 2]>> {
    let layout = x.layout();
    if layout.spec != MXFP4 {
        return Err(Error::Mismatch {
            operation: "rescale",
            problem: format!("{}: only {MXFP4} can become {NVFP4}", layout.spec),
        });
    }
    let mut range: Option<[i32; 2]> = None;
    for (i, scale) in x.scales().iter().enumerate() {
        if *scale == E8M0_NAN {
            return refused(format!(
                "block {} of line {} is NaN",
                i % layout.blocks(),
                i / layout.blocks()
            ));
        }
        if !zeros(x, i) {
            let exponent = i32::from(*scale) - 127;
            let [least, most] = range.unwrap_or([exponent; 2]);
            range = Some([least.min(exponent), most.max(exponent)]);
        }
    }
    Ok(range)
}

/// The same values in NVFP4: the tensor-wide scale is 2^shift. An error if no shift is exact.
pub fn rescale(x: &MxTensor) -> Result<MxTensor> {
    let from = *x.layout();
    let shift = match exponents(x)? {
        None => 0,
        Some([least, most]) if most - least <= EXPONENTS.end() - EXPONENTS.start() => {
            // The nearest to zero that fits: then the factors of products are normal whenever possible.
            0.clamp(most - EXPONENTS.end(), least - EXPONENTS.start())
        }
        Some([least, most]) => {
            return refused(format!("scales from 2^{least} to 2^{most} span {}", most - least));
        }
    };
    let to = Layout::new(NVFP4, from.axis, from.rows, from.cols)?;
    // A line of blocks of 16 may end 16 elements earlier.
    let codes = x
        .codes()
        .chunks_exact(from.line_bytes().max(1))
        .flat_map(|line| &line[..to.line_bytes()])
        .copied()
        .collect();
    let halves = to.blocks();
    let mut scales = Vec::with_capacity(to.scales_len());
    for (i, scale) in x.scales().iter().enumerate() {
        let byte = if zeros(x, i) { Some(0) } else { ue4m3_power(i32::from(*scale) - 127 - shift) };
        let Some(byte) = byte else { return refused(format!("2^{} is outside", scale)) };
        let first = i % from.blocks() * 2;
        scales.extend(std::iter::repeat_n(byte, halves.min(first + 2) - first));
    }
    // Every shift lies between −118 and 119: normal.
    MxTensor::from_parts(to, codes, scales, f32::from_bits(((shift + 127) as u32) << 23))
}

/// The factor that a product of two rescaled operands is multiplied by. An error unless it is finite and normal.
pub fn alpha(a: &MxTensor, b: &MxTensor) -> Result<f32> {
    let alpha = a.tensor_scale() * b.tensor_scale();
    if alpha.is_normal() {
        return Ok(alpha);
    }
    refused(format!(
        "the factor {:e} · {:e} is not a normal f32",
        a.tensor_scale(),
        b.tensor_scale()
    ))
}

/// Whether the elements under scale `i` are all zeros, of either sign.
fn zeros(x: &MxTensor, i: usize) -> bool {
    let bytes = x.layout().block_bytes();
    // MXFP4 has a scale for every block of every line, and codes are tight.
    x.codes()[i * bytes..(i + 1) * bytes].iter().all(|pair| pair & 0x77 == 0)
}

fn refused<T>(has: String) -> Result<T> {
    Err(Error::Unsupported {
        operation: format!("exact rescaling of {} to {}", MXFP4.name(), NVFP4.name()),
        needs: "scales of non-zero blocks within 2^17 of each other, no NaN, and a normal factor"
            .into(),
        has,
    })
}

const _: () =
    assert!(matches!(MXFP4.block, Block::Vector(32)) && matches!(NVFP4.block, Block::Vector(16)));
