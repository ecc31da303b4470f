//! A copy: what a kernel that only moves bytes can hope for. Rates of other kernels are compared with it.
//!
//! **Exact**. Shader: `shaders/copy.wgsl`.

use crate::engine::buffer::Tensor;
use crate::engine::shader::{Binding, Kernel, Source, shader};
use crate::engine::{Context, Stream};
use crate::{Error, Result};

use super::WORKGROUP;

/// The kernel that copies a dense tensor.
#[derive(Clone, Debug)]
pub struct Copy;

impl Copy {
    /// Nothing to check.
    pub fn new(_ctx: &Context) -> Copy {
        Copy
    }

    /// Records a copy of `x` into `out`, of the same shape and type.
    pub fn record(&self, stream: &mut Stream<'_>, x: &Tensor, out: &mut Tensor) -> Result<()> {
        if (x.shape(), x.dtype) != (out.shape(), out.dtype) {
            return Err(Error::Mismatch {
                operation: "Copy::record",
                problem: format!(
                    "x is {:?} of {}, the output {:?} of {}",
                    x.shape(),
                    x.dtype,
                    out.shape(),
                    out.dtype
                ),
            });
        }
        stream.context().check_same(&x.data, &out.data)?;
        if stream.gpu().is_none() {
            twin(x.data.cpu(), out.data.cpu_mut());
            return Ok(());
        }
        if x.data.chunk_rows != out.data.chunk_rows {
            return Err(Error::Mismatch {
                operation: "Copy::record",
                problem: "the tensors are split into bindings at different rows".into(),
            });
        }
        for (from, to) in x.data.chunks().zip(out.data.chunks()) {
            // This crate's buffers are padded to whole vectors of 16 bytes.
            let vectors = ((from.rows * x.data.row_bytes) as u64).div_ceil(16);
            stream.dispatch(
                NAME,
                kernel,
                &[vectors as u32],
                &[from.buffer, to.buffer],
                vectors.div_ceil(u64::from(4 * WORKGROUP)),
            )?;
        }
        Ok(())
    }
}

/// The twin.
fn twin(x: &[u32], out: &mut [u32]) {
    #[cfg(not(target_arch = "wasm32"))]
    {
        use rayon::prelude::*;
        let piece = 1 << 18;
        out.par_chunks_mut(piece)
            .zip(x.par_chunks(piece))
            .for_each(|(out, x)| out.copy_from_slice(x));
    }
    #[cfg(target_arch = "wasm32")]
    out.copy_from_slice(x);
}

const NAME: &str = "copy";

fn kernel() -> Kernel {
    let source = Source::new().constant("WG", WORKGROUP).fragment(shader!("copy.wgsl"));
    Kernel::portable(NAME.into(), source, &[Binding::Read, Binding::Write])
}

/// Every variant of this file's kernels.
pub fn kernels() -> Vec<Kernel> {
    vec![kernel()]
}
