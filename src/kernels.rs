//! The catalogue: one file a kernel, with its descriptor, its recording and its twin on the CPU; the shaders are
//! their namesakes under `shaders/`.
//!
//! A host with its own scheduler takes a [`Kernel`] from [`quantize::kernels`] or [`dequantize::kernels`] and runs it
//! itself; [`Quantize::record`] and [`Dequantize::record`] are the other way in.

pub(crate) mod act;
pub mod adamw;
pub mod add;
pub mod anchors;
pub mod attention;
pub mod copy;
pub mod cross_entropy;
pub mod dequantize;
pub mod embedding;
pub mod gradient_norm;
pub mod matmul;
pub mod native_pack;
pub mod oscillation;
pub mod outliers;
pub mod peak;
pub mod permute;
pub mod quantize;
pub mod quantize_both;
pub mod reduce;
pub mod rmsnorm;
pub mod rope;
pub mod router;
pub mod sort;
pub mod swiglu;

pub use adamw::{AdamW, AdamWDesc, AdamWState, Moments, StepScalars};
pub use attention::{Attention, AttentionDesc};
pub use copy::Copy;
pub use dequantize::{Dequantize, DequantizeDesc};
pub use gradient_norm::GradientNorm;
pub use matmul::{Extras, Groups, Matmul, MatmulDesc, Operand, Output, Tier, Tuning, Values};
pub use oscillation::Oscillation;
pub use outliers::{Quantile, Split};
pub use peak::Peak;
pub use quantize::{Quantize, QuantizeDesc};
pub use quantize_both::{Guards, Hadamard, QuantizeBoth, Side, Signs};
pub use rope::{Direction, Rope};
pub use router::{Router, RouterDesc, Routes};

use crate::engine::buffer::DType;
use crate::engine::shader::{Kernel, Source, shader};
use crate::formats::{Block, Element, MxSpec, ScaleFormat};

/// Every kernel in every variant (of [`QuantizeBoth`]'s a selection, see [`quantize_both::kernels`]). Thousands: to be
/// validated, or shipped as data.
pub fn all() -> Vec<Kernel> {
    let mut kernels = quantize::kernels();
    kernels.extend(quantize_both::kernels());
    kernels.extend(outliers::kernels());
    kernels.extend(dequantize::kernels());
    kernels.extend(anchors::kernels());
    kernels.extend(copy::kernels());
    kernels.extend(peak::kernels());
    kernels.extend(matmul::kernels());
    kernels.extend(native_pack::kernels());
    kernels.extend(permute::kernels());
    kernels.extend(router::kernels());
    kernels.extend(adamw::kernels());
    kernels.extend(gradient_norm::kernels());
    kernels.extend(oscillation::kernels());
    kernels.extend(add::kernels());
    kernels.extend(cross_entropy::kernels());
    kernels.extend(embedding::kernels());
    kernels.extend(reduce::kernels());
    kernels.extend(rmsnorm::kernels());
    kernels.extend(sort::kernels());
    kernels.extend(swiglu::kernels());
    kernels.extend(rope::kernels());
    kernels.extend(attention::kernels());
    kernels
}

/// NVIDIA's PCI vendor id.
pub(crate) const NVIDIA: u32 = 0x10de;

/// Invocations of a workgroup. 256 is what every WebGPU device offers.
pub(crate) const WORKGROUP: u32 = 256;

/// Elements of a line that one invocation encodes: they fill whole words in every format.
pub(crate) const UNIT: u32 = 16;

/// The constants that the fragments of `shaders/lib` share.
pub(crate) fn format_constants(spec: MxSpec) -> Source {
    let element = spec.element;
    let (block, lines) = (spec.block.len() as u32, spec.block.lines() as u32);
    Source::new()
        .constant("BITS", element.bits())
        .constant("MANTISSA_BITS", element.mantissa_bits())
        .signed("EMIN", element.emin())
        .signed("EMAX", element.emax())
        .constant("MAX_CODE", element.max_code())
        .flag("IS_INT8", element == Element::Int8)
        .flag("IS_E5M2", element == Element::E5M2)
        .flag("TENSOR_SCALED", spec.scale == ScaleFormat::E4M3)
        .constant("UNIT", UNIT)
        .constant("BLOCK", block)
        .constant("BLOCK_LINES", lines)
}

pub(crate) fn type_constants(source: Source, name: &str, dtype: DType) -> Source {
    source
        .constant("X_F32", 0)
        .constant("X_F16", 1)
        .constant("X_BF16", 2)
        .constant(name, type_number(dtype))
}

/// A type as the shaders number it.
pub(crate) fn type_number(dtype: DType) -> u32 {
    match dtype {
        DType::F32 => 0,
        DType::F16 => 1,
        DType::BF16 => 2,
    }
}

/// The fragments of a codec, but for the rounding.
pub(crate) fn codec(source: Source, spec: MxSpec) -> Source {
    source.fragment(shader!("lib/float.wgsl")).fragment(shader!("lib/element.wgsl")).fragment(
        match spec.scale {
            ScaleFormat::E8M0 => shader!("lib/scale_e8m0.wgsl"),
            ScaleFormat::E4M3 => shader!("lib/scale_e4m3.wgsl"),
        },
    )
}

/// `e2m1-e8m0.1x32`: the part of a kernel's name that says the format.
pub(crate) fn format_name(spec: MxSpec) -> String {
    let scale = match spec.scale {
        ScaleFormat::E8M0 => "e8m0",
        ScaleFormat::E4M3 => "e4m3",
    };
    format!("{}-{scale}.{}", spec.element.name(), spec.block)
}

/// All formats: every element under E8M0, and NVFP4's, in every block.
pub fn all_specs() -> Vec<MxSpec> {
    let mut formats: Vec<_> = Element::ALL.map(|element| (element, ScaleFormat::E8M0)).into();
    formats.push((Element::E2M1, ScaleFormat::E4M3));
    formats
        .into_iter()
        .flat_map(|(element, scale)| Block::ALL.map(|block| MxSpec { element, scale, block }))
        .collect()
}
