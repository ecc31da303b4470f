//! MX to dense tensors.
//!
//! **Exact**: the same bytes on every engine. f32 values are exact (NVFP4: the product of three factors, rounded once),
//! infinite where E5M2 or NVFP4 exceed f32's range; f16 and bf16 are those rounded to nearest even. A NaN scale or code
//! gives the canonical quiet NaN.
//!
//! Shaders: `shaders/dequantize.wgsl` (whole vector blocks along rows), `shaders/dequantize_any.wgsl` (all others).

use crate::engine::buffer::{DType, DeviceMxTensor, Tensor};
use crate::engine::shader::{Binding, Kernel, shader};
use crate::engine::{Context, Stream};
use crate::formats::{Axis, Layout, MxSpec, MxTensor, block};
use crate::{Error, Result};

use super::{WORKGROUP, all_specs, codec, format_constants, format_name, type_constants};

/// What [`Dequantize`] does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DequantizeDesc {
    /// The format of the input. Default MXFP4.
    pub spec: MxSpec,
    /// Its blocked axis. Default one.
    pub axis: Axis,
}

impl Default for DequantizeDesc {
    fn default() -> Self {
        DequantizeDesc { spec: crate::MXFP4, axis: Axis::One }
    }
}

/// The kernel that unpacks an MX tensor.
#[derive(Clone, Debug)]
pub struct Dequantize {
    desc: DequantizeDesc,
}

impl Dequantize {
    /// Checks the descriptor. Pipelines are made when first recorded.
    pub fn new(_ctx: &Context, desc: &DequantizeDesc) -> Result<Dequantize> {
        desc.spec.validate()?;
        Ok(Dequantize { desc: *desc })
    }

    /// Records the dequantization of `x` into `out`, of the same logical shape and any element type.
    pub fn record(
        &self,
        stream: &mut Stream<'_>,
        x: &DeviceMxTensor,
        out: &mut Tensor,
    ) -> Result<()> {
        let layout = x.layout;
        if (layout.spec, layout.axis) != (self.desc.spec, self.desc.axis) {
            return Err(Error::Mismatch {
                operation: "Dequantize::record",
                problem: format!(
                    "the kernel reads {} along axis {}, the input is {} along axis {}",
                    self.desc.spec, self.desc.axis, layout.spec, layout.axis
                ),
            });
        }
        if out.shape() != [layout.rows, layout.cols] {
            return Err(Error::Mismatch {
                operation: "Dequantize::record",
                problem: format!(
                    "x is [{}, {}], the output {:?}",
                    layout.rows,
                    layout.cols,
                    out.shape()
                ),
            });
        }
        stream.context().check_same(&x.codes, &out.data)?;
        if stream.gpu().is_some() { record_gpu(stream, x, out) } else { run_cpu(x, out) }
    }
}

fn record_gpu(stream: &mut Stream<'_>, x: &DeviceMxTensor, out: &Tensor) -> Result<()> {
    let layout = x.layout;
    let Some(state) = x.state.chunks().next() else { return Ok(()) };
    let contiguous = layout.axis == Axis::One
        && layout.spec.block.lines() == 1
        && layout.cols.is_multiple_of(layout.spec.block.len());
    let variant = Variant {
        spec: layout.spec,
        dtype: out.dtype,
        form: if contiguous { Form::Rows } else { Form::Any(layout.axis) },
    };
    for ys in out.data.chunks() {
        for (codes, scales) in x.codes.chunks().zip(x.scales.chunks()) {
            let buffers = [codes.buffer, scales.buffer, state.buffer, ys.buffer];
            let rows = ys.overlap(&codes);
            if layout.axis == Axis::One && rows.is_empty() {
                continue;
            }
            let (params, invocations) = if contiguous {
                let vectors = rows.len() as u64 * (out.data.row_bytes as u64 / 16);
                let params = vec![
                    vectors as u32,
                    ((rows.start - codes.first) * layout.line_bytes() / 4) as u32,
                    ((rows.start - codes.first) * layout.blocks()) as u32,
                    ((rows.start - ys.first) * out.data.row_bytes / 16) as u32,
                ];
                (params, vectors.div_ceil(u64::from(steps(out.dtype))))
            } else {
                let params = vec![
                    ys.rows as u32,
                    out.cols as u32,
                    codes.first as u32,
                    codes.rows as u32,
                    ys.first as u32,
                    (layout.line_bytes() / 4) as u32,
                    layout.blocks() as u32,
                    ys.first as u32,
                ];
                (params, (ys.rows as u64 * out.data.row_bytes as u64).div_ceil(4))
            };
            stream.dispatch(
                &variant.name(),
                || variant.kernel(),
                &params,
                &buffers,
                invocations.div_ceil(u64::from(WORKGROUP)),
            )?;
        }
    }
    Ok(())
}

fn run_cpu(x: &DeviceMxTensor, out: &mut Tensor) -> Result<()> {
    let codes = &bytemuck::cast_slice(x.codes.cpu())[..x.codes.bytes()];
    let scales = &bytemuck::cast_slice(x.scales.cpu())[..x.scales.bytes()];
    let tensor_scale = x.state.cpu()[2];
    let elements = out.rows * out.cols;
    twin(&x.layout, codes, scales, tensor_scale, out.dtype, elements, out.data.cpu_mut());
    Ok(())
}

impl MxTensor {
    /// The values, row-major; the same as [`Dequantize`] to f32 on any engine.
    pub fn dequantize(&self) -> Vec<f32> {
        let layout = self.layout();
        let elements = layout.rows * layout.cols;
        let mut out = vec![0f32; elements];
        let tensor_scale = self.tensor_scale().to_bits();
        let words = bytemuck::cast_slice_mut(&mut out);
        twin(layout, self.codes(), self.scales(), tensor_scale, DType::F32, elements, words);
        out
    }
}

// ---- The twin ------------------------------------------------------------------------------------------------------

/// Dequantizes on the CPU, on all cores, into elements of `dtype` packed in words.
fn twin(
    layout: &Layout,
    codes: &[u8],
    scales: &[u8],
    tensor_scale: u32,
    dtype: DType,
    elements: usize,
    out: &mut [u32],
) {
    let line_bytes = layout.line_bytes();
    let value = |index: usize| {
        let (line, at) = layout.position(index / layout.cols, index % layout.cols);
        let line_codes = &codes[line * line_bytes..(line + 1) * line_bytes];
        let code = block::unpack(layout.spec.element.bits(), line_codes, at);
        let scale = scales[layout.scale_index(line, at)];
        dtype.narrow(block::decode(layout.spec, code, scale, tensor_scale))
    };
    let piece = 1 << 14;
    let fill = |(i, words): (usize, &mut [u32])| {
        for (j, word) in words.iter_mut().enumerate() {
            let w = i * piece + j;
            *word = match dtype.size() {
                4 if w < elements => value(w),
                2 if 2 * w + 1 < elements => value(2 * w) | (value(2 * w + 1) << 16),
                2 if 2 * w < elements => value(2 * w),
                _ => 0,
            };
        }
    };
    #[cfg(not(target_arch = "wasm32"))]
    {
        use rayon::prelude::*;
        out.par_chunks_mut(piece).enumerate().for_each(fill);
    }
    #[cfg(target_arch = "wasm32")]
    out.chunks_mut(piece).enumerate().for_each(fill);
}

// ---- The shaders ---------------------------------------------------------------------------------------------------

/// Vectors of 16 bytes that an invocation of `dequantize.wgsl` writes, at most 4; measured on an H100.
const fn steps(dtype: DType) -> u32 {
    match dtype {
        DType::F32 => 4,
        DType::F16 | DType::BF16 => 2,
    }
}

#[derive(Clone, Copy, Debug)]
struct Variant {
    spec: MxSpec,
    dtype: DType,
    form: Form,
}

#[derive(Clone, Copy, Debug)]
enum Form {
    Rows,
    Any(Axis),
}

impl Variant {
    fn name(&self) -> String {
        let form = match self.form {
            Form::Rows => "rows".to_string(),
            Form::Any(axis) => format!("any.axis{axis}"),
        };
        format!("dequantize.{}.{}.{form}", format_name(self.spec), self.dtype)
    }

    fn kernel(&self) -> Kernel {
        let source = type_constants(format_constants(self.spec), "Y_TYPE", self.dtype);
        let source = codec(source.constant("WG", WORKGROUP), self.spec)
            .fragment(shader!("lib/round_nearest.wgsl"))
            .fragment(shader!("lib/narrow.wgsl"));
        let source = match self.form {
            Form::Rows => {
                source.constant("STEPS", steps(self.dtype)).fragment(shader!("dequantize.wgsl"))
            }
            Form::Any(axis) => source
                .flag("TRANSPOSED", axis == Axis::Zero)
                .fragment(shader!("dequantize_any.wgsl")),
        };
        let bindings = [Binding::Read, Binding::Read, Binding::Read, Binding::Write];
        Kernel::portable(self.name(), source, &bindings)
    }
}

/// Every variant of this file's kernels.
pub fn kernels() -> Vec<Kernel> {
    let mut kernels = Vec::new();
    for spec in all_specs() {
        for dtype in DType::ALL {
            let mut forms = vec![Form::Any(Axis::Zero), Form::Any(Axis::One)];
            if spec.block.lines() == 1 {
                forms.push(Form::Rows);
            }
            kernels.extend(forms.into_iter().map(|form| Variant { spec, dtype, form }.kernel()));
        }
    }
    kernels
}
