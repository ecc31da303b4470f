//! Sums and conversions of activations: y += x, and f32 to bf16 and back.
//!
//! `x`, `y` `[T, C]` of f32 or bf16 each. **Exact** but for subnormals, which a GPU may flush: one f32 addition, then rounding
//! to nearest even. Shader: `shaders/add.wgsl`.

use crate::Result;
use crate::engine::Stream;
use crate::engine::buffer::{DType, Tensor};
use crate::engine::shader::{Binding, Kernel, Source, shader};

use super::WORKGROUP;
use super::act::{self, ACT, STEPS};

/// Records `y += x`.
pub fn add(stream: &mut Stream<'_>, x: &Tensor, y: &mut Tensor) -> Result<()> {
    record("add", true, stream, x, y)
}

/// Records `y = x` in `y`'s type.
pub fn cast(stream: &mut Stream<'_>, x: &Tensor, y: &mut Tensor) -> Result<()> {
    record("cast", false, stream, x, y)
}

fn record(
    operation: &'static str,
    add: bool,
    stream: &mut Stream<'_>,
    x: &Tensor,
    y: &mut Tensor,
) -> Result<()> {
    let [rows, cols] = act::shape(operation, "x", x)?;
    y.expect(operation, "y", [rows, cols], ACT)?;
    act::check_same(stream, &[&x.data, &y.data])?;
    if stream.gpu().is_none() {
        let x = x.widened();
        y.fill_rows(|t, y| {
            for (y, x) in y.iter_mut().zip(&x[t * cols..]) {
                *y = if add { *y + x } else { *x };
            }
        });
        return Ok(());
    }
    let variant = Variant { add, x: x.dtype, y: y.dtype };
    let vectors = rows * cols / 4;
    stream.dispatch(
        &variant.name(),
        || variant.kernel(),
        &[vectors as u32],
        &[x.binding()?, y.binding()?],
        act::step_groups(vectors),
    )
}

#[derive(Clone, Copy)]
struct Variant {
    add: bool,
    x: DType,
    y: DType,
}

impl Variant {
    fn name(&self) -> String {
        format!("{}.{}.{}", if self.add { "add" } else { "cast" }, self.x, self.y)
    }

    fn kernel(&self) -> Kernel {
        let source = Source::new()
            .constant("WG", WORKGROUP)
            .constant("STEPS", STEPS)
            .flag("ADD", self.add)
            .quads("x", self.x)
            .quads("y", self.y)
            .fragment(shader!("add.wgsl"));
        Kernel::portable(self.name(), source, &[Binding::Read, Binding::Write])
    }
}

/// Every variant of this file's kernels.
pub fn kernels() -> Vec<Kernel> {
    let mut kernels = Vec::new();
    for add in [true, false] {
        for x in ACT {
            kernels.extend(ACT.iter().map(|y| Variant { add, x: *x, y: *y }.kernel()));
        }
    }
    kernels
}
