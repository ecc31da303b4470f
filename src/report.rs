//! Timing of recorded work.

use std::time::{Duration, Instant};

use crate::engine::{Context, Stream};
use crate::{Error, Result};

/// Which clock a duration comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clock {
    /// The device's timestamps, around the work alone.
    Device,
    /// The host's clock, from submission to completion.
    Host,
}

impl Clock {
    /// `device` or `host`.
    pub const fn name(self) -> &'static str {
        match self {
            Clock::Device => "device",
            Clock::Host => "host",
        }
    }
}

/// The clock that [`time`] uses on `ctx`.
pub fn clock(ctx: &Context) -> Clock {
    let wanted = wgpu::Features::TIMESTAMP_QUERY | wgpu::Features::TIMESTAMP_QUERY_INSIDE_ENCODERS;
    match ctx.wgpu() {
        Some((device, _)) if device.features().contains(wanted) => Clock::Device,
        _ => Clock::Host,
    }
}

/// Records `iterations` of `record` back to back, submits them at once, waits, and returns the time of all of them
/// together. `record` is told the number of the iteration, so that it can take turns between operands.
pub async fn time(
    ctx: &Context,
    iterations: u64,
    mut record: impl FnMut(&mut Stream<'_>, u64) -> Result<()>,
) -> Result<Duration> {
    let Some((device, queue)) = ctx.wgpu() else {
        let start = Instant::now();
        let mut stream = ctx.stream();
        for i in 0..iterations {
            record(&mut stream, i)?;
        }
        ctx.submit(stream)?;
        return Ok(start.elapsed());
    };
    let mut encoder = device.create_command_encoder(&Default::default());
    let queries = (clock(ctx) == Clock::Device).then(|| {
        device.create_query_set(&wgpu::QuerySetDescriptor {
            label: Some("mx.time"),
            ty: wgpu::QueryType::Timestamp,
            count: 2,
        })
    });
    if let Some(queries) = &queries {
        encoder.write_timestamp(queries, 0);
    }
    {
        let mut stream = ctx.stream_onto(&mut encoder)?;
        for i in 0..iterations {
            record(&mut stream, i)?;
        }
    }
    let resolved = queries.as_ref().map(|queries| {
        encoder.write_timestamp(queries, 1);
        let buffer = device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("mx.time"),
            size: 16,
            usage: wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC,
            mapped_at_creation: false,
        });
        encoder.resolve_query_set(queries, 0..2, &buffer, 0);
        buffer
    });
    let start = Instant::now();
    queue.submit([encoder.finish()]);
    ctx.wait().await?;
    let host = start.elapsed();
    match resolved {
        None => Ok(host),
        Some(buffer) => {
            let ticks = ctx.read_buffer(&buffer, 16).await?;
            let tick = |i: usize| -> u64 { bytemuck::pod_read_unaligned(&ticks[8 * i..8 * i + 8]) };
            let elapsed = tick(1).checked_sub(tick(0)).ok_or_else(|| {
                Error::Gpu("the device's second timestamp is before its first".into())
            })?;
            Ok(Duration::from_secs_f64(
                elapsed as f64 * f64::from(queue.get_timestamp_period()) * 1e-9,
            ))
        }
    }
}

/// The middle of a sample; the mean of the two middle ones of an even number. NaN for none.
pub fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}
