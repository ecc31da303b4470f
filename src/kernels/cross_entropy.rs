//! Cross entropy of logits with targets, and its gradient in the same pass.
//!
//! `logits`, `dlogits` `[T, V]` of f32 or bf16 each, V a multiple of four; `targets` T ids; `loss` `[T, 1]` f32, in nats.
//! **Bounded**: f32, relative to each row's largest logit, with what WGSL allows exp, log and division. A row whose target is
//! [`IGNORED`] has loss and gradient zero, exactly; one whose target is no column has NaN, so that it is seen.
//!
//! Shader: `shaders/cross_entropy.wgsl`.

use crate::Result;
use crate::engine::Stream;
use crate::engine::buffer::{DType, Ids, Tensor};
use crate::engine::shader::{Binding, Kernel, Source, shader};
use crate::formats::element::NAN;

use super::WORKGROUP;
use super::act::{self, ACT, F32};

/// The target of a row that does not count.
pub const IGNORED: u32 = u32::MAX;

/// Records each row's loss, and with `gradient` = (dlogits, scale) `dlogits = (softmax − onehot) · scale`.
pub fn cross_entropy(
    stream: &mut Stream<'_>,
    logits: &Tensor,
    targets: &Ids,
    loss: &mut Tensor,
    gradient: Option<(&mut Tensor, f32)>,
) -> Result<()> {
    let operation = "cross_entropy";
    let [rows, cols] = act::shape(operation, "logits", logits)?;
    act::expect_len(operation, "targets", targets.len(), rows)?;
    loss.expect(operation, "loss", [rows, 1], F32)?;
    act::check_same(stream, &[&logits.data, &targets.data, &loss.data])?;
    if let Some((dlogits, _)) = &gradient {
        dlogits.expect(operation, "dlogits", [rows, cols], ACT)?;
        act::check_same(stream, &[&dlogits.data])?;
    }
    if stream.gpu().is_none() {
        twin(logits, targets, loss, gradient);
        return Ok(());
    }
    let variant = Variant {
        lanes: if cols <= NARROW { LANES[0] } else { LANES[1] },
        logits: logits.dtype,
        dlogits: gradient.as_ref().map(|(dlogits, _)| dlogits.dtype),
    };
    let mut buffers = vec![logits.binding()?, targets.binding()?, loss.binding()?];
    let mut scale = 0.0;
    if let Some((dlogits, by)) = &gradient {
        buffers.push(dlogits.binding()?);
        scale = *by;
    }
    stream.dispatch(
        &variant.name(),
        || variant.kernel(),
        &[rows as u32, (cols / 4) as u32, scale.to_bits(), NAN],
        &buffers,
        rows.div_ceil((WORKGROUP / variant.lanes) as usize) as u64,
    )
}

// ---- The twin ------------------------------------------------------------------------------------------------------

fn twin(logits: &Tensor, targets: &Ids, loss: &mut Tensor, gradient: Option<(&mut Tensor, f32)>) {
    let (cols, logits, targets) = (logits.cols, logits.widened(), targets.data.cpu());
    let row = |t: usize| &logits[t * cols..(t + 1) * cols];
    loss.fill_rows(|t, loss| {
        let target = targets[t];
        loss[0] = match row(t).get(target as usize) {
            Some(logit) => {
                let (top, sum) = softmax(row(t));
                sum.ln() - (logit - top)
            }
            None if target == IGNORED => 0.0,
            None => f32::NAN,
        };
    });
    let Some((dlogits, scale)) = gradient else { return };
    dlogits.fill_rows(|t, d| {
        let target = targets[t];
        if target as usize >= cols {
            d.fill(if target == IGNORED { 0.0 } else { f32::NAN });
            return;
        }
        let (top, sum) = softmax(row(t));
        let by = scale / sum;
        for (d, x) in d.iter_mut().zip(row(t)) {
            *d = act::exp(x - top) * by;
        }
        let hit = target as usize;
        d[hit] = (act::exp(row(t)[hit] - top) / sum - 1.0) * scale;
    });
}

/// The largest logit, and the sum of exponentials relative to it.
fn softmax(row: &[f32]) -> (f32, f32) {
    const LANES: usize = 16;
    let mut tops = [f32::MIN; LANES];
    let mut sums = [0f32; LANES];
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    for part in row.chunks(LANES) {
        for (top, x) in tops.iter_mut().zip(part) {
            *top = larger(*top, *x);
        }
    }
    let top = tops.into_iter().fold(f32::MIN, larger);
    for part in row.chunks(LANES) {
        for (sum, x) in sums.iter_mut().zip(part) {
            *sum += act::exp(x - top);
        }
    }
    (top, sums.iter().sum())
}

// ---- The shader ----------------------------------------------------------------------------------------------------

/// How many invocations may share a row.
const LANES: [u32; 2] = [32, 256];
/// The longest row that the fewer of them share.
const NARROW: usize = 1024;

#[derive(Clone, Copy)]
struct Variant {
    lanes: u32,
    logits: DType,
    dlogits: Option<DType>,
}

impl Variant {
    fn name(&self) -> String {
        let dlogits = self.dlogits.map_or("alone", DType::name);
        format!("cross_entropy.{}.{dlogits}.{}", self.logits, self.lanes)
    }

    fn kernel(&self) -> Kernel {
        let source = Source::new()
            .constant("WG", WORKGROUP)
            .constant("LANES", self.lanes)
            .flag("GRADIENT", self.dlogits.is_some())
            .fragment(shader!("lib/row_reduce.wgsl"))
            .quads("logits", self.logits);
        let mut bindings = vec![Binding::Read, Binding::Read, Binding::Write];
        let source = match self.dlogits {
            None => source.fragment(shader!("lib/dlogits_none.wgsl")),
            Some(dtype) => {
                bindings.push(Binding::Write);
                source.quads("dlogits", dtype).fragment(shader!("lib/dlogits.wgsl"))
            }
        };
        Kernel::portable(self.name(), source.fragment(shader!("cross_entropy.wgsl")), &bindings)
    }
}

/// Every variant of this file's kernels.
pub fn kernels() -> Vec<Kernel> {
    let mut kernels = Vec::new();
    for lanes in LANES {
        for logits in ACT {
            for dlogits in [None, Some(DType::F32), Some(DType::BF16)] {
                kernels.push(Variant { lanes, logits: *logits, dlogits }.kernel());
            }
        }
    }
    kernels
}
