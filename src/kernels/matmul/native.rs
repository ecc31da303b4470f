//! A product through a native route: packing, the library, the epilogue. See [`crate::native`].

use std::sync::Arc;

use super::gpu::record_join;
use super::{Extras, Input, Matmul, MatmulDesc, Operand, Output, Target, Values};
use crate::engine::gpu::Gpu;
use crate::engine::{Context, Gate, Stream};
use crate::kernels::native_pack::{self, Packed};
use crate::native::registry::Entry;
use crate::native::{Job, Packing, Problem};
use crate::{DeviceMxTensor, Error, MxSpec, Result};

/// How a product goes through a route.
#[derive(Clone, Debug)]
pub(crate) struct Native {
    pub(crate) entry: Arc<Entry>,
    pub(crate) packings: [Packing; 2],
    pub(crate) problem: Problem,
    /// Computes what the route's formats do not hold exactly.
    pub(crate) next: Box<Matmul>,
}

/// Why a product did not go through its route.
pub(crate) enum Refused {
    /// Not this time.
    Declined(String),
    /// The route is of no use any more.
    Failed(String),
}

impl Refused {
    pub(crate) fn reason(self) -> String {
        let (Refused::Declined(reason) | Refused::Failed(reason)) = self;
        reason
    }
}

/// The product as routes see it, or why none can take it.
pub(super) fn problem(desc: &MatmulDesc) -> std::result::Result<Problem, String> {
    let spec = |name: &str, operand: Operand| -> std::result::Result<MxSpec, String> {
        match operand.values {
            Values::Mx(spec) => Ok(spec),
            Values::Dense(dtype) => {
                Err(format!("{name} is {dtype}: native routes take packed operands"))
            }
        }
    };
    let (a, b) = (spec("A", desc.a)?, spec("B", desc.b)?);
    if desc.experts.is_some() || desc.batch != 1 {
        return Err("grouped and batched products have no native route yet".into());
    }
    if let Output::Mx(out) = desc.out {
        return Err(format!("an output in {}: native routes write dense ones", out.spec));
    }
    if desc.m == 0 || desc.n == 0 || desc.k == 0 {
        return Err(format!("m = {}, n = {}, k = {}", desc.m, desc.n, desc.k));
    }
    Ok(Problem { m: desc.m, n: desc.n, k: desc.k, a, b })
}

/// The route for a product, or what each one says. `any`: also those that add up in fewer bits.
pub(super) fn choose(
    ctx: &Context,
    gpu: &Gpu,
    desc: &MatmulDesc,
    any: bool,
) -> std::result::Result<(Arc<Entry>, [Packing; 2], Problem), String> {
    let problem = problem(desc)?;
    let work = (desc.m as u64).saturating_mul(desc.n as u64).saturating_mul(desc.k as u64);
    if !any && work < gpu.native_from {
        return Err(format!(
            "m · n · k is below {}: handing it over would take longer than the product",
            gpu.native_from
        ));
    }
    // Whoever sets no threshold wants the route at any cost.
    let slow = any || gpu.native_from == 0;
    let (entry, packings) = gpu.native().choose(ctx, &problem, any, slow)?;
    let largest = sizes(&problem, &packings).into_iter().max().unwrap_or(0);
    if largest > gpu.max_binding {
        return Err(format!(
            "a packed operand or the sums have {largest} bytes, the device binds {} at once",
            gpu.max_binding
        ));
    }
    Ok((entry, packings, problem))
}

/// Bytes of codes and scales of A and of B, and of the sums.
fn sizes(problem: &Problem, packings: &[Packing; 2]) -> [u64; 5] {
    let &Problem { m, n, k, a, b } = problem;
    let scales = |packing: &Packing, lines| {
        let [rows, groups] = packing.scale_shape(lines, k).map(|length| length as u64);
        (rows * groups).next_multiple_of(4)
    };
    let [m_padded, n_padded, _] = problem.padded(packings).map(|length| length as u64);
    [
        packings[0].code_bytes(a, m, k) as u64,
        packings[1].code_bytes(b, n, k) as u64,
        scales(&packings[0], m),
        scales(&packings[1], n),
        (m_padded * n_padded).saturating_mul(4),
    ]
}

fn bound_at_once(x: Input<'_>) -> Option<&DeviceMxTensor> {
    match x {
        Input::Mx(x) if x.bindings().is_ok() => Some(x),
        _ => None,
    }
}

/// An error before anything of y was recorded: the next tier takes over, unless the device is gone.
fn refused(error: Error) -> Result<std::result::Result<(), Refused>> {
    match error {
        Error::DeviceLost(_) => Err(error),
        error => Ok(Err(Refused::Declined(error.to_string()))),
    }
}

impl Native {
    /// Records the product. Everything of it is submitted on return: routes share their buffers among all products. `flag`: for
    /// the route's test, which waits for the library at once, and where to copy the flag that says what was not held exactly.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn record(
        &self,
        desc: &MatmulDesc,
        stream: &mut Stream<'_>,
        a: Input<'_>,
        b: Input<'_>,
        mut y: Target<'_>,
        extras: Extras<'_>,
        flag: Option<&wgpu::Buffer>,
    ) -> Result<std::result::Result<(), Refused>> {
        let ctx = stream.context().clone();
        let crate::engine::Engine::Gpu(gpu) = ctx.engine() else { return Ok(Ok(())) };
        let decline = |reason: &str| Ok(Err(Refused::Declined(reason.into())));
        if !stream.may_split() {
            return decline(
                "the stream records into an encoder of the caller's, which a library's work cannot be put into",
            );
        }
        if let Some(reason) = self.entry.disabled() {
            return decline(&reason);
        }
        let whole = match &y {
            Target::Dense(y) => y.data.chunks().count() == 1,
            Target::Mx(_) => false,
        };
        let (Some(a_mx), Some(b_mx), true) = (bound_at_once(a), bound_at_once(b), whole) else {
            return decline("an operand or y lies in several bindings");
        };
        let sizes = sizes(&self.problem, &self.packings);
        let mut share = self.entry.share();
        if share.device() != &gpu.device {
            return decline("the stream is for another device than the route");
        }
        let buffers = match share.buffers(gpu, sizes) {
            Ok(buffers) => buffers,
            Err(error) => return refused(error),
        };
        let flags = share.flags().clone();
        if let Some(encoder) = stream.wgpu_encoder() {
            encoder.clear_buffer(&flags, 0, Some(4));
        }
        for (side, (x, operand)) in [(a_mx, desc.a), (b_mx, desc.b)].into_iter().enumerate() {
            let out = Packed { codes: &buffers[side], scales: &buffers[2 + side], flags: &flags };
            native_pack::record(stream, x, operand.transposed, &self.packings[side], out)?;
        }
        let shape = self.problem.padded(&self.packings);
        let has = |role: usize| if sizes[role] > 0 { share.address(role) } else { 0 };
        let job = Job { shape, codes: [has(0), has(1)], scales: [has(2), has(3)], sums: has(4) };
        let [codes_a, codes_b, scales_a, scales_b, sums] = sizes;
        let operands = [codes_a, codes_b, scales_a, scales_b];
        let route = &self.entry.route;
        let run = || route.run(&self.problem, &job);
        match share.hand_over(gpu, stream, operands, sums, flag.is_some(), run) {
            Ok(Ok(())) => {}
            Ok(Err(reason)) => return Ok(Err(Refused::Failed(reason))),
            Err(error) => return refused(error),
        }
        let gate = |wanted| {
            let (flags, arguments) = (flags.clone(), share.arguments.clone());
            Some(Gate { flags, arguments, wanted, count: wanted })
        };
        let Problem { a: a_spec, b: b_spec, .. } = self.problem;
        let exponent = -self.packings[0].exponent(a_spec) - self.packings[1].exponent(b_spec);
        stream.set_gate(gate(false));
        let mut recorded =
            record_join(desc, stream, (&buffers[4], shape[1]), exponent, a, b, &y, extras);
        if recorded.is_ok() {
            stream.set_gate(gate(true));
            recorded = self.next.record_with(stream, a, b, y.reborrow(), extras);
        }
        stream.set_gate(None);
        recorded?;
        if let (Some(encoder), Some(flag)) = (stream.wgpu_encoder(), flag) {
            encoder.copy_buffer_to_buffer(&flags, 0, flag, 0, 4);
        }
        stream.submit_so_far()?;
        Ok(Ok(()))
    }
}

impl Matmul {
    /// A product on a certain route, for its test.
    pub(crate) fn on_route(ctx: &Context, desc: &MatmulDesc, entry: &Arc<Entry>) -> Result<Matmul> {
        let unsupported = |has: String| Error::Unsupported {
            operation: "the native tier".into(),
            needs: format!("a problem for {}", entry.route.name()),
            has,
        };
        let problem = problem(desc).map_err(unsupported)?;
        let packings = entry.route.accepts(&problem).map_err(unsupported)?;
        let next = Box::new(Matmul::without_native(ctx, desc)?);
        let entry = Arc::clone(entry);
        let native = Native { entry, packings, problem, next };
        Ok(Matmul {
            desc: *desc,
            tier: super::Tier::Native,
            why: "its test".into(),
            slice: None,
            native: Some(native),
            forced: None,
            bytes: None,
        })
    }

    /// Records a product for its route's test: no other tier takes over.
    pub(crate) fn record_on_route(
        &self,
        stream: &mut Stream<'_>,
        a: &DeviceMxTensor,
        b: &DeviceMxTensor,
        y: &mut crate::Tensor,
        flag: &wgpu::Buffer,
    ) -> std::result::Result<(), Refused> {
        let Some(native) = &self.native else {
            return Err(Refused::Declined("not a native product".into()));
        };
        let extras = Extras::default();
        native
            .record(&self.desc, stream, a.into(), b.into(), y.into(), extras, Some(flag))
            .unwrap_or_else(|error| Err(Refused::Declined(error.to_string())))
    }
}
