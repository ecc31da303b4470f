//! The orders in which vendors' libraries take the scales of a block-scaled operand.
//!
//! A matrix of scales, a byte for each line r and group c along k, is cut into tiles; tiles lie row by row, and inside a tile
//! the bytes are permuted so that the tensor cores' loads are contiguous. Lines and groups are padded to whole tiles.
//!
//! - [`ScaleLayout::Tiles128x4`]: `(r/128 · C/4 + c/4) · 512 + (r%32) · 16 + (r%128)/32 · 4 + c%4`. cuBLASLt, cuDNN
//!   (`REORDERING_F8_128x4`), CUTLASS; torchao's `to_blocked`. C counts the padded groups, of 32 elements (MX) or 16 (NVFP4).
//! - [`ScaleLayout::Tiles32x8`]: `(r/32 · C/8 + c/8) · 256 + (c%4) · 64 + (r%16) · 4 + (c%8)/4 · 2 + (r%32)/16`. hipBLASLt's
//!   `BLK32_UE8M0_32_8_EXT`; the view `[R/32, 2, 16, C/8, 2, 4]` with its axes in the order 0, 3, 5, 2, 4, 1.
//!
//! **Exact**: bytes are moved, not changed.

use super::ScaleLayout;
use crate::{Error, Result};

impl ScaleLayout {
    /// All.
    pub const ALL: [ScaleLayout; 3] =
        [ScaleLayout::Rows, ScaleLayout::Tiles128x4, ScaleLayout::Tiles32x8];

    /// Lines and groups of a tile.
    pub const fn tile(self) -> [usize; 2] {
        match self {
            ScaleLayout::Rows => [1, 1],
            ScaleLayout::Tiles128x4 => [128, 4],
            ScaleLayout::Tiles32x8 => [32, 8],
        }
    }

    /// The shape with whole tiles.
    pub fn padded(self, [lines, groups]: [usize; 2]) -> [usize; 2] {
        let [tile_lines, tile_groups] = self.tile();
        [lines.next_multiple_of(tile_lines), groups.next_multiple_of(tile_groups)]
    }

    /// Bytes of a matrix of scales, with the padding. More than memory has are as many as there are numbers for.
    pub fn bytes(self, [lines, groups]: [usize; 2]) -> usize {
        let [tile_lines, tile_groups] = self.tile();
        let whole = |length: usize, tile: usize| length.div_ceil(tile).saturating_mul(tile);
        whole(lines, tile_lines).saturating_mul(whole(groups, tile_groups))
    }

    /// Where the byte of line r and group c lies, of a matrix of `groups` groups (padded or not: it makes no difference).
    pub fn offset(self, groups: usize, r: usize, c: usize) -> usize {
        let [tile_lines, tile_groups] = self.tile();
        let tile = r / tile_lines * groups.div_ceil(tile_groups) + c / tile_groups;
        tile * (tile_lines * tile_groups)
            + match self {
                ScaleLayout::Rows => 0,
                ScaleLayout::Tiles128x4 => r % 32 * 16 + r % 128 / 32 * 4 + c % 4,
                ScaleLayout::Tiles32x8 => c % 4 * 64 + r % 16 * 4 + c % 8 / 4 * 2 + r % 32 / 16,
            }
    }

    /// Row-major scales `[lines, groups]` in this order. The padding is zero.
    pub fn arrange(self, scales: &[u8], shape: [usize; 2]) -> Result<Vec<u8>> {
        let [lines, groups] = shape;
        check("ScaleLayout::arrange", scales.len(), lines.saturating_mul(groups), shape)?;
        let mut out = vec![0; self.bytes(shape)];
        for (r, line) in scales.chunks_exact(groups.max(1)).enumerate() {
            for (c, scale) in line.iter().enumerate() {
                out[self.offset(groups, r, c)] = *scale;
            }
        }
        Ok(out)
    }

    /// The inverse of [`ScaleLayout::arrange`]: row-major, without the padding.
    pub fn restore(self, arranged: &[u8], shape: [usize; 2]) -> Result<Vec<u8>> {
        let [lines, groups] = shape;
        check("ScaleLayout::restore", arranged.len(), self.bytes(shape), shape)?;
        let mut out = Vec::with_capacity(lines * groups);
        for r in 0..lines {
            out.extend((0..groups).map(|c| arranged[self.offset(groups, r, c)]));
        }
        Ok(out)
    }
}

fn check(operation: &'static str, has: usize, wants: usize, shape: [usize; 2]) -> Result<()> {
    if has == wants {
        return Ok(());
    }
    Err(Error::Mismatch {
        operation,
        problem: format!("{has} bytes of scales, but {shape:?} has {wants}"),
    })
}
