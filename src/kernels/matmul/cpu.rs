//! The product on the CPU, without anchors' powers of two, NaN, alpha, beta and bias, which are the caller's: [`exact`]
//! and [`alu`], the same bits as the GPU's exact tier and a sum in ascending order of k.
//!
//! Outputs are cut into tiles of up to 256 × 256, which are the threads' work. For a tile both operands are decoded, a
//! piece of k at a time, into *panels*: strips of [`ROWS`] or [`COLS`] output indices, in the order in which the innermost
//! loop reads them. That loop keeps 4 × 16 sums in registers. Every output is summed by one thread in ascending order of k,
//! so neither tiles nor threads change a bit; `mod tests` has the definition in plain loops.
//!
//! In the exact tier a column of B is signed bytes and a row of A unsigned digits, as AVX2 multiplies them: A's integers
//! are raised by their offset, the largest magnitude that they have, and the surplus offset · Σb is taken off each segment.
//! Where the products of a segment would not fit the 16 bits that they are summed in, A has two digits of four bits.
//!
//! Memory: at most 512 KiB of panels a thread.

use std::ops::Range;

use crate::engine::buffer::DType;
use crate::engine::cpu_threads;
use crate::formats::block::{Layout, unpack};
use crate::formats::{Block, Element, ScaleFormat, scale};

/// An operand as the CPU engine sees it: `len` output indices from `first` on, contracted from `first_k` on.
pub(super) struct View<'a> {
    pub values: Source<'a>,
    /// An output index is a position along the lines (dense: a column), and k counts lines (dense: rows). MX: square
    /// blocks only. Otherwise an output index is a line (a row), and packed ones have a `first_k` that is a multiple of 32.
    pub transposed: bool,
    pub first: usize,
    pub first_k: usize,
    pub len: usize,
}

/// What an operand holds.
pub(super) enum Source<'a> {
    /// A packed tensor. `anchors`: for every row of the scale matrix its largest scale byte (255: there is a NaN; E4M3
    /// scales: 127, or 255 with a NaN); for square blocks then the same for every column of blocks.
    Mx { layout: Layout, codes: &'a [u8], scales: &'a [u8], anchors: &'a [u32] },
    /// Row-major, packed in words as [`DType::f32_bits`] reads them; `cols` elements a row.
    Dense { dtype: DType, data: &'a [u32], cols: usize },
}

impl View<'_> {
    /// The anchor of output index `i`; 127 if dense.
    pub(super) fn anchor(&self, i: usize) -> u32 {
        match self.values {
            Source::Mx { .. } => self.packed().anchor(i),
            Source::Dense { .. } => 127,
        }
    }

    fn packed(&self) -> Packed<'_> {
        match &self.values {
            Source::Mx { layout, codes, scales, anchors } => {
                Packed::new(self, layout, codes, scales, anchors)
            }
            Source::Dense { .. } => unreachable!("dense operands have no codes"),
        }
    }
}

/// `acc`, `[a.len, b.len]`, of operands whose codes are integers: a segment's dot product is exact, its product with both
/// factors too, and each addition is rounded to nearest.
pub(super) fn exact(a: &View, b: &View, k: usize, acc: &mut [f32]) {
    product(&Exact::new(a, b), a.len, b.len, k, acc);
}

/// `acc`, `[a.len, b.len]`, of any operands: each product and each addition is rounded to nearest.
pub(super) fn alu(a: &View, b: &View, k: usize, acc: &mut [f32]) {
    product(&Alu { a: Values::new(a), b: Values::new(b) }, a.len, b.len, k, acc);
}

// ---- Tiles -----------------------------------------------------------------------------------------------------------

/// The outputs that the innermost loop sums at once: eight vectors of AVX2, half its registers.
const ROWS: usize = 4;
const COLS: usize = 16;
type Sums = [[f32; COLS]; ROWS];

/// The largest side of a tile of outputs.
const TILE: usize = 256;
/// Operands are decoded in squares with this side. Divides [`TILE`] and every tier's `DEPTH`.
const CELL: usize = 32;

/// One of the two tiers.
trait Tier: Sync {
    /// The elements of k that panels hold.
    const DEPTH: usize;
    /// Decoded operands.
    type Panels: Send;
    /// Panels for tiles of this many rows and columns.
    fn panels(&self, rows: usize, cols: usize) -> Self::Panels;
    /// Decodes a part of the operands.
    fn load(
        &self,
        to: &mut Self::Panels,
        rows: &Range<usize>,
        cols: &Range<usize>,
        k: Range<usize>,
    );
    /// Adds the products of a strip of rows and a strip of columns.
    fn multiply(panels: &Self::Panels, rows: usize, cols: usize, depth: usize, sums: &mut Sums);
}

/// A part of the outputs.
struct Tile<'a> {
    rows: Range<usize>,
    cols: Range<usize>,
    acc: Vec<&'a mut [f32]>,
}

/// Rows and columns of a tile, multiples of [`CELL`]: as large as there is work for every thread.
fn tile_size(m: usize, n: usize) -> (usize, usize) {
    let side = |len: usize| len.next_multiple_of(CELL).min(TILE);
    let (mut rows, mut cols) = (side(m), side(n));
    while m.div_ceil(rows) * n.div_ceil(cols) < 4 * cpu_threads() && rows.max(cols) > CELL {
        let longer = if rows > cols { &mut rows } else { &mut cols };
        *longer = (*longer / 2).next_multiple_of(CELL);
    }
    (rows, cols)
}

fn product<T: Tier>(tier: &T, m: usize, n: usize, k: usize, acc: &mut [f32]) {
    if acc.is_empty() || k == 0 {
        return acc.fill(0.0);
    }
    let (rows, cols) = tile_size(m, n);
    let mut tiles = Vec::with_capacity(m.div_ceil(rows) * n.div_ceil(cols));
    for (i, acc) in acc.chunks_mut(rows * n).enumerate() {
        let height = acc.len() / n;
        let first = tiles.len();
        tiles.extend((0..n).step_by(cols).map(|col| Tile {
            rows: i * rows..i * rows + height,
            cols: col..n.min(col + cols),
            acc: Vec::with_capacity(height),
        }));
        for row in acc.chunks_mut(n) {
            for (tile, part) in tiles[first..].iter_mut().zip(row.chunks_mut(cols)) {
                tile.acc.push(part);
            }
        }
    }
    let panels = || tier.panels(rows, cols);
    let run = |panels: &mut T::Panels, tile| run_tile(tier, panels, tile, k);
    #[cfg(not(target_arch = "wasm32"))]
    {
        use rayon::prelude::*;
        tiles.into_par_iter().for_each_init(panels, run);
    }
    #[cfg(target_arch = "wasm32")]
    {
        let mut panels = panels();
        tiles.into_iter().for_each(|tile| run(&mut panels, tile));
    }
}

fn run_tile<T: Tier>(tier: &T, panels: &mut T::Panels, mut tile: Tile<'_>, k: usize) {
    for start in (0..k).step_by(T::DEPTH) {
        let depth = T::DEPTH.min(k - start);
        tier.load(panels, &tile.rows, &tile.cols, start..start + depth);
        for (j, col) in (0..tile.cols.len()).step_by(COLS).enumerate() {
            for (i, rows) in tile.acc.chunks_mut(ROWS).enumerate() {
                let width = COLS.min(tile.cols.len() - col);
                let mut sums = Sums::default();
                if start > 0 {
                    for (sums, row) in sums.iter_mut().zip(rows.iter()) {
                        copy(&mut sums[..width], &row[col..col + width]);
                    }
                }
                T::multiply(panels, i, j, depth, &mut sums);
                for (sums, row) in sums.iter().zip(rows) {
                    copy(&mut row[col..col + width], &sums[..width]);
                }
            }
        }
    }
}

/// Copies up to [`COLS`] sums. Of all of them the compiler knows the number, and calls no function.
#[inline(always)]
fn copy(to: &mut [f32], from: &[f32]) {
    if to.len() == COLS && from.len() == COLS {
        to[..COLS].copy_from_slice(&from[..COLS]);
    } else {
        to.copy_from_slice(from);
    }
}

/// Whether the vector variants can run.
#[cfg(target_arch = "x86_64")]
#[inline]
fn has_avx2() -> bool {
    std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma")
}

// ---- Packed operands -------------------------------------------------------------------------------------------------

/// An MX operand, its divisions prepared.
#[derive(Clone, Copy)]
struct Packed<'a> {
    element: Element,
    scale: ScaleFormat,
    codes: &'a [u8],
    scales: &'a [u8],
    anchors: &'a [u32],
    transposed: bool,
    first: usize,
    first_k: usize,
    line_bytes: usize,
    /// Blocks of a line, and rows of the scale matrix.
    blocks: usize,
    scale_rows: usize,
    /// Elements of a block along and across the lines: powers of two, as their logarithms.
    block: u32,
    across: u32,
}

/// Codes of some output indices, along k.
type Cell = [[u8; CELL]; CELL];

impl<'a> Packed<'a> {
    fn new(
        view: &View<'_>,
        layout: &Layout,
        codes: &'a [u8],
        scales: &'a [u8],
        anchors: &'a [u32],
    ) -> Packed<'a> {
        debug_assert!(match view.transposed {
            true => matches!(layout.spec.block, Block::Square(_)),
            false => view.first_k.is_multiple_of(CELL),
        });
        Packed {
            element: layout.spec.element,
            scale: layout.spec.scale,
            codes,
            scales,
            anchors,
            transposed: view.transposed,
            first: view.first,
            first_k: view.first_k,
            line_bytes: layout.line_bytes(),
            blocks: layout.blocks(),
            scale_rows: layout.scale_rows(),
            block: layout.spec.block.len().ilog2(),
            across: layout.spec.block.lines().ilog2(),
        }
    }

    /// The line of an element, and the position in it.
    #[inline(always)]
    fn place(&self, i: usize, kk: usize) -> (usize, usize) {
        let (i, kk) = (self.first + i, self.first_k + kk);
        if self.transposed { (kk, i) } else { (i, kk) }
    }

    #[inline(always)]
    fn anchor(&self, i: usize) -> u32 {
        let i = self.first + i;
        self.anchors
            [if self.transposed { self.scale_rows + (i >> self.block) } else { i >> self.across }]
    }

    /// The scale of the block that holds an element.
    #[inline(always)]
    fn scale_byte(&self, i: usize, kk: usize) -> u8 {
        let (line, at) = self.place(i, kk);
        self.scales[(line >> self.across) * self.blocks + (at >> self.block)]
    }

    #[inline(always)]
    fn line(&self, line: usize) -> &'a [u8] {
        &self.codes[line * self.line_bytes..(line + 1) * self.line_bytes]
    }

    /// The lines of at most [`CELL`] output indices, if they have any.
    #[inline(always)]
    fn lines(&self, is: Range<usize>) -> [&'a [u8]; CELL] {
        let mut lines = [&[][..]; CELL];
        if !self.transposed {
            for (line, i) in lines.iter_mut().zip(is) {
                *line = self.line(self.first + i);
            }
        }
        lines
    }

    /// The codes of an output index for `depth` elements from `k` on, then zeros, out of what [`Packed::lines`] and
    /// [`Packed::turn`] have prepared.
    #[inline(always)]
    fn codes(
        &self,
        lines: &[&[u8]; CELL],
        turned: &Cell,
        lane: usize,
        k: usize,
        depth: usize,
    ) -> [u8; CELL] {
        if self.transposed {
            return turned[lane];
        }
        unpack_run(self.element.bits(), lines[lane], self.first_k + k, depth)
    }

    /// The codes of at most [`CELL`] output indices and elements of k, if they lie across the lines.
    #[inline(always)]
    fn turn(&self, is: Range<usize>, ks: Range<usize>, turned: &mut Cell) {
        if !self.transposed {
            return;
        }
        let (line, at) = self.place(is.start, ks.start);
        let mut across = Cell::default();
        for (j, codes) in across[..ks.len()].iter_mut().enumerate() {
            *codes = unpack_run(self.element.bits(), self.line(line + j), at, is.len());
        }
        for (i, codes) in turned.iter_mut().enumerate() {
            for (code, across) in codes.iter_mut().zip(&across) {
                *code = across[i];
            }
        }
    }
}

/// `N` bytes of a packed line, zeros behind its end.
#[inline(always)]
fn bytes<const N: usize>(line: &[u8], start: usize) -> [u8; N] {
    match line[start..].first_chunk() {
        Some(bytes) => *bytes,
        None => {
            let mut bytes = [0; N];
            bytes[..line.len() - start].copy_from_slice(&line[start..]);
            bytes
        }
    }
}

/// `count` codes of a packed line from position `at` on, then zeros.
#[inline(always)]
fn unpack_run(bits: u32, line: &[u8], at: usize, count: usize) -> [u8; CELL] {
    let mut codes = [0; CELL];
    if at.is_multiple_of(4) {
        codes = unpack_whole(bits, line, at);
        codes[count..].fill(0);
    } else {
        for (i, code) in codes[..count].iter_mut().enumerate() {
            *code = unpack(bits, line, at + i);
        }
    }
    codes
}

/// The codes of a packed line from position `at` on, which is a multiple of four: whole bytes in every format.
#[inline(always)]
fn unpack_whole(bits: u32, line: &[u8], at: usize) -> [u8; CELL] {
    match bits {
        4 => {
            let packed: [u8; CELL / 2] = bytes(line, at / 2);
            let packed: [u32; CELL / 8] = bytemuck::cast(packed);
            // Eight nibbles at a time, which vectors can do: halves go apart, then their halves, then theirs.
            bytemuck::cast(packed.map(|x| {
                let x = u64::from(u32::from_le(x));
                let x = (x | x << 16) & 0x0000_ffff_0000_ffff;
                let x = (x | x << 8) & 0x00ff_00ff_00ff_00ff;
                ((x | x << 4) & 0x0f0f_0f0f_0f0f_0f0f).to_le()
            }))
        }
        6 => {
            let packed: [u8; CELL / 4 * 3] = bytes(line, at / 4 * 3);
            let mut codes = [0u32; CELL / 4];
            for (codes, bytes) in codes.iter_mut().zip(packed.chunks_exact(3)) {
                let x = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], 0]);
                let x =
                    (x & 0x3f) | (x << 2 & 0x3f00) | (x << 4 & 0x3f_0000) | x << 6 & 0x3f00_0000;
                *codes = x.to_le();
            }
            bytemuck::cast(codes)
        }
        _ => bytes(line, at),
    }
}

/// How a tier scales blocks relative to the anchor: 2^(e − anchor + `bias`), zero below 2^`least`.
struct Relative {
    least: i32,
    bias: i32,
}

impl Relative {
    /// The factor of a block under E8M0, or the value of an E4M3 scale; 0 for NaN.
    #[inline(always)]
    fn factor(&self, format: ScaleFormat, byte: u8, anchor: u32) -> f32 {
        let below = i32::from(byte) - anchor as i32;
        match format {
            ScaleFormat::E8M0 if byte == scale::E8M0_NAN || anchor == 255 || below < self.least => {
                0.0
            }
            ScaleFormat::E8M0 => power_of_two(below + self.bias),
            ScaleFormat::E4M3 => e4m3(byte),
        }
    }
}

/// 2^e, a normal number.
#[inline(always)]
fn power_of_two(e: i32) -> f32 {
    f32::from_bits(((e + 127) as u32) << 23)
}

/// The value of an E4M3 scale; 0 if it is NaN.
#[inline(always)]
fn e4m3(byte: u8) -> f32 {
    let magnitude = byte & 0x7f;
    if magnitude == scale::E4M3_NAN {
        return 0.0;
    }
    // Its exponent and mantissa in f32's places, and the difference of the biases made up for.
    f32::from_bits(u32::from(magnitude) << 20) * power_of_two(127 - 7)
}

// ---- The exact tier --------------------------------------------------------------------------------------------------

/// The largest magnitude of an element's integers: those of E2M1 are twice its values, of E2M3 eight times, of INT8 64.
const fn largest(element: Element) -> i32 {
    match element {
        Element::E2M1 => 12,
        Element::E2M3 => 60,
        _ => 128,
    }
}

/// The integer of a code.
#[inline(always)]
fn integer(element: Element, code: u8) -> i8 {
    if element == Element::Int8 {
        return code as i8;
    }
    let (sign, mantissa) = (element.bits() - 1, element.mantissa_bits());
    let x = (code & ((1 << sign) - 1)) as i8;
    // From code to integer it is a polygon of slopes 1, 2 and 4, and it is convex.
    let magnitude = x.max(2 * x - (2 << mantissa)).max(4 * x - (8 << mantissa));
    let negative = -((code >> sign) as i8 & 1);
    (magnitude ^ negative) - negative
}

/// The exact tier's operands.
struct Exact<'a> {
    a: Packed<'a>,
    b: Packed<'a>,
    segment: usize,
    digits: usize,
}

struct Integers {
    a: IntegerPanel<ROWS>,
    b: IntegerPanel<COLS>,
    segment: usize,
}

/// Decoded integers of an operand, in strips of `W` output indices.
struct IntegerPanel<const W: usize> {
    /// For each strip: its digits, lowest first, each in words of four elements along k.
    words: Vec<[u32; W]>,
    /// For each strip and segment: the factors, and what A's offset adds to the segment's product.
    factors: Vec<[f32; W]>,
    surplus: Vec<[i32; W]>,
    digits: usize,
}

/// A strip of an [`IntegerPanel`].
struct Strip<'a, const W: usize> {
    words: &'a [[u32; W]],
    factors: &'a [[f32; W]],
    surplus: &'a [[i32; W]],
}

/// Words and segments, at most, of a strip of one digit.
const WORDS: usize = Exact::DEPTH / 4;
const SEGMENTS: usize = Exact::DEPTH / 16;

impl<'a> Exact<'a> {
    fn new(a: &'a View<'_>, b: &'a View<'_>) -> Exact<'a> {
        let (a, b) = (a.packed(), b.packed());
        let segment = if a.block.min(b.block) == 4 { 16 } else { 32 };
        // A 16-bit sum of pairs takes up half of a segment's products.
        let fits = 2 * largest(a.element) * largest(b.element) * (32 / 2) <= i32::from(i16::MAX);
        Exact { a, b, segment, digits: if fits { 1 } else { 2 } }
    }
}

impl Tier for Exact<'_> {
    const DEPTH: usize = 512;
    type Panels = Integers;

    fn panels(&self, rows: usize, cols: usize) -> Integers {
        Integers {
            a: IntegerPanel::new(rows, self.digits),
            b: IntegerPanel::new(cols, 1),
            segment: self.segment,
        }
    }

    fn load(&self, to: &mut Integers, rows: &Range<usize>, cols: &Range<usize>, k: Range<usize>) {
        let offset = largest(self.a.element);
        to.a.load(&self.a, rows, k.clone(), self.segment, offset, 0);
        to.b.load(&self.b, cols, k, self.segment, 0, offset);
    }

    fn multiply(panels: &Integers, rows: usize, cols: usize, depth: usize, sums: &mut Sums) {
        let segments = depth.div_ceil(panels.segment);
        let (a, b) = (panels.a.strip(rows, segments), panels.b.strip(cols, segments));
        #[cfg(target_arch = "x86_64")]
        if has_avx2() {
            // SAFETY: the processor has AVX2 and FMA, as just checked.
            return unsafe {
                match (panels.segment, panels.a.digits) {
                    (32, 1) => dot_avx2::<8, 1>(&a, &b, sums),
                    (32, _) => dot_avx2::<8, 2>(&a, &b, sums),
                    (_, 1) => dot_avx2::<4, 1>(&a, &b, sums),
                    (_, _) => dot_avx2::<4, 2>(&a, &b, sums),
                }
            };
        }
        dot(&a, &b, panels.segment / 4, panels.a.digits, sums);
    }
}

impl<const W: usize> IntegerPanel<W> {
    /// Two factors and the integers of a segment neither overflow nor become subnormal.
    const SCALES: Relative = Relative { least: -107, bias: 44 };

    fn new(len: usize, digits: usize) -> Self {
        let strips = len.div_ceil(W);
        IntegerPanel {
            words: vec![[0; W]; strips * digits * WORDS],
            factors: vec![[0.0; W]; strips * SEGMENTS],
            surplus: vec![[0; W]; strips * SEGMENTS],
            digits,
        }
    }

    fn strip(&self, i: usize, segments: usize) -> Strip<'_, W> {
        let words = self.digits * WORDS;
        Strip {
            words: &self.words[i * words..(i + 1) * words],
            factors: &self.factors[i * SEGMENTS..][..segments],
            surplus: &self.surplus[i * SEGMENTS..][..segments],
        }
    }

    /// Decodes `from`. To its integers `offset` is added; `other` is the other operand's offset. What the last strip lacks
    /// is any finite number: nobody reads its sums.
    fn load(
        &mut self,
        from: &Packed<'_>,
        is: &Range<usize>,
        ks: Range<usize>,
        segment: usize,
        offset: i32,
        other: i32,
    ) {
        #[cfg(target_arch = "x86_64")]
        if has_avx2() {
            // SAFETY: the processor has AVX2, as just checked.
            return unsafe { self.load_avx2(from, is, ks, segment, offset, other) };
        }
        self.load_any(from, is, ks, segment, offset, other);
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2")]
    fn load_avx2(
        &mut self,
        from: &Packed<'_>,
        is: &Range<usize>,
        ks: Range<usize>,
        segment: usize,
        offset: i32,
        other: i32,
    ) {
        self.load_any(from, is, ks, segment, offset, other);
    }

    /// Makes the element a constant of the loops.
    #[inline(always)]
    fn load_any(
        &mut self,
        from: &Packed<'_>,
        is: &Range<usize>,
        ks: Range<usize>,
        segment: usize,
        offset: i32,
        other: i32,
    ) {
        let packed = |element| Packed { element, ..*from };
        match from.element {
            Element::E2M1 => {
                self.load_cells(packed(Element::E2M1), is, ks, segment, offset, other);
            }
            Element::E2M3 => {
                self.load_cells(packed(Element::E2M3), is, ks, segment, offset, other);
            }
            Element::Int8 => {
                self.load_cells(packed(Element::Int8), is, ks, segment, offset, other);
            }
            _ => unreachable!("no integers"),
        }
    }

    #[inline(always)]
    fn load_cells(
        &mut self,
        from: Packed<'_>,
        is: &Range<usize>,
        ks: Range<usize>,
        segment: usize,
        offset: i32,
        other: i32,
    ) {
        self.load_factors(&from, is, &ks, segment);
        let mut turned = Cell::default();
        for i in is.clone().step_by(CELL) {
            let len = CELL.min(is.end - i);
            let lines = from.lines(i..i + len);
            for k in ks.clone().step_by(CELL) {
                let depth = CELL.min(ks.end - k);
                from.turn(i..i + len, k..k + depth, &mut turned);
                for first in (0..len).step_by(W) {
                    let mut lanes = [[0; CELL / 4]; W];
                    let filled = lanes.iter_mut().enumerate().take(len - first);
                    if from.transposed || depth < CELL {
                        for (lane, words) in filled {
                            let codes = from.codes(&lines, &turned, first + lane, k, depth);
                            *words = raised(from.element, codes, offset);
                        }
                    } else {
                        // The same without a choice in the loop.
                        for (lane, words) in filled {
                            let at = from.first_k + k;
                            let codes = unpack_whole(from.element.bits(), lines[first + lane], at);
                            *words = raised(from.element, codes, offset);
                        }
                    }
                    let strip = (i - is.start + first) / W;
                    let word = strip * self.digits * WORDS + (k - ks.start) / 4;
                    if self.digits == 2 {
                        let high = lanes.map(|words| words.map(|x| x >> 4 & 0x0f0f_0f0f));
                        transpose(&high, &mut self.words[word + WORDS..]);
                        lanes = lanes.map(|words| words.map(|x| x & 0x0f0f_0f0f));
                    }
                    transpose(&lanes, &mut self.words[word..]);
                    if other != 0 {
                        let words = self.words[word..][..CELL / 4].chunks_exact(segment / 4);
                        let at = strip * SEGMENTS + ((k - ks.start) >> segment.ilog2());
                        for (words, to) in words.zip(&mut self.surplus[at..]) {
                            *to = sums_of_bytes(words).map(|sum| other * sum);
                        }
                    }
                }
            }
        }
    }

    #[inline(always)]
    fn load_factors(
        &mut self,
        from: &Packed<'_>,
        is: &Range<usize>,
        ks: &Range<usize>,
        segment: usize,
    ) {
        for i in is.clone() {
            let (strip, lane) = ((i - is.start) / W, (i - is.start) % W);
            let to = &mut self.factors[strip * SEGMENTS..][..SEGMENTS];
            let anchor = from.anchor(i);
            // The bytes along k from its block 0 on.
            let (step, first) = if from.transposed {
                (from.blocks, (from.first + i) >> from.block)
            } else {
                (1, ((from.first + i) >> from.across) * from.blocks)
            };
            let k = from.first_k + ks.start;
            for (j, to) in to[..ks.len().div_ceil(segment)].iter_mut().enumerate() {
                let byte = from.scales[first + ((k + j * segment) >> from.block) * step];
                to[lane] = Self::SCALES.factor(from.scale, byte, anchor);
            }
        }
    }
}

/// The integers of codes plus an offset, in words.
#[inline(always)]
fn raised(element: Element, codes: [u8; CELL], offset: i32) -> [u32; CELL / 4] {
    let mut bytes = [0; CELL];
    for (byte, code) in bytes.iter_mut().zip(codes) {
        *byte = (integer(element, code) as u8).wrapping_add(offset as u8);
    }
    bytemuck::cast(bytes)
}

/// The words of `W` output indices, a word of each at a time.
#[inline(always)]
fn transpose<const W: usize>(lanes: &[[u32; 8]; W], words: &mut [[u32; W]]) {
    let words = &mut words[..8];
    #[cfg(target_arch = "x86_64")]
    if W.is_multiple_of(8) && has_avx2() {
        for (i, lanes) in lanes.chunks_exact(8).enumerate() {
            // SAFETY: the processor has AVX2, as just checked.
            let columns = unsafe { transpose_avx2(lanes) };
            for (words, column) in words.iter_mut().zip(columns) {
                words[8 * i..8 * i + 8].copy_from_slice(&column);
            }
        }
        return;
    }
    for (q, words) in words.iter_mut().enumerate() {
        for lane in 0..W {
            words[lane] = lanes[lane][q];
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn transpose_avx2(lanes: &[[u32; 8]]) -> [[u32; 8]; 8] {
    use std::arch::x86_64::*;
    let mut x = [_mm256_setzero_si256(); 8];
    for (x, lane) in x.iter_mut().zip(lanes) {
        *x = bytemuck::cast(*lane);
    }
    // Pairs of lanes, pairs of pairs, and both halves: the words 0 … 3 are in the low half, 4 … 7 in the high one.
    let mut pairs = x;
    for i in [0, 2, 4, 6] {
        pairs[i] = _mm256_unpacklo_epi32(x[i], x[i + 1]);
        pairs[i + 1] = _mm256_unpackhi_epi32(x[i], x[i + 1]);
    }
    let mut fours = x;
    for i in [0, 4] {
        for j in [0, 1] {
            fours[i + 2 * j] = _mm256_unpacklo_epi64(pairs[i + j], pairs[i + j + 2]);
            fours[i + 2 * j + 1] = _mm256_unpackhi_epi64(pairs[i + j], pairs[i + j + 2]);
        }
    }
    for i in 0..4 {
        x[i] = _mm256_permute2x128_si256(fours[i], fours[i + 4], 0x20);
        x[i + 4] = _mm256_permute2x128_si256(fours[i], fours[i + 4], 0x31);
    }
    bytemuck::cast(x)
}

/// For each lane the sum of its signed bytes.
#[inline(always)]
fn sums_of_bytes<const W: usize>(words: &[[u32; W]]) -> [i32; W] {
    // Two sums of bytes + 128 a word.
    let mut pairs = [0u32; W];
    for word in words {
        for lane in 0..W {
            let x = word[lane] ^ 0x8080_8080;
            pairs[lane] += (x & 0x00ff_00ff) + (x >> 8 & 0x00ff_00ff);
        }
    }
    let mut sums = [0; W];
    for lane in 0..W {
        let sum = (pairs[lane] & 0xffff) + (pairs[lane] >> 16);
        sums[lane] = sum as i32 - 128 * 4 * words.len() as i32;
    }
    sums
}

/// Adds the products of two strips, a segment of `quads` words after the other. Any processor.
fn dot(a: &Strip<ROWS>, b: &Strip<COLS>, quads: usize, digits: usize, sums: &mut Sums) {
    for (segment, surplus) in b.surplus.iter().enumerate() {
        let mut s = [[0i32; COLS]; ROWS];
        for digit in 0..digits {
            for q in segment * quads..(segment + 1) * quads {
                for (s, a) in s.iter_mut().zip(&a.words[digit * WORDS + q]) {
                    let a = a.to_ne_bytes().map(|a| i32::from(a) << (4 * digit));
                    for (s, b) in s.iter_mut().zip(&b.words[q]) {
                        let b = b.to_ne_bytes().map(|b| i32::from(b as i8));
                        *s += a[0] * b[0] + a[1] * b[1] + a[2] * b[2] + a[3] * b[3];
                    }
                }
            }
        }
        for r in 0..ROWS {
            for c in 0..COLS {
                let factor = a.factors[segment][r] * b.factors[segment][c];
                sums[r][c] += (s[r][c] - surplus[c]) as f32 * factor;
            }
        }
    }
}

/// [`dot`] in vectors of columns.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn dot_avx2<const QUADS: usize, const DIGITS: usize>(
    a: &Strip<ROWS>,
    b: &Strip<COLS>,
    sums: &mut Sums,
) {
    use std::arch::x86_64::*;
    const VECTORS: usize = COLS / 8;

    /// A vector of a row of lanes.
    #[inline(always)]
    fn load<T: bytemuck::Pod>(lanes: &[T; COLS], vector: usize) -> __m256i {
        bytemuck::pod_read_unaligned(bytemuck::cast_slice(&lanes[8 * vector..8 * vector + 8]))
    }

    let mut totals = [[_mm256_setzero_ps(); VECTORS]; ROWS];
    for (totals, sums) in totals.iter_mut().zip(&*sums) {
        for (v, total) in totals.iter_mut().enumerate() {
            *total = _mm256_castsi256_ps(load(sums, v));
        }
    }
    for segment in 0..b.factors.len() {
        let mut s = [[_mm256_setzero_si256(); VECTORS]; ROWS];
        for digit in 0..DIGITS {
            let words = segment * QUADS..(segment + 1) * QUADS;
            let a_words = &a.words[digit * WORDS..][words.clone()];
            // Sums of two elements each, in 16 bits: see `Exact::new`.
            let mut pairs = [[_mm256_setzero_si256(); VECTORS]; ROWS];
            for (a, b) in a_words.iter().zip(&b.words[words]) {
                let b: [_; VECTORS] = [load(b, 0), load(b, 1)];
                for r in 0..ROWS {
                    let a = _mm256_set1_epi32(a[r] as i32);
                    for v in 0..VECTORS {
                        let products = _mm256_maddubs_epi16(a, b[v]);
                        pairs[r][v] = _mm256_add_epi16(pairs[r][v], products);
                    }
                }
            }
            let weight = _mm256_set1_epi16(1 << (4 * digit));
            for r in 0..ROWS {
                for v in 0..VECTORS {
                    s[r][v] = _mm256_add_epi32(s[r][v], _mm256_madd_epi16(pairs[r][v], weight));
                }
            }
        }
        for v in 0..VECTORS {
            let surplus = load(&b.surplus[segment], v);
            let fb = _mm256_castsi256_ps(load(&b.factors[segment], v));
            for r in 0..ROWS {
                let s = _mm256_cvtepi32_ps(_mm256_sub_epi32(s[r][v], surplus));
                let factor = _mm256_mul_ps(_mm256_set1_ps(a.factors[segment][r]), fb);
                totals[r][v] = _mm256_fmadd_ps(s, factor, totals[r][v]);
            }
        }
    }
    for (totals, sums) in totals.iter().zip(sums) {
        for (v, total) in totals.iter().enumerate() {
            sums[8 * v..8 * v + 8].copy_from_slice(&bytemuck::cast::<_, [f32; 8]>(*total));
        }
    }
}

// ---- The f32 tier ----------------------------------------------------------------------------------------------------

/// The f32 tier's operands.
struct Alu<'a> {
    a: Values<'a>,
    b: Values<'a>,
}

/// An operand as f32 values.
enum Values<'a> {
    /// With the values of all codes.
    Packed(Packed<'a>, Box<[f32; 256]>),
    Dense(&'a View<'a>, DType, &'a [u32], usize),
}

struct Floats {
    a: Vec<[f32; ROWS]>,
    b: Vec<[f32; COLS]>,
}

impl Alu<'_> {
    const SCALES: Relative = Relative { least: -100, bias: 0 };
}

impl<'a> Values<'a> {
    fn new(view: &'a View<'a>) -> Values<'a> {
        match view.values {
            Source::Mx { layout, .. } => {
                let mut values = Box::new([0.0; 256]);
                for code in 0..1u32 << layout.spec.element.bits() {
                    values[code as usize] = layout.spec.element.decode(code as u8);
                }
                Values::Packed(view.packed(), values)
            }
            Source::Dense { dtype, data, cols } => Values::Dense(view, dtype, data, cols),
        }
    }

    /// Decodes into strips of `W` output indices. What the last strip lacks is left as it is: nobody reads its sums.
    fn load<const W: usize>(&self, to: &mut [[f32; W]], is: &Range<usize>, ks: Range<usize>) {
        match self {
            Values::Packed(packed, values) => load_packed(packed, values, to, is, ks),
            Values::Dense(view, DType::F32, data, cols) => {
                load_dense(view, data, *cols, |bits| bits, to, is, ks);
            }
            Values::Dense(view, dtype, data, cols) => {
                let halves: &[u16] = bytemuck::cast_slice(data);
                match dtype {
                    DType::BF16 => {
                        load_dense(view, halves, *cols, |h| u32::from(h) << 16, to, is, ks);
                    }
                    _ => {
                        let widen = |half| dtype.widen(u32::from(half));
                        load_dense(view, halves, *cols, widen, to, is, ks);
                    }
                }
            }
        }
    }
}

/// Loads dense elements, of which `bits` makes f32's.
fn load_dense<T: bytemuck::Pod, const W: usize>(
    view: &View<'_>,
    data: &[T],
    cols: usize,
    bits: impl Fn(T) -> u32,
    to: &mut [[f32; W]],
    is: &Range<usize>,
    ks: Range<usize>,
) {
    let k = view.first_k + ks.start;
    for i in is.clone().step_by(W) {
        let lanes = W.min(is.end - i);
        let to = &mut to[(i - is.start) / W * Alu::DEPTH..][..ks.len()];
        let first = view.first + i;
        if view.transposed {
            // The lanes of a position lie side by side.
            for (to, row) in to.iter_mut().zip(k..) {
                let from = &data[row * cols + first..][..lanes];
                match <[T; W]>::try_from(from) {
                    Ok(from) => *to = from.map(|x| f32::from_bits(bits(x))),
                    Err(_) => {
                        for (to, x) in to.iter_mut().zip(from) {
                            *to = f32::from_bits(bits(*x));
                        }
                    }
                }
            }
            continue;
        }
        // What the last strip lacks repeats a row.
        let rows: [&[T]; W] = std::array::from_fn(|lane| {
            &data[(first + lane.min(lanes - 1)) * cols + k..][..ks.len()]
        });
        for (j, to) in to.chunks_mut(8).enumerate() {
            let mut words = [[0; W]; 8];
            let here = 8 * j..8 * j + to.len();
            if here.len() == 8 {
                let lanes: [[u32; 8]; W] = std::array::from_fn(|lane| {
                    let from = &rows[lane][8 * j..8 * j + 8];
                    std::array::from_fn(|q| bits(from[q]))
                });
                transpose(&lanes, &mut words);
            } else {
                for (words, at) in words.iter_mut().zip(here) {
                    *words = std::array::from_fn(|lane| bits(rows[lane][at]));
                }
            }
            for (to, words) in to.iter_mut().zip(words) {
                *to = words.map(f32::from_bits);
            }
        }
    }
}

fn load_packed<const W: usize>(
    from: &Packed<'_>,
    values: &[f32; 256],
    to: &mut [[f32; W]],
    is: &Range<usize>,
    ks: Range<usize>,
) {
    let mut turned = Cell::default();
    for i in is.clone().step_by(CELL) {
        let len = CELL.min(is.end - i);
        let lines = from.lines(i..i + len);
        for k in ks.clone().step_by(CELL) {
            let depth = CELL.min(ks.end - k);
            from.turn(i..i + len, k..k + depth, &mut turned);
            for lane in 0..len {
                let codes = from.codes(&lines, &turned, lane, k, depth);
                let (strip, at) = ((i - is.start + lane) / W, lane % W);
                let to = &mut to[strip * Alu::DEPTH + k - ks.start..][..depth];
                let mut j = 0;
                while j < depth {
                    // Up to the end of the block.
                    let block = 1 << from.block;
                    let end = depth.min(j + block - (from.first_k + k + j) % block);
                    let byte = from.scale_byte(i + lane, k + j);
                    let factor = Alu::SCALES.factor(from.scale, byte, from.anchor(i + lane));
                    for (to, code) in to[j..end].iter_mut().zip(&codes[j..end]) {
                        let value = values[usize::from(*code)];
                        // Infinity and NaN stay what they are even under a scale of 0.
                        to[at] = if value.is_finite() { value * factor } else { value };
                    }
                    j = end;
                }
            }
        }
    }
}

impl Tier for Alu<'_> {
    const DEPTH: usize = 256;
    type Panels = Floats;

    fn panels(&self, rows: usize, cols: usize) -> Floats {
        Floats {
            a: vec![[0.0; ROWS]; rows / ROWS * Self::DEPTH],
            b: vec![[0.0; COLS]; cols / COLS * Self::DEPTH],
        }
    }

    fn load(&self, to: &mut Floats, rows: &Range<usize>, cols: &Range<usize>, k: Range<usize>) {
        self.a.load(&mut to.a, rows, k.clone());
        self.b.load(&mut to.b, cols, k);
    }

    fn multiply(panels: &Floats, rows: usize, cols: usize, depth: usize, sums: &mut Sums) {
        let a = &panels.a[rows * Self::DEPTH..][..depth];
        let b = &panels.b[cols * Self::DEPTH..][..depth];
        #[cfg(target_arch = "x86_64")]
        if has_avx2() {
            // SAFETY: the processor has AVX2, as just checked.
            return unsafe { multiply_add_avx2(a, b, sums) };
        }
        multiply_add(a, b, sums);
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn multiply_add_avx2(a: &[[f32; ROWS]], b: &[[f32; COLS]], sums: &mut Sums) {
    multiply_add(a, b, sums);
}

/// Product and sum are rounded apart: a fused step is a call of a function where the processor has none.
#[inline(always)]
fn multiply_add(a: &[[f32; ROWS]], b: &[[f32; COLS]], sums: &mut Sums) {
    let mut totals = *sums;
    for (a, b) in a.iter().zip(b) {
        for r in 0..ROWS {
            for c in 0..COLS {
                totals[r][c] += a[r] * b[c];
            }
        }
    }
    *sums = totals;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::{Axis, MxSpec};

    /// [`exact`]'s definition, an output at a time.
    fn exact_plain(a: &View, b: &View, k: usize, acc: &mut [f32]) {
        let is16 = |view: &View| layout(view).spec.block.len() == 16;
        let segment = if is16(a) || is16(b) { 16 } else { 32 };
        for i in 0..a.len {
            for j in 0..b.len {
                let mut sum = 0.0;
                for start in (0..k).step_by(segment) {
                    let end = k.min(start + segment);
                    let s: i32 = (start..end).map(|kk| int(a, i, kk) * int(b, j, kk)).sum();
                    let factors = [(a, i), (b, j)].map(|(view, i)| {
                        scale_plain(view, i, start, -107).map_or(0.0, |x| {
                            match layout(view).spec.scale {
                                ScaleFormat::E8M0 => (x * 2f64.powi(44)) as f32,
                                ScaleFormat::E4M3 => x as f32,
                            }
                        })
                    });
                    sum += s as f32 * (factors[0] * factors[1]);
                }
                acc[i * b.len + j] = sum;
            }
        }
    }

    /// [`alu`]'s definition, an output at a time.
    fn alu_plain(a: &View, b: &View, k: usize, acc: &mut [f32]) {
        for i in 0..a.len {
            for j in 0..b.len {
                let mut sum = 0.0;
                for kk in 0..k {
                    sum += value(a, i, kk) * value(b, j, kk);
                }
                acc[i * b.len + j] = sum;
            }
        }
    }

    fn layout<'a>(view: &'a View) -> &'a Layout {
        match &view.values {
            Source::Mx { layout, .. } => layout,
            Source::Dense { .. } => unreachable!(),
        }
    }

    /// The line, or row, of an element, and the position in it.
    fn place(view: &View, i: usize, kk: usize) -> (usize, usize) {
        let (i, kk) = (view.first + i, view.first_k + kk);
        if view.transposed { (kk, i) } else { (i, kk) }
    }

    fn code(view: &View, i: usize, kk: usize) -> u8 {
        let Source::Mx { layout, codes, .. } = &view.values else { unreachable!() };
        let (line, at) = place(view, i, kk);
        unpack(layout.spec.element.bits(), &codes[line * layout.line_bytes()..], at)
    }

    fn int(view: &View, i: usize, kk: usize) -> i32 {
        let element = layout(view).spec.element;
        let unit = match element {
            Element::E2M1 => 2.0,
            Element::E2M3 => 8.0,
            _ => 64.0,
        };
        (element.decode(code(view, i, kk)) * unit) as i32
    }

    /// A block's scale, E8M0 relative to the anchor; nothing if it is NaN or below 2^`least`.
    fn scale_plain(view: &View, i: usize, kk: usize, least: i32) -> Option<f64> {
        let Source::Mx { layout, scales, .. } = &view.values else { unreachable!() };
        let (line, at) = place(view, i, kk);
        let byte = scales[layout.scale_index(line, at)];
        match layout.spec.scale {
            ScaleFormat::E8M0 => {
                let below = i32::from(byte) - view.anchor(i) as i32;
                (byte != 255 && view.anchor(i) != 255 && below >= least).then(|| 2f64.powi(below))
            }
            ScaleFormat::E4M3 => {
                let value = f64::from(Element::E4M3.decode(byte & 0x7f));
                (!value.is_nan()).then_some(value)
            }
        }
    }

    fn value(view: &View, i: usize, kk: usize) -> f32 {
        if let Source::Dense { dtype, data, cols } = &view.values {
            let (row, col) = place(view, i, kk);
            return f32::from_bits(dtype.f32_bits(data, row * cols + col));
        }
        let element = layout(view).spec.element.decode(code(view, i, kk));
        let scale = scale_plain(view, i, kk, -100).unwrap_or(0.0) as f32;
        if element.is_finite() { element * scale } else { element }
    }

    /// Owns what a [`View`] borrows.
    struct Data {
        layout: Option<Layout>,
        dtype: DType,
        cols: usize,
        bytes: Vec<u8>,
        words: Vec<u32>,
        scales: Vec<u8>,
        anchors: Vec<u32>,
        transposed: bool,
        first: usize,
        first_k: usize,
        len: usize,
    }

    struct Random(u64);

    impl Random {
        fn next(&mut self) -> u32 {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (self.0 >> 33) as u32
        }
        fn bytes(&mut self, len: usize) -> Vec<u8> {
            (0..len).map(|_| (self.next() >> 8) as u8).collect()
        }
    }

    /// How far the scales spread.
    #[derive(Clone, Copy, Debug)]
    enum Spread {
        /// All bytes, 0 and 255 among them.
        All,
        /// So near that most blocks count.
        Near,
    }

    impl Data {
        /// Random codes: `len` output indices and `k` elements, with other lines (or, transposed, lines and positions)
        /// before and after.
        fn mx(
            spec: MxSpec,
            transposed: bool,
            len: usize,
            k: usize,
            spread: Spread,
            random: &mut Random,
        ) -> Data {
            let n = spec.block.len();
            let first = (random.next() % 40) as usize;
            let first_k = if transposed { n * (random.next() % 3) as usize } else { 0 };
            let outer = first + len + (random.next() % 3) as usize;
            let inner = first_k + k + (random.next() % 3) as usize;
            let (rows, cols) = if transposed { (inner, outer) } else { (outer, k) };
            let layout = Layout::new(spec, Axis::One, rows, cols).unwrap();
            let bytes = random.bytes(layout.codes_len());
            let mut scales = random.bytes(layout.scales_len());
            if let (Spread::Near, ScaleFormat::E8M0) = (spread, spec.scale) {
                scales.iter_mut().for_each(|s| *s = 120 + *s % 8);
            }
            let anchor = |scales: &mut dyn Iterator<Item = u8>| match spec.scale {
                ScaleFormat::E8M0 => scales.max().map_or(0, u32::from),
                ScaleFormat::E4M3 => {
                    if scales.map(|s| s & 0x7f).max() == Some(0x7f) {
                        255
                    } else {
                        127
                    }
                }
            };
            let blocks = layout.blocks();
            let mut anchors: Vec<u32> = (0..layout.scale_rows())
                .map(|row| anchor(&mut (0..blocks).map(|b| scales[row * blocks + b])))
                .collect();
            if spec.block.lines() > 1 {
                anchors.extend((0..blocks).map(|b| {
                    anchor(&mut (0..layout.scale_rows()).map(|row| scales[row * blocks + b]))
                }));
            }
            Data {
                layout: Some(layout),
                dtype: DType::F32,
                cols: 0,
                bytes,
                words: vec![],
                scales,
                anchors,
                transposed,
                first,
                first_k,
                len,
            }
        }

        fn dense(
            dtype: DType,
            transposed: bool,
            len: usize,
            k: usize,
            random: &mut Random,
        ) -> Data {
            let first = (random.next() % 40) as usize;
            let first_k = if transposed { (random.next() % 40) as usize } else { 0 };
            let (rows, cols) =
                if transposed { (first_k + k, first + len + 1) } else { (first + len, k + 1) };
            let words = (0..(rows * cols * dtype.size()).div_ceil(4))
                .map(|_| {
                    let mut one =
                        || dtype.narrow(((random.next() % 2000) as f32 / 1000.0 - 1.0).to_bits());
                    match dtype {
                        DType::F32 => one(),
                        _ => one() | one() << 16,
                    }
                })
                .collect();
            Data {
                layout: None,
                dtype,
                cols,
                bytes: vec![],
                words,
                scales: vec![],
                anchors: vec![],
                transposed,
                first,
                first_k,
                len,
            }
        }

        fn view(&self) -> View<'_> {
            View {
                values: match self.layout {
                    Some(layout) => Source::Mx {
                        layout,
                        codes: &self.bytes,
                        scales: &self.scales,
                        anchors: &self.anchors,
                    },
                    None => Source::Dense { dtype: self.dtype, data: &self.words, cols: self.cols },
                },
                transposed: self.transposed,
                first: self.first,
                first_k: self.first_k,
                len: self.len,
            }
        }
    }

    const SHAPES: [[usize; 3]; 13] = [
        [1, 1, 1],
        [0, 3, 5],
        [3, 0, 5],
        [3, 5, 0],
        [1, 70, 100],
        [4, 16, 32],
        [5, 17, 33],
        [33, 31, 16],
        [37, 50, 143],
        [6, 9, 512],
        [3, 7, 1100],
        [270, 9, 47],
        [9, 270, 33],
    ];

    fn specs(elements: &[Element]) -> Vec<MxSpec> {
        let specs = crate::kernels::all_specs();
        specs.into_iter().filter(|spec| elements.contains(&spec.element)).collect()
    }

    fn product(f: fn(&View, &View, usize, &mut [f32]), a: &Data, b: &Data, k: usize) -> Vec<u32> {
        let mut acc = vec![f32::NAN; a.len * b.len];
        f(&a.view(), &b.view(), k, &mut acc);
        // NaN's payload is the processor's choice.
        acc.iter().map(|x| if x.is_nan() { f32::NAN } else { *x }.to_bits()).collect()
    }

    fn transposable(spec: MxSpec) -> &'static [bool] {
        if spec.block.lines() > 1 { &[false, true] } else { &[false] }
    }

    #[test]
    fn exact_is_its_definition() {
        let specs = specs(&[Element::E2M1, Element::E2M3, Element::Int8]);
        let mut random = Random(1);
        let mut shapes = SHAPES.iter().cycle();
        for a_spec in &specs {
            for b_spec in &specs {
                for a_transposed in transposable(*a_spec) {
                    for b_transposed in transposable(*b_spec) {
                        for spread in [Spread::Near, Spread::All] {
                            let [m, n, k] = *shapes.next().unwrap();
                            let a = Data::mx(*a_spec, *a_transposed, m, k, spread, &mut random);
                            let b = Data::mx(*b_spec, *b_transposed, n, k, spread, &mut random);
                            assert!(
                                product(exact, &a, &b, k) == product(exact_plain, &a, &b, k),
                                "{a_spec} {a_transposed}, {b_spec} {b_transposed}, {spread:?}: {m}x{n}x{k}"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn alu_is_its_definition() {
        let mut random = Random(2);
        let mut shapes = SHAPES.iter().cycle();
        let operand = |number: usize, len: usize, k: usize, random: &mut Random| {
            let specs = crate::kernels::all_specs();
            match specs.get(number / 4) {
                Some(spec) => {
                    let transposed = spec.block.lines() > 1 && number % 2 == 1;
                    let spread = if number % 4 < 2 { Spread::Near } else { Spread::All };
                    Data::mx(*spec, transposed, len, k, spread, random)
                }
                None => Data::dense(DType::ALL[number % 3], number % 2 == 1, len, k, random),
            }
        };
        let operands = 4 * crate::kernels::all_specs().len() + 6;
        for number in 0..operands {
            // Every operand on either side, the other side wandering through all of them.
            for number in [[number, number * 29 % operands], [number * 37 % operands, number]] {
                let [m, n, k] = *shapes.next().unwrap();
                let a = operand(number[0], m, k, &mut random);
                let b = operand(number[1], n, k, &mut random);
                assert!(
                    product(alu, &a, &b, k) == product(alu_plain, &a, &b, k),
                    "{number:?}: {m}x{n}x{k}"
                );
            }
        }
    }

    /// The variants for processors without AVX2.
    #[test]
    fn any_processor_computes_the_same() {
        let specs = specs(&[Element::E2M1, Element::E2M3, Element::Int8]);
        let mut random = Random(3);
        for a_spec in &specs {
            for b_spec in &specs {
                let a = Data::mx(*a_spec, false, 37, 300, Spread::Near, &mut random);
                let b = Data::mx(*b_spec, false, 41, 300, Spread::Near, &mut random);
                let (a, b) = (a.view(), b.view());
                let tier = Exact::new(&a, &b);
                let mut panels = tier.panels(64, 64);
                tier.load(&mut panels, &(0..37), &(0..41), 0..300);
                let mut sums = [Sums::default(); 2];
                Exact::multiply(&panels, 9, 2, 300, &mut sums[0]);
                let segments = 300usize.div_ceil(tier.segment);
                dot(
                    &panels.a.strip(9, segments),
                    &panels.b.strip(2, segments),
                    tier.segment / 4,
                    tier.digits,
                    &mut sums[1],
                );
                assert_eq!(
                    sums[0].map(|s| s.map(f32::to_bits)),
                    sums[1].map(|s| s.map(f32::to_bits))
                );
            }
        }
    }

    #[test]
    fn integers_are_the_values_in_units() {
        for element in [Element::E2M1, Element::E2M3, Element::Int8] {
            let unit = if element == Element::E2M1 {
                2.0
            } else if element == Element::E2M3 {
                8.0
            } else {
                64.0
            };
            for code in 0..1u32 << element.bits() {
                let x = i32::from(integer(element, code as u8));
                assert_eq!(x as f32, element.decode(code as u8) * unit);
                assert!(x.abs() <= largest(element));
            }
        }
        for byte in 0..=255 {
            let value = Element::E4M3.decode(byte & 0x7f);
            assert_eq!(e4m3(byte), if value.is_nan() { 0.0 } else { value });
        }
    }

    #[test]
    fn a_wrong_code_is_seen() {
        let mut random = Random(4);
        let mut a = Data::mx(crate::MXFP4, false, 5, 96, Spread::Near, &mut random);
        let b = Data::mx(crate::MXFP4, false, 7, 96, Spread::Near, &mut random);
        let right = [product(exact_plain, &a, &b, 96), product(alu_plain, &a, &b, 96)];
        // The sign of a code that is not zero.
        let at = (a.first + 2) * a.layout.unwrap().line_bytes();
        let place = (at..).find(|at| a.bytes[*at] & 7 != 0).unwrap();
        a.bytes[place] ^= 8;
        assert_ne!(product(exact, &a, &b, 96), right[0]);
        assert_ne!(product(alu, &a, &b, 96), right[1]);
    }
}
