//! The anchors of an MX tensor: the largest scale of every line, which products decode relative to. Kept with the tensor,
//! made by what writes the scales: on the host and on the CPU engine `anchors`; on a GPU every quantizing kernel, AdamW's
//! too, as it writes a block's scale (`shaders/lib/anchors.wgsl`, by `fragment`); and behind a product with a packed
//! output `record`, whose kernel reads the scales again.
//!
//! **Exact**. Shaders: `shaders/lib/anchors.wgsl`, `shaders/anchors.wgsl`.

use crate::Result;
use crate::engine::Stream;
use crate::engine::buffer::{DeviceMxTensor, STATE_WORDS};
use crate::engine::shader::{Binding, Kernel, Source, shader};
use crate::formats::{Layout, ScaleFormat};

use super::WORKGROUP;

/// The largest scale byte of every row of scales, then for square blocks of every column; 255 where one is NaN, and 127 for
/// other E4M3 scales.
pub(crate) fn anchors(layout: &Layout, scales: &[u8]) -> Vec<u32> {
    let blocks = layout.blocks();
    let anchor = |scale: u8| match layout.spec.scale {
        ScaleFormat::E8M0 => u32::from(scale),
        ScaleFormat::E4M3 if scale & 0x7f == 0x7f => 255,
        ScaleFormat::E4M3 => 127,
    };
    let rows = layout.scale_rows();
    let mut anchors: Vec<u32> = (0..rows)
        .map(|r| scales[r * blocks..(r + 1) * blocks].iter().map(|s| anchor(*s)).max().unwrap_or(0))
        .collect();
    if layout.spec.block.lines() > 1 {
        anchors.extend(
            (0..blocks)
                .map(|c| (0..rows).map(|r| anchor(scales[r * blocks + c])).max().unwrap_or(0)),
        );
    }
    anchors
}

/// What a kernel makes anchors with, beside the constants of a format: the tensor's `state` is zeroed before its first dispatch.
pub(super) fn fragment(source: Source) -> Source {
    source.constant("STATE_WORDS", STATE_WORDS as u32).fragment(shader!("lib/anchors.wgsl"))
}

/// Records the making of `x`'s anchors from its scales, on a GPU. They are zero before, as the rest of `x`'s state.
pub(crate) fn record(stream: &mut Stream<'_>, x: &DeviceMxTensor) -> Result<()> {
    let layout = x.layout;
    let Some(state) = x.state.chunks().next() else { return Ok(()) };
    for columns in [false, true] {
        if columns && layout.spec.block.lines() == 1 {
            continue;
        }
        for scales in x.scales.chunks() {
            let first = if columns { layout.scale_rows() } else { scales.first };
            let (items, each) = match columns {
                true => (layout.blocks(), WORKGROUP as usize),
                false => (scales.rows, (WORKGROUP / LANES) as usize),
            };
            stream.dispatch(
                &name(layout.spec.scale, columns),
                || kernel(layout.spec.scale, columns),
                &[scales.rows as u32, layout.blocks() as u32, first as u32],
                &[scales.buffer, state.buffer],
                items.div_ceil(each) as u64,
            )?;
        }
    }
    Ok(())
}

/// Invocations of a row; the shader's constant.
const LANES: u32 = 32;

fn name(scale: ScaleFormat, columns: bool) -> String {
    let scale = if scale == ScaleFormat::E4M3 { "e4m3" } else { "e8m0" };
    format!("anchors.{scale}.{}", if columns { "columns" } else { "rows" })
}

fn kernel(scale: ScaleFormat, columns: bool) -> Kernel {
    let source = Source::new()
        .constant("WG", WORKGROUP)
        .constant("BLOCK_LINES", 1)
        .flag("TENSOR_SCALED", scale == ScaleFormat::E4M3)
        .flag("COLUMNS", columns);
    let source = fragment(source).fragment(shader!("anchors.wgsl"));
    Kernel::portable(name(scale, columns), source, &[Binding::Read, Binding::Write])
}

/// Every variant of this file's kernels.
pub fn kernels() -> Vec<Kernel> {
    [ScaleFormat::E8M0, ScaleFormat::E4M3]
        .into_iter()
        .flat_map(|scale| [false, true].map(|columns| kernel(scale, columns)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::buffer::DType;
    use crate::formats::{Axis, Block, MxSpec, MxTensor};
    use crate::kernels::{
        AdamW, AdamWDesc, AdamWState, Guards, Matmul, MatmulDesc, Output, Quantize, QuantizeBoth,
        QuantizeDesc, Side, StepScalars,
    };
    use crate::{Context, Options};

    /// Magnitudes over many powers of two, and a few values that are not finite.
    fn values(n: usize) -> Vec<u16> {
        let value = |i: usize| {
            let h = (i as u32).wrapping_mul(0x9e37_79b9) >> 7;
            if h.is_multiple_of(601) { 0x7f80 } else { (h & 0x80ff) as u16 | 0x3a00 }
        };
        (0..n).map(value).collect()
    }

    fn x(ctx: &Context, rows: usize, cols: usize) -> crate::Tensor {
        let values = values(rows * cols);
        ctx.upload(DType::BF16, rows, cols, bytemuck::cast_slice(&values)).unwrap()
    }

    /// A tensor whose state is garbage.
    fn out(ctx: &Context, spec: MxSpec, axis: Axis, rows: usize, cols: usize) -> DeviceMxTensor {
        let layout = Layout::new(spec, axis, rows, cols).unwrap();
        let largest = if spec.scale == ScaleFormat::E4M3 { 0x7f } else { 0xff };
        let (codes, scales) = (vec![0; layout.codes_len()], vec![largest; layout.scales_len()]);
        ctx.upload_mx(&MxTensor::from_parts(layout, codes, scales, 1.0).unwrap()).unwrap()
    }

    fn check(ctx: &Context, x: &DeviceMxTensor, what: &str) {
        let scales = pollster::block_on(x.scales.read(ctx)).unwrap();
        let state = pollster::block_on(x.state.read(ctx)).unwrap();
        let got: Vec<u32> = bytemuck::pod_collect_to_vec(&state[4 * STATE_WORDS..]);
        assert!(!got.is_empty());
        assert_eq!(got, anchors(&x.layout, &scales), "{what}: {:?}", x.layout);
    }

    /// Whatever writes scales makes the anchors that the host finds in them, on every adapter, in one binding and in several.
    #[test]
    fn are_made_with_the_scales() {
        let mode = std::env::var("MX_TEST_GPU").unwrap_or_default();
        let adapters = match &*mode {
            "off" => Vec::new(),
            _ => pollster::block_on(crate::engine::adapters(false)),
        };
        assert!(mode != "require" || !adapters.is_empty(), "MX_TEST_GPU=require, but no adapter");
        let gpu = |adapter, max_binding| {
            let options = Options { max_binding, ..Options::default() };
            pollster::block_on(Context::on_adapter(adapter, &options)).unwrap()
        };
        for ctx in adapters.iter().map(|adapter| gpu(adapter, None)).chain([Context::cpu()]) {
            quantized(&ctx, 37, 45);
            quantized_both(&ctx);
            updated(&ctx);
            multiplied(&ctx);
        }
        for ctx in adapters.iter().map(|adapter| gpu(adapter, Some(56 << 10))) {
            quantized(&ctx, 400, 160);
        }
    }

    fn quantized(ctx: &Context, rows: usize, cols: usize) {
        let square = |spec: MxSpec, n| spec.with_block(Block::Square(n));
        let specs =
            [crate::MXFP4, crate::NVFP4, square(crate::MXFP4, 32), square(crate::MXINT8, 16)];
        for spec in specs {
            for axis in [Axis::One, Axis::Zero] {
                let desc = QuantizeDesc { spec, axis, ..Default::default() };
                let x = x(ctx, rows, cols);
                let mut packed = out(ctx, spec, axis, rows, cols);
                let mut stream = ctx.stream();
                Quantize::new(ctx, &desc).unwrap().record(&mut stream, &x, &mut packed).unwrap();
                ctx.submit(stream).unwrap();
                check(ctx, &packed, "Quantize");
            }
        }
    }

    fn quantized_both(ctx: &Context) {
        let (a, b) = (crate::MXFP4, crate::NVFP4);
        for (rows, cols, matrices) in [(128, 96, 1), (74, 36, 1), (192, 40, 4)] {
            for (a, b) in [(a, b), (b, a)] {
                let x = x(ctx, rows, cols);
                let mut rows_out = out(ctx, a, Axis::One, rows, cols);
                let mut columns_out = match matrices {
                    1 => out(ctx, b, Axis::Zero, rows, cols),
                    _ => out(ctx, b, Axis::One, matrices * cols, rows / matrices),
                };
                let [a, b] = [a, b].map(|spec| Some(Side { spec, ..Default::default() }));
                let mut both = QuantizeBoth::new(ctx, a, b).unwrap();
                if matrices > 1 {
                    both = both.stacked(matrices);
                }
                let mut stream = ctx.stream();
                let (r, c) = (Some(&mut rows_out), Some(&mut columns_out));
                both.record(&mut stream, &x, r, c, &Guards::default(), None).unwrap();
                ctx.submit(stream).unwrap();
                check(ctx, &rows_out, "QuantizeBoth");
                check(ctx, &columns_out, "QuantizeBoth");
            }
        }
    }

    /// The second step is skipped: scales stay, and so do anchors.
    fn updated(ctx: &Context) {
        let (rows, cols) = (70, 128);
        for block in [16, 32] {
            let spec = crate::MXFP4.with_block(Block::Square(block));
            let desc = AdamWDesc { master: DType::BF16, ..AdamWDesc::new(rows, cols) };
            let mut w = x(ctx, rows, cols);
            let grad = ctx.zeros(DType::F32, rows, cols).unwrap();
            let mut state = AdamWState::new(ctx, &desc).unwrap();
            let mut packed = out(ctx, spec, Axis::One, rows, cols);
            for (step, finite) in [(1, 1f32), (2, 0.0)] {
                let norm = [1.0, 1.0, finite, 0.0];
                let norm = ctx.upload(DType::F32, 1, 4, bytemuck::cast_slice(&norm)).unwrap();
                let scalars = StepScalars { step, lr: 1e-3, weight_decay: 0.0, seed: 1 };
                let quantize = QuantizeDesc { spec, ..Default::default() };
                let mut stream = ctx.stream();
                let kernel = AdamW::new(ctx, &desc).unwrap();
                let (w, state, packed) = (&mut w, &mut state, &mut packed);
                kernel
                    .record_quantized(
                        &mut stream,
                        &scalars,
                        &grad,
                        &norm,
                        w,
                        state,
                        &quantize,
                        packed,
                    )
                    .unwrap();
                ctx.submit(stream).unwrap();
                check(ctx, packed, "AdamW");
            }
        }
    }

    fn multiplied(ctx: &Context) {
        let (m, n, k) = (40, 96, 64);
        for spec in [crate::MXFP4, crate::MXFP4.with_block(Block::Square(32))] {
            let desc = MatmulDesc {
                m,
                n,
                k,
                a: DType::BF16.into(),
                b: DType::BF16.into(),
                out: Output::Mx(QuantizeDesc { spec, ..Default::default() }),
                ..Default::default()
            };
            let (a, b) = (x(ctx, m, k), x(ctx, n, k));
            let mut y = out(ctx, spec, Axis::One, m, n);
            let mut stream = ctx.stream();
            Matmul::new(ctx, &desc).unwrap().record(&mut stream, &a, &b, &mut y).unwrap();
            ctx.submit(stream).unwrap();
            check(ctx, &y, "Matmul");
        }
    }
}
