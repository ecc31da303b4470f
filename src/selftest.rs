//! What `info --selftest` runs: every kernel on fixed inputs, one digest each.
//!
//! Everything here is exact, so the digests are the same on every engine, adapter and driver that keeps the crate's
//! promise; DESIGN.md has the table. An owner of a machine that nobody here has can show in one command whether it
//! does.

use crate::formats::NAMED;
use crate::kernels::{Guards, Hadamard, QuantizeBoth, Side, Signs};
use crate::rng::{ROUNDS, threefry4x32};
use crate::{
    Axis, Block, Context, DType, Dequantize, DequantizeDesc, MXFP4, MXFP6_E2M3, MXINT8, Matmul,
    MatmulDesc, MxSpec, NVFP4, Output, Quantize, QuantizeDesc, Result, Rounding, ScaleFormat,
    ScaleRule, Tier,
};

/// The digest of one case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Digest {
    /// What ran.
    pub name: String,
    /// FNV-1a of the output bytes.
    pub digest: u64,
}

/// Rows and columns of the inputs: whole blocks of 32 along both axes, ragged for larger ones.
const SHAPE: [usize; 2] = [96, 160];

/// Runs all cases. `progress` is told of each one before it runs: its name, its number and how many there are.
pub async fn run(
    ctx: &Context,
    mut progress: impl FnMut(&str, usize, usize),
) -> Result<Vec<Digest>> {
    let (cases, products, both) = (cases(), products(), both());
    let total = cases.len() + products.len() + both.len();
    let mut digests = Vec::new();
    for (i, case) in cases.iter().enumerate() {
        progress(&case.name(), i, total);
        digests.extend(case.run(ctx).await?);
    }
    for (i, product) in products.iter().enumerate() {
        progress(&product.name(), cases.len() + i, total);
        digests.push(product.run(ctx).await?);
    }
    for (i, both) in both.iter().enumerate() {
        progress(&both.name(), cases.len() + products.len() + i, total);
        digests.push(both.run(ctx).await?);
    }
    Ok(digests)
}

/// Both layouts at once, with a transform down the columns.
struct Both {
    rows: Side,
    columns: Side,
    dtype: DType,
}

fn both() -> Vec<Both> {
    let side = |spec, size, stream| Side {
        spec,
        scale_rule: Some(ScaleRule::Rceil),
        rounding: Rounding::Stochastic { seed: 0x5eed, stream },
        hadamard: (size > 0).then_some(Hadamard { size, signs: Signs::Random { seed: 0x5eed } }),
        three_quarters: false,
    };
    vec![
        Both { rows: side(MXFP4, 0, 5), columns: side(MXFP4, 32, 6), dtype: DType::F32 },
        Both { rows: side(NVFP4, 16, 5), columns: side(NVFP4, 16, 6), dtype: DType::BF16 },
        Both { rows: side(MXFP6_E2M3, 32, 5), columns: side(MXINT8, 16, 6), dtype: DType::F32 },
    ]
}

impl Both {
    fn name(&self) -> String {
        let side = |side: &Side| match side.hadamard {
            Some(Hadamard { size, .. }) => format!("{} h{size}", side.spec),
            None => side.spec.to_string(),
        };
        let [rows, cols] = SHAPE;
        let (a, b) = (side(&self.rows), side(&self.columns));
        format!("quantize-both {a} and {b} {} {rows}x{cols}", self.dtype)
    }

    async fn run(&self, ctx: &Context) -> Result<Digest> {
        let [rows, cols] = SHAPE;
        let x = ctx.upload(self.dtype, rows, cols, &input(self.dtype, rows, cols))?;
        let mut a = ctx.zeros_mx(self.rows.spec, Axis::One, rows, cols)?;
        let mut b = ctx.zeros_mx(self.columns.spec, Axis::Zero, rows, cols)?;
        let mut stream = ctx.stream();
        QuantizeBoth::new(ctx, Some(self.rows), Some(self.columns))?.record(
            &mut stream,
            &x,
            Some(&mut a),
            Some(&mut b),
            &Guards::default(),
            None,
        )?;
        ctx.submit(stream)?;
        let mut hash = Fnv::new();
        for packed in [a, b] {
            let host = ctx.read_mx(&packed).await?;
            hash.update(host.codes());
            hash.update(host.scales());
            hash.update(&host.tensor_scale().to_bits().to_le_bytes());
        }
        Ok(Digest { name: self.name(), digest: hash.0 })
    }
}

/// A product of the exact tier, its operands quantized on the device.
struct Product {
    a: MxSpec,
    b: MxSpec,
    out: Output,
    /// m, n, k.
    shape: [usize; 3],
}

fn products() -> Vec<Product> {
    let dense = Output::Dense(DType::F32);
    let mut products = Vec::new();
    let mut add = |a, b, out, shape| products.push(Product { a, b, out, shape });
    // Tiles, and a single row.
    for shape in [[70, 96, 203], [1, 96, 203]] {
        add(MXFP4, MXFP4, dense, shape);
        add(MXFP4, MXINT8, dense, shape);
        add(NVFP4, MXFP6_E2M3, dense, shape);
        add(
            MXFP6_E2M3.with_block(Block::Vector(128)),
            MXFP4.with_block(Block::Square(16)),
            dense,
            shape,
        );
    }
    // Lines of whole vectors of 128: what the fast loads take.
    add(MXFP4, MXFP4.with_block(Block::Square(32)), Output::Dense(DType::BF16), [2, 45, 384]);
    add(NVFP4, NVFP4, Output::Dense(DType::F16), [33, 45, 384]);
    let rounding = Rounding::Stochastic { seed: 0x5eed, stream: 4 };
    let packed =
        QuantizeDesc { rounding, scale_rule: Some(ScaleRule::Rceil), ..Default::default() };
    add(MXFP4, MXFP4, Output::Mx(packed), [70, 96, 203]);
    products
}

impl Product {
    fn name(&self) -> String {
        let [m, n, k] = self.shape;
        let out = match &self.out {
            Output::Dense(dtype) => dtype.to_string(),
            Output::Mx(out) => format!("{} stochastic", out.spec),
        };
        format!("matmul {} {} to {out} {m}x{n}x{k}", self.a, self.b)
    }

    async fn run(&self, ctx: &Context) -> Result<Digest> {
        let [m, n, k] = self.shape;
        let mut stream = ctx.stream();
        let mut operands = Vec::new();
        for (spec, rows) in [(self.a, m), (self.b, n)] {
            let x = ctx.upload(DType::F32, rows, k, &input(DType::F32, rows, k))?;
            let mut packed = ctx.zeros_mx(spec, Axis::One, rows, k)?;
            let desc = QuantizeDesc { spec, ..Default::default() };
            Quantize::new(ctx, &desc)?.record(&mut stream, &x, &mut packed)?;
            operands.push(packed);
        }
        let desc = MatmulDesc {
            m,
            n,
            k,
            a: self.a.into(),
            b: self.b.into(),
            out: self.out,
            tier: Tier::Exact,
            ..Default::default()
        };
        let matmul = Matmul::new(ctx, &desc)?;
        let mut hash = Fnv::new();
        match &self.out {
            Output::Dense(dtype) => {
                let mut y = ctx.zeros(*dtype, m, n)?;
                matmul.record(&mut stream, &operands[0], &operands[1], &mut y)?;
                ctx.submit(stream)?;
                hash.update(&ctx.read(&y).await?);
            }
            Output::Mx(out) => {
                let mut y = ctx.zeros_mx(out.spec, Axis::One, m, n)?;
                matmul.record(&mut stream, &operands[0], &operands[1], &mut y)?;
                ctx.submit(stream)?;
                let host = ctx.read_mx(&y).await?;
                hash.update(host.codes());
                hash.update(host.scales());
            }
        }
        Ok(Digest { name: self.name(), digest: hash.0 })
    }
}

struct Case {
    desc: QuantizeDesc,
    dtype: DType,
    shape: [usize; 2],
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut add = |spec: MxSpec, axis, rule, stochastic, dtype, shape| {
        let rounding = if stochastic {
            Rounding::Stochastic { seed: 0x5eed, stream: 3 }
        } else {
            Rounding::NearestEven
        };
        let rule = match (spec.scale, rule) {
            (ScaleFormat::E4M3, ScaleRule::Floor | ScaleRule::Ceil) => ScaleRule::Even,
            (_, rule) => rule,
        };
        cases.push(Case {
            desc: QuantizeDesc { spec, axis, scale_rule: Some(rule), rounding, tensor_scale: None },
            dtype,
            shape,
        });
    };
    for (_, spec) in NAMED {
        add(spec, Axis::One, ScaleRule::Floor, false, DType::F32, SHAPE);
        add(spec, Axis::Zero, ScaleRule::Even, false, DType::BF16, SHAPE);
        add(spec, Axis::One, ScaleRule::Rceil, true, DType::F32, SHAPE);
        add(spec, Axis::Zero, ScaleRule::Rceil, true, DType::F32, SHAPE);
        let square = spec.with_block(Block::Square(32));
        add(square, Axis::One, ScaleRule::Ceil, false, DType::F16, SHAPE);
        add(square, Axis::Zero, ScaleRule::Rceil, true, DType::F32, SHAPE);
        add(
            spec.with_block(Block::Vector(128)),
            Axis::One,
            ScaleRule::Even,
            true,
            DType::BF16,
            [37, 203],
        );
        add(
            spec.with_block(Block::Square(16)),
            Axis::Zero,
            ScaleRule::Floor,
            false,
            DType::F16,
            [37, 203],
        );
    }
    cases
}

impl Case {
    fn name(&self) -> String {
        let QuantizeDesc { spec, axis, scale_rule, rounding, .. } = self.desc;
        let rounding = if rounding == Rounding::NearestEven { "nearest" } else { "stochastic" };
        let rule = format!("{:?}", scale_rule.unwrap_or(ScaleRule::Floor)).to_lowercase();
        let [rows, cols] = self.shape;
        format!("{spec} axis {axis} {rule} {rounding} {} {rows}x{cols}", self.dtype)
    }

    async fn run(&self, ctx: &Context) -> Result<[Digest; 2]> {
        let [rows, cols] = self.shape;
        let QuantizeDesc { spec, axis, .. } = self.desc;
        let x = ctx.upload(self.dtype, rows, cols, &input(self.dtype, rows, cols))?;
        let mut packed = ctx.zeros_mx(spec, axis, rows, cols)?;
        let mut y = ctx.zeros(self.dtype, rows, cols)?;
        let mut stream = ctx.stream();
        Quantize::new(ctx, &self.desc)?.record(&mut stream, &x, &mut packed)?;
        Dequantize::new(ctx, &DequantizeDesc { spec, axis })?.record(
            &mut stream,
            &packed,
            &mut y,
        )?;
        ctx.submit(stream)?;
        let host = ctx.read_mx(&packed).await?;
        let mut hash = Fnv::new();
        hash.update(host.codes());
        hash.update(host.scales());
        hash.update(&host.tensor_scale().to_bits().to_le_bytes());
        hash.update(&ctx.nonfinite_blocks(&packed).await?.to_le_bytes());
        let mut back = Fnv::new();
        back.update(&ctx.read(&y).await?);
        let name = self.name();
        Ok([
            Digest { name: format!("quantize {name}"), digest: hash.0 },
            Digest { name: format!("dequantize {name}"), digest: back.0 },
        ])
    }
}

/// Fixed inputs: random signs and mantissas, exponents that spread slowly over the whole range so that blocks hold
/// comparable values, and every corner sprinkled in: zeros of both signs, subnormals, the largest finite value, NaN,
/// infinity, and blocks of zeros.
pub fn input(dtype: DType, rows: usize, cols: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(rows * cols * dtype.size());
    // Exponent bits, mantissa bits.
    let (exponent_bits, mantissa_bits) = match dtype {
        DType::F32 => (8, 23),
        DType::F16 => (5, 10),
        DType::BF16 => (8, 7),
    };
    let exponents = 1u32 << exponent_bits;
    for row in 0..rows {
        for col in 0..cols {
            let [a, b, ..] = threefry4x32::<ROUNDS>([row as u32, col as u32, 0, 0], [1, 2, 3, 4]);
            let patch = (row / 16 * 7 + col / 16 * 5) as u32;
            let exponent = (patch * 11 + a % 6) % (exponents - 1);
            let mut bits =
                ((b >> 31) << (exponent_bits + mantissa_bits)) | (exponent << mantissa_bits);
            bits |= b & ((1 << mantissa_bits) - 1);
            let sign = bits & (1 << (exponent_bits + mantissa_bits));
            match a >> 22 {
                0..40 => bits = sign,
                40..60 => bits = sign | (b & ((1 << mantissa_bits) - 1)),
                60..62 => bits = sign | (((exponents - 1) << mantissa_bits) - 1),
                62 => bits = sign | ((exponents - 1) << mantissa_bits),
                63 => bits = sign | ((exponents - 1) << mantissa_bits) | 1,
                _ => {}
            }
            if patch.is_multiple_of(13) {
                bits = sign;
            }
            bytes.extend_from_slice(&bits.to_le_bytes()[..dtype.size()]);
        }
    }
    bytes
}

/// FNV-1a, 64 bits (Fowler, Noll, Vo; RFC 9923).
struct Fnv(u64);

impl Fnv {
    fn new() -> Fnv {
        Fnv(0xcbf2_9ce4_8422_2325)
    }

    fn update(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fnv_known_answers() {
        let digest = |text: &str| {
            let mut hash = Fnv::new();
            hash.update(text.as_bytes());
            hash.0
        };
        assert_eq!(digest(""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(digest("a"), 0xaf63_dc4c_8601_ec8c);
        assert_eq!(digest("foobar"), 0x8594_4171_f739_67e8);
    }
}
