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
    let queries = (clock(ctx) == Clock::Device).then(|| {
        device.create_query_set(&wgpu::QuerySetDescriptor {
            label: Some("mx.time"),
            ty: wgpu::QueryType::Timestamp,
            count: 2,
        })
    });
    let mut stream = ctx.stream();
    if let (Some(queries), Some(encoder)) = (&queries, stream.wgpu_encoder()) {
        encoder.write_timestamp(queries, 0);
    }
    for i in 0..iterations {
        record(&mut stream, i)?;
    }
    let mut resolved = None;
    if let (Some(queries), Some(encoder)) = (&queries, stream.wgpu_encoder()) {
        encoder.write_timestamp(queries, 1);
        let buffer = device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("mx.time"),
            size: 16,
            usage: wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC,
            mapped_at_creation: false,
        });
        encoder.resolve_query_set(queries, 0..2, &buffer, 0);
        resolved = Some(buffer);
    }
    // Native products are submitted while they are recorded.
    let start = stream.first_submission().unwrap_or_else(Instant::now);
    ctx.submit(stream)?;
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

/// Whether [`profile`] works on `ctx`: an error says what it needs.
pub fn can_profile(ctx: &Context) -> Result<()> {
    with_timestamps(ctx).map(|_| ())
}

fn with_timestamps(ctx: &Context) -> Result<&wgpu::Device> {
    match ctx.wgpu() {
        Some((device, _)) if device.features().contains(wgpu::Features::TIMESTAMP_QUERY) => {
            Ok(device)
        }
        _ => Err(Error::Unsupported {
            operation: "a profile".into(),
            needs: "a GPU with timestamps".into(),
            has: format!("{} has none", ctx.caps().name),
        }),
    }
}

/// Records what `record` does, submits it, waits, and returns each kernel's name, how often it ran, and its time, the longest
/// first. On a GPU with timestamps ([`can_profile`]); 2048 dispatches at most are timed.
pub async fn profile(
    ctx: &Context,
    record: impl FnOnce(&mut Stream<'_>) -> Result<()>,
) -> Result<Vec<(String, u64, Duration)>> {
    let device = with_timestamps(ctx)?;
    let count = wgpu::QUERY_SET_MAX_QUERIES;
    let mut stream = ctx.stream();
    stream.start_profile(device.create_query_set(&wgpu::QuerySetDescriptor {
        label: Some("mx.profile"),
        ty: wgpu::QueryType::Timestamp,
        count,
    }));
    record(&mut stream)?;
    let Some(profile) = stream.take_profile() else { return Ok(Vec::new()) };
    let ends = 2 * profile.names.len() as u32;
    let buffer = device.create_buffer(&wgpu::BufferDescriptor {
        label: Some("mx.profile"),
        size: u64::from(count) * 8,
        usage: wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC,
        mapped_at_creation: false,
    });
    if let Some(encoder) = stream.wgpu_encoder() {
        encoder.resolve_query_set(&profile.queries, 0..ends, &buffer, 0);
    }
    ctx.submit(stream)?;
    let bytes = ctx.read_buffer(&buffer, u64::from(ends) * 8).await?;
    let ticks: Vec<u64> = bytemuck::pod_collect_to_vec(&bytes);
    let period = ctx.wgpu().map_or(1.0, |(_, queue)| f64::from(queue.get_timestamp_period()));
    let mut sums: std::collections::HashMap<String, (u64, Duration)> = Default::default();
    for (name, ends) in profile.names.into_iter().zip(ticks.chunks_exact(2)) {
        let (times, sum) = sums.entry(name).or_default();
        *times += 1;
        *sum += Duration::from_secs_f64(ends[1].saturating_sub(ends[0]) as f64 * period * 1e-9);
    }
    let mut list: Vec<_> = sums.into_iter().map(|(name, (n, sum))| (name, n, sum)).collect();
    list.sort_by(|a, b| b.2.cmp(&a.2).then_with(|| a.0.cmp(&b.0)));
    Ok(list)
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
