//! The places of ids in ascending order, equal ones in the order they come: what belongs to a token, or to an expert.
//!
//! A radix sort of 8 bits a pass: as many passes as the bound has bytes. **Exact**, with counts and prefix sums of whole
//! numbers. Ids at or above the bound are left out.
//!
//! Shaders: `shaders/sort_count.wgsl`, `shaders/sort_scan.wgsl`, `shaders/sort_scatter.wgsl`, `shaders/sort_starts.wgsl`.

use crate::engine::buffer::Ids;
use crate::engine::shader::{Binding, Kernel, Source, shader};
use crate::engine::{Context, Stream};
use crate::{Error, Result};

use super::WORKGROUP;
use super::act;

/// Entries that a workgroup counts and moves.
const CHUNK: u32 = 1024;
const DIGITS: usize = 256;

/// The sort of up to so many ids, with its memory and its result.
#[derive(Debug)]
pub struct Sort {
    max_len: usize,
    bound: usize,
    /// The order after the last pass, and the one before.
    orders: [Ids; 2],
    counts: Ids,
    starts: Ids,
}

impl Sort {
    /// For up to `max_len` ids below `bound`.
    pub fn new(ctx: &Context, max_len: usize, bound: usize) -> Result<Sort> {
        if bound == 0 || u32::try_from(bound.max(max_len)).is_err() {
            return Err(Error::Mismatch {
                operation: "Sort::new",
                problem: format!("{max_len} ids below {bound}, expected both in 32 bits"),
            });
        }
        let max_len = max_len.max(1);
        Ok(Sort {
            max_len,
            bound,
            orders: [ctx.zeros_ids(max_len)?, ctx.zeros_ids(max_len)?],
            counts: ctx.zeros_ids(max_len.div_ceil(CHUNK as usize) * DIGITS + 1)?,
            starts: ctx.zeros_ids(bound + 1)?,
        })
    }

    /// Places of the ids in ascending order of id, then of place. How many there are is the last of [`Sort::starts`]; what
    /// lies behind them means nothing.
    pub fn order(&self) -> &Ids {
        &self.orders[0]
    }

    /// Where in the order each id begins, and behind the last one where that ends.
    pub fn starts(&self) -> &Ids {
        &self.starts
    }

    /// Records the sort of `ids`.
    pub fn record(&mut self, stream: &mut Stream<'_>, ids: &Ids) -> Result<()> {
        let len = ids.len();
        if len == 0 || len > self.max_len {
            return Err(Error::Mismatch {
                operation: "Sort::record",
                problem: format!("{len} ids, expected 1 to {}", self.max_len),
            });
        }
        act::check_same(stream, &[&ids.data, &self.starts.data])?;
        if stream.gpu().is_none() {
            self.twin(ids.data.cpu());
            return Ok(());
        }
        let chunks = len.div_ceil(CHUNK as usize) as u32;
        let bits = usize::BITS - (self.bound - 1).leading_zeros();
        let passes = bits.div_ceil(8).max(1);
        let [last, other] = &self.orders;
        let (ids, counts) = (ids.binding()?, self.counts.binding()?);
        for pass in 0..passes {
            let (after, before) =
                if (passes - pass) % 2 == 1 { (last, other) } else { (other, last) };
            let (after, before) = (after.binding()?, before.binding()?);
            let params = [len as u32, self.bound as u32, 8 * pass, u32::from(pass == 0), chunks];
            let groups = u64::from(chunks);
            stream.dispatch(COUNT, count_kernel, &params, &[ids, before, counts], groups)?;
            stream.dispatch(SCAN, scan_kernel, &[chunks], &[counts], 1)?;
            let buffers = [ids, before, counts, after];
            stream.dispatch(SCATTER, scatter_kernel, &params, &buffers, groups)?;
        }
        stream.dispatch(
            STARTS,
            starts_kernel,
            &[self.bound as u32, chunks],
            &[ids, last.binding()?, counts, self.starts.binding()?],
            (self.bound as u64 + 1).div_ceil(u64::from(WORKGROUP)),
        )
    }

    /// A counting sort.
    fn twin(&mut self, ids: &[u32]) {
        let (order, starts) = (self.orders[0].data.cpu_mut(), self.starts.data.cpu_mut());
        let valid = |id: &u32| (*id as usize) < self.bound;
        starts.fill(0);
        for id in ids.iter().filter(|id| valid(id)) {
            starts[*id as usize] += 1;
        }
        // To the end of each id's places; they are filled from the back.
        let mut end = 0;
        for start in starts.iter_mut() {
            end += *start;
            *start = end;
        }
        for (place, id) in ids.iter().enumerate().rev().filter(|(_, id)| valid(id)) {
            let start = &mut starts[*id as usize];
            *start -= 1;
            order[*start as usize] = place as u32;
        }
    }
}

// ---- The shaders ---------------------------------------------------------------------------------------------------

const COUNT: &str = "sort.count";
const SCAN: &str = "sort.scan";
const SCATTER: &str = "sort.scatter";
const STARTS: &str = "sort.starts";

fn source() -> Source {
    Source::new().constant("WG", WORKGROUP).constant("CHUNK", CHUNK)
}

fn count_kernel() -> Kernel {
    let source =
        source().fragment(shader!("lib/sort_entry.wgsl")).fragment(shader!("sort_count.wgsl"));
    Kernel::portable(COUNT.into(), source, &[Binding::Read, Binding::Read, Binding::Write])
}

fn scan_kernel() -> Kernel {
    Kernel::portable(SCAN.into(), source().fragment(shader!("sort_scan.wgsl")), &[Binding::Write])
}

fn scatter_kernel() -> Kernel {
    let source =
        source().fragment(shader!("lib/sort_entry.wgsl")).fragment(shader!("sort_scatter.wgsl"));
    let bindings = [Binding::Read, Binding::Read, Binding::Write, Binding::Write];
    Kernel::portable(SCATTER.into(), source, &bindings)
}

fn starts_kernel() -> Kernel {
    let bindings = [Binding::Read, Binding::Read, Binding::Read, Binding::Write];
    Kernel::portable(STARTS.into(), source().fragment(shader!("sort_starts.wgsl")), &bindings)
}

/// Every variant of this file's kernels.
pub fn kernels() -> Vec<Kernel> {
    vec![count_kernel(), scan_kernel(), scatter_kernel(), starts_kernel()]
}
