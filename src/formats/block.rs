//! How packed tensors are laid out, and [`MxTensor`], the packed tensor on the host.
//!
//! **Layout.** A tensor `[rows, cols]` is stored as *lines* along its blocked axis: rows for
//! [`Axis::One`], columns (the transpose) for [`Axis::Zero`]. A line is padded on the inside to whole
//! blocks with zero codes; the logical shape is kept beside it. Codes are a little-endian bit stream
//! along the line: FP4 has element 0 in the low nibble, FP6 four elements in three bytes, the others one
//! byte an element. Scales are one byte a block: `[lines, blocks]`, for square blocks
//! `[⌈lines/n⌉, blocks]`. Both are tight and row-major.

use super::element::NAN;
use super::{Axis, MxSpec, ScaleFormat, scale};
use crate::{Error, Result};

/// Sizes and offsets of a packed tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The format.
    pub spec: MxSpec,
    /// The blocked axis.
    pub axis: Axis,
    /// Logical rows.
    pub rows: usize,
    /// Logical columns.
    pub cols: usize,
}

impl Layout {
    /// The layout of `[rows, cols]` in `spec` along `axis`.
    pub fn new(spec: MxSpec, axis: Axis, rows: usize, cols: usize) -> Result<Layout> {
        spec.validate()?;
        let layout = Layout { spec, axis, rows, cols };
        // 2^48 elements are beyond any machine; below, no product here can overflow.
        let padded = (layout.lines() as u128) * (layout.line_len() as u128 + 127);
        if padded > 1 << 48 {
            return Err(Error::Mismatch {
                operation: "layout",
                problem: format!("[{rows}, {cols}] has more than 2^48 elements"),
            });
        }
        Ok(layout)
    }

    /// Lines across the blocked axis: rows for [`Axis::One`], columns for [`Axis::Zero`].
    pub fn lines(&self) -> usize {
        match self.axis {
            Axis::Zero => self.cols,
            Axis::One => self.rows,
        }
    }

    /// Logical elements of a line.
    pub fn line_len(&self) -> usize {
        match self.axis {
            Axis::Zero => self.rows,
            Axis::One => self.cols,
        }
    }

    /// Blocks of a line, the last one padded.
    pub fn blocks(&self) -> usize {
        self.line_len().div_ceil(self.spec.block.len())
    }

    /// Bytes of one block's codes within one line; a multiple of four.
    pub fn block_bytes(&self) -> usize {
        self.spec.block.len() * self.spec.element.bits() as usize / 8
    }

    /// Bytes of a line of codes; a multiple of four.
    pub fn line_bytes(&self) -> usize {
        self.blocks() * self.block_bytes()
    }

    /// Rows of the scale matrix: lines, or ⌈lines/n⌉ for square blocks.
    pub fn scale_rows(&self) -> usize {
        self.lines().div_ceil(self.spec.block.lines())
    }

    /// Anchors: one for every row of scales, and for square blocks one for every column too.
    pub(crate) fn anchors(&self) -> usize {
        self.scale_rows() + if self.spec.block.lines() > 1 { self.blocks() } else { 0 }
    }

    /// Bytes of all codes.
    pub fn codes_len(&self) -> usize {
        self.lines() * self.line_bytes()
    }

    /// Bytes of all scales.
    pub fn scales_len(&self) -> usize {
        self.scale_rows() * self.blocks()
    }

    /// The shape of the codes as a matrix of bytes.
    pub fn codes_shape(&self) -> [usize; 2] {
        [self.lines(), self.line_bytes()]
    }

    /// The shape of the scales as a matrix of bytes.
    pub fn scales_shape(&self) -> [usize; 2] {
        [self.scale_rows(), self.blocks()]
    }

    /// The line and the position in it of the element (row, col).
    #[inline(always)]
    pub fn position(&self, row: usize, col: usize) -> (usize, usize) {
        match self.axis {
            Axis::Zero => (col, row),
            Axis::One => (row, col),
        }
    }

    /// The row and column of a position in a line; the inverse of [`Layout::position`].
    #[inline(always)]
    pub fn element(&self, line: usize, at: usize) -> (usize, usize) {
        match self.axis {
            Axis::Zero => (at, line),
            Axis::One => (line, at),
        }
    }

    /// The index into the scales for a position.
    #[inline(always)]
    pub fn scale_index(&self, line: usize, at: usize) -> usize {
        line / self.spec.block.lines() * self.blocks() + at / self.spec.block.len()
    }
}

/// Writes `codes` as a little-endian bit stream; their number times `bits` must be whole bytes.
#[inline(always)]
pub fn pack(bits: u32, codes: &[u8], out: &mut [u8]) {
    match bits {
        4 => {
            for (o, c) in out.iter_mut().zip(codes.chunks_exact(2)) {
                *o = c[0] | (c[1] << 4);
            }
        }
        6 => {
            for (o, c) in out.chunks_exact_mut(3).zip(codes.chunks_exact(4)) {
                o[0] = c[0] | (c[1] << 6);
                o[1] = (c[1] >> 2) | (c[2] << 4);
                o[2] = (c[2] >> 4) | (c[3] << 2);
            }
        }
        _ => out.copy_from_slice(codes),
    }
}

/// The code at position `at` of a packed line.
#[inline(always)]
pub fn unpack(bits: u32, line: &[u8], at: usize) -> u8 {
    match bits {
        4 => (line[at / 2] >> (4 * (at % 2))) & 0xf,
        6 => {
            let bit = at * 6;
            let low = u32::from(line[bit / 8]);
            let high = line.get(bit / 8 + 1).map_or(0, |b| u32::from(*b));
            (((high << 8) | low) >> (bit % 8)) as u8 & 0x3f
        }
        _ => line[at],
    }
}

/// A packed tensor on the host.
#[derive(Clone, Debug, PartialEq)]
pub struct MxTensor {
    layout: Layout,
    codes: Vec<u8>,
    scales: Vec<u8>,
    tensor_scale: f32,
}

impl MxTensor {
    /// Puts a tensor together from its parts, as read from a file, say. Checked: the lengths against the
    /// layout, and the tensor-wide scale (positive and normal for NVFP4, 1 for all others). Every byte is a
    /// valid code; bits of padding are ignored.
    pub fn from_parts(
        layout: Layout,
        codes: Vec<u8>,
        scales: Vec<u8>,
        tensor_scale: f32,
    ) -> Result<MxTensor> {
        let layout = Layout::new(layout.spec, layout.axis, layout.rows, layout.cols)?;
        let mismatch =
            |problem| Err(Error::Mismatch { operation: "MxTensor::from_parts", problem });
        if codes.len() != layout.codes_len() {
            return mismatch(format!(
                "{} bytes of codes, but [{}, {}] in {} along axis {} has {:?}",
                codes.len(),
                layout.rows,
                layout.cols,
                layout.spec,
                layout.axis,
                layout.codes_shape()
            ));
        }
        if scales.len() != layout.scales_len() {
            return mismatch(format!(
                "{} bytes of scales, but [{}, {}] in {} along axis {} has {:?}",
                scales.len(),
                layout.rows,
                layout.cols,
                layout.spec,
                layout.axis,
                layout.scales_shape()
            ));
        }
        check_tensor_scale(layout.spec, tensor_scale)?;
        Ok(MxTensor { layout, codes, scales, tensor_scale })
    }

    /// The sizes.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The packed codes.
    pub fn codes(&self) -> &[u8] {
        &self.codes
    }

    /// The scale bytes.
    pub fn scales(&self) -> &[u8] {
        &self.scales
    }

    /// NVFP4's tensor-wide scale; 1 for all other formats.
    pub fn tensor_scale(&self) -> f32 {
        self.tensor_scale
    }

    /// Codes, scales and tensor-wide scale.
    pub fn into_parts(self) -> (Vec<u8>, Vec<u8>, f32) {
        (self.codes, self.scales, self.tensor_scale)
    }

    /// Bytes of codes and scales.
    pub fn bytes(&self) -> usize {
        self.codes.len() + self.scales.len()
    }

    /// The value of the element (row, col), exact.
    pub fn get(&self, row: usize, col: usize) -> f32 {
        let layout = &self.layout;
        let (line, at) = layout.position(row, col);
        let start = line * layout.line_bytes();
        let code =
            unpack(layout.spec.element.bits(), &self.codes[start..start + layout.line_bytes()], at);
        let scale = self.scales[layout.scale_index(line, at)];
        f32::from_bits(decode(layout.spec, code, scale, self.tensor_scale.to_bits()))
    }
}

/// Checks a tensor-wide scale for `spec`.
pub(crate) fn check_tensor_scale(spec: MxSpec, tensor_scale: f32) -> Result<()> {
    let valid = match spec.scale {
        ScaleFormat::E4M3 => tensor_scale.is_normal() && tensor_scale > 0.0,
        ScaleFormat::E8M0 => tensor_scale == 1.0,
    };
    if valid {
        return Ok(());
    }
    Err(Error::Mismatch {
        operation: "tensor scale",
        problem: match spec.scale {
            ScaleFormat::E4M3 => format!("{tensor_scale} is not a positive normal f32"),
            ScaleFormat::E8M0 => format!("{tensor_scale}: {spec} has none, it must be 1"),
        },
    })
}

/// The f32 bits of a code under its scales.
#[inline(always)]
pub(crate) fn decode(spec: MxSpec, code: u8, scale: u8, tensor_scale: u32) -> u32 {
    match spec.scale {
        ScaleFormat::E8M0 => spec.element.decode_scaled(code, scale),
        ScaleFormat::E4M3 if scale & 0x7f == scale::E4M3_NAN => NAN,
        ScaleFormat::E4M3 => scale::nvfp4_decode(code, scale, tensor_scale),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::Element;

    #[test]
    fn pack_and_unpack_are_inverse() {
        for element in Element::ALL {
            let bits = element.bits();
            let codes: Vec<u8> =
                (0..128u32).map(|i| (i.wrapping_mul(0x9e37_79b9) >> (32 - bits)) as u8).collect();
            let mut packed = vec![0; 128 * bits as usize / 8];
            pack(bits, &codes, &mut packed);
            let back: Vec<u8> = (0..128).map(|i| unpack(bits, &packed, i)).collect();
            assert_eq!(codes, back);
        }
    }

    #[test]
    fn fp4_has_element_0_in_the_low_nibble_and_fp6_is_little_endian() {
        let mut out = [0; 1];
        pack(4, &[0x1, 0xa], &mut out);
        assert_eq!(out, [0xa1]);
        let mut out = [0; 3];
        pack(6, &[0b000001, 0b100000, 0b000011, 0b110000], &mut out);
        assert_eq!(
            u32::from_le_bytes([out[0], out[1], out[2], 0]),
            1 | 32 << 6 | 3 << 12 | 48 << 18
        );
    }
}
