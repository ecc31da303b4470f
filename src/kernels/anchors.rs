//! The anchors of an MX tensor: the largest scale of every line, which products decode relative to. Kept with the tensor,
//! made when it is quantized or uploaded.
//!
//! **Exact**. Shader: `shaders/anchors.wgsl`.

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

/// Records the making of `x`'s anchors from its scales, on a GPU.
pub(crate) fn record(stream: &mut Stream<'_>, x: &DeviceMxTensor) -> Result<()> {
    let layout = x.layout;
    let Some(state) = x.state.chunks().next() else { return Ok(()) };
    for columns in [false, true] {
        if columns && layout.spec.block.lines() == 1 {
            continue;
        }
        for scales in x.scales.chunks() {
            let first = STATE_WORDS + if columns { layout.scale_rows() } else { scales.first };
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
        .flag("SCALE_E4M3", scale == ScaleFormat::E4M3)
        .flag("COLUMNS", columns)
        .fragment(shader!("anchors.wgsl"));
    Kernel::portable(name(scale, columns), source, &[Binding::Read, Binding::Write])
}

/// Every variant of this file's kernels.
pub fn kernels() -> Vec<Kernel> {
    [ScaleFormat::E8M0, ScaleFormat::E4M3]
        .into_iter()
        .flat_map(|scale| [false, true].map(|columns| kernel(scale, columns)))
        .collect()
}
