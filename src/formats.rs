//! The vocabulary of the OCP Microscaling (MX) formats: pure Rust, no engine.
//!
//! A *block* of elements shares one *scale*: `value = scale × element`. An [`MxSpec`] names the
//! element format, the scale format and the shape of a block; the constants [`MXFP4`], [`MXFP8_E4M3`],
//! [`NVFP4`], … are the named formats of the field. [`element`] holds the element codecs, [`scale`]
//! the shared scales, [`block`] layouts, packing and the host container [`MxTensor`].
//!
//! Source: OCP Microscaling Formats (MX) Specification v1.0; for NVFP4, arXiv 2509.25149.

pub mod block;
pub mod element;
pub mod scale;

pub use block::{Layout, MxTensor};
pub use element::Element;

use crate::{Error, Result};

/// The format of a block's shared scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ScaleFormat {
    /// A power of two: byte `b` is 2^(b−127), 255 is NaN (OCP MX v1.0).
    E8M0,
    /// An FP8 E4M3 scale a block, under one tensor-wide f32 (NVFP4).
    E4M3,
}

/// The shape of the elements that share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Block {
    /// `1 × n` consecutive elements along the blocked axis: n = 16, 32, 64 or 128.
    Vector(u32),
    /// `n × n` elements of the matrix: n = 16 or 32.
    Square(u32),
}

impl Block {
    /// All that exist.
    pub const ALL: [Block; 6] = [
        Block::Vector(16),
        Block::Vector(32),
        Block::Vector(64),
        Block::Vector(128),
        Block::Square(16),
        Block::Square(32),
    ];

    /// Elements of a block along the blocked axis.
    pub const fn len(self) -> usize {
        match self {
            Block::Vector(n) | Block::Square(n) => n as usize,
        }
    }

    /// Lines of the matrix that a block spans across the blocked axis.
    pub const fn lines(self) -> usize {
        match self {
            Block::Vector(_) => 1,
            Block::Square(n) => n as usize,
        }
    }

    /// Always false: a block has at least 16 elements.
    pub const fn is_empty(self) -> bool {
        false
    }
}

impl std::fmt::Display for Block {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}x{}", self.lines(), self.len())
    }
}

/// The axis of a row-major matrix `[rows, cols]` along which blocks run, and along which codes are
/// packed (numpy's numbering).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Axis {
    /// Blocks run down a column. The packed tensor is stored as the transpose `[cols, rows]`, so that
    /// the blocked axis is always the contiguous one.
    Zero,
    /// Blocks run along a row.
    #[default]
    One,
}

impl std::fmt::Display for Axis {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Axis::Zero => "0",
            Axis::One => "1",
        })
    }
}

/// A microscaling format: element, scale and block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MxSpec {
    /// The element format.
    pub element: Element,
    /// The format of the shared scale.
    pub scale: ScaleFormat,
    /// The elements that share it.
    pub block: Block,
}

const fn mx(element: Element) -> MxSpec {
    MxSpec { element, scale: ScaleFormat::E8M0, block: Block::Vector(32) }
}

/// OCP MXFP4: E2M1 elements, E8M0 scales, blocks of 32; 4.25 bits an element.
pub const MXFP4: MxSpec = mx(Element::E2M1);
/// OCP MXFP6 with E2M3 elements; 6.25 bits an element.
pub const MXFP6_E2M3: MxSpec = mx(Element::E2M3);
/// OCP MXFP6 with E3M2 elements; 6.25 bits an element.
pub const MXFP6_E3M2: MxSpec = mx(Element::E3M2);
/// OCP MXFP8 with E4M3 elements; 8.25 bits an element.
pub const MXFP8_E4M3: MxSpec = mx(Element::E4M3);
/// OCP MXFP8 with E5M2 elements; 8.25 bits an element.
pub const MXFP8_E5M2: MxSpec = mx(Element::E5M2);
/// OCP MXINT8; 8.25 bits an element.
pub const MXINT8: MxSpec = mx(Element::Int8);
/// NVFP4: E2M1 elements, E4M3 scales under one tensor-wide f32, blocks of 16; 4.5 bits an element.
pub const NVFP4: MxSpec =
    MxSpec { element: Element::E2M1, scale: ScaleFormat::E4M3, block: Block::Vector(16) };

/// The named formats, as the programs' `--format` spells them.
pub const NAMED: [(&str, MxSpec); 7] = [
    ("mxfp4", MXFP4),
    ("mxfp6-e2m3", MXFP6_E2M3),
    ("mxfp6-e3m2", MXFP6_E3M2),
    ("mxfp8-e4m3", MXFP8_E4M3),
    ("mxfp8-e5m2", MXFP8_E5M2),
    ("mxint8", MXINT8),
    ("nvfp4", NVFP4),
];

impl MxSpec {
    /// The named format of `name` (see [`NAMED`]), with its standard block.
    pub fn by_name(name: &str) -> Result<MxSpec> {
        NAMED.iter().find(|(n, _)| *n == name).map(|(_, spec)| *spec).ok_or_else(|| {
            let known: Vec<_> = NAMED.iter().map(|(n, _)| *n).collect();
            Error::InvalidSpec(format!("unknown format {name:?}; known: {}", known.join(", ")))
        })
    }

    /// The same format with another block.
    pub const fn with_block(self, block: Block) -> MxSpec {
        MxSpec { block, ..self }
    }

    /// The name of the format without its block, e.g. `mxfp4`.
    pub fn name(&self) -> &'static str {
        NAMED
            .iter()
            .find(|(_, s)| s.element == self.element && s.scale == self.scale)
            .map_or("custom", |(n, _)| n)
    }

    /// Bits an element, its share of the block's scale included.
    pub fn bits_per_element(&self) -> f64 {
        f64::from(self.element.bits()) + 8.0 / (self.block.len() * self.block.lines()) as f64
    }

    /// Checks that this combination exists: blocks of 16, 32, 64 or 128, squares of 16 or 32, and
    /// E4M3 scales only on E2M1 elements (NVFP4).
    pub fn validate(&self) -> Result<()> {
        match self.block {
            Block::Vector(16 | 32 | 64 | 128) | Block::Square(16 | 32) => {}
            Block::Vector(n) => {
                return Err(Error::InvalidSpec(format!(
                    "block 1x{n}: a vector block has 16, 32, 64 or 128 elements"
                )));
            }
            Block::Square(n) => {
                return Err(Error::InvalidSpec(format!(
                    "block {n}x{n}: a square block has a side of 16 or 32"
                )));
            }
        }
        if self.scale == ScaleFormat::E4M3 && self.element != Element::E2M1 {
            return Err(Error::InvalidSpec(format!(
                "{:?} elements under E4M3 scales: only E2M1 (NVFP4) is defined",
                self.element
            )));
        }
        Ok(())
    }
}

impl std::fmt::Display for MxSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.name(), self.block)
    }
}

/// How a block's E8M0 scale follows from its largest magnitude `amax`.
///
/// Every rule is `2^(⌊log2 amax⌋ − emax)`, times two when the fraction of `amax` reaches a threshold;
/// the exponent is then clamped to −127 … 127. Names and thresholds are torchao's
/// `ScaleCalculationMode`. For NVFP4's E4M3 scales, `Even` rounds `amax/6` to nearest and `Rceil` up;
/// the other two do not apply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ScaleRule {
    /// OCP MX v1.0's suggestion: never carry. The largest elements of a block may clip.
    Floor,
    /// `2^(⌈log2 amax⌉ − emax)`: carry unless `amax` is a power of two.
    Ceil,
    /// `2^⌈log2(amax / max)⌉`, the smallest power of two with which nothing clips: carry when the
    /// fraction of `amax` is above that of the element's largest value. For stochastic rounding.
    Rceil,
    /// Round `amax` to the element's precision first (half up), then `Floor`.
    Even,
}

/// How an element is rounded to a code.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Rounding {
    /// To nearest, ties to even; saturating.
    #[default]
    NearestEven,
    /// Up or down with probability proportional to nearness, decided by 16 random bits an element;
    /// saturating. The expectation is within 2⁻¹⁷ of an element's unit in the last place as long as
    /// nothing clips: use it with [`ScaleRule::Rceil`]. See [`crate::rng`] for which bits.
    Stochastic {
        /// The seed of a run.
        seed: u64,
        /// Tells draws of one seed apart: tensor, step, layout.
        stream: u64,
    },
}
