//! What the test files share: an oracle that is written another way than the crate, inputs, golden files.
#![allow(dead_code)] // Each test binary uses its part.

pub mod cli;
pub mod engines;
pub mod product;
pub mod reference;

use std::cell::Cell;
use std::panic::{self, AssertUnwindSafe};
use std::path::PathBuf;
use std::sync::Once;

use microscaling::{
    Context, DType, DeviceMxTensor, Error, Layout, MxTensor, QuantizeDesc, Rounding, rng,
};

pub fn golden(name: &str) -> Vec<u8> {
    let path: PathBuf = [env!("CARGO_MANIFEST_DIR"), "tests", "golden", name].iter().collect();
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Random words from the crate's generator (whose known answers are tested on their own).
pub fn words(seed: u64, n: usize) -> Vec<u32> {
    let bits =
        rng::RoundingBits::new(Rounding::Stochastic { seed, stream: 99 }, usize::MAX / 16).unwrap();
    let mut out = Vec::with_capacity(n + 4);
    for group in 0.. {
        if out.len() >= n {
            break;
        }
        let halves = bits.group(0, group);
        out.extend(halves.chunks(2).map(|h| u32::from(h[0]) | u32::from(h[1]) << 16));
    }
    out.truncate(n);
    out
}

/// A standard normal tensor in f32.
pub fn gaussian(seed: u64, n: usize) -> Vec<f32> {
    let words = words(seed, 2 * n);
    words
        .chunks(2)
        .map(|w| {
            // Box-Muller.
            let u = (f64::from(w[0]) + 1.0) / 4294967296.0;
            let v = f64::from(w[1]) / 4294967296.0;
            ((-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32
        })
        .collect()
}

/// Little-endian elements as f32 values, exact.
pub fn to_f32(dtype: DType, bytes: &[u8]) -> Vec<f32> {
    match dtype {
        DType::F32 => bytes.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
        DType::F16 => bytes
            .chunks(2)
            .map(|b| half::f16::from_le_bytes(b.try_into().unwrap()).to_f32())
            .collect(),
        DType::BF16 => bytes
            .chunks(2)
            .map(|b| half::bf16::from_le_bytes(b.try_into().unwrap()).to_f32())
            .collect(),
    }
}

/// f32 values in another type; from the `half` crate, with the one NaN.
pub fn narrowed(dtype: DType, values: &[f32]) -> Vec<u8> {
    let nan = |v: f32, bits: u16, canonical: u16| if v.is_nan() { canonical } else { bits };
    values
        .iter()
        .flat_map(|v| match dtype {
            DType::F32 => v.to_le_bytes().to_vec(),
            DType::F16 => nan(*v, half::f16::from_f32(*v).to_bits(), 0x7e00).to_le_bytes().to_vec(),
            DType::BF16 => {
                nan(*v, half::bf16::from_f32(*v).to_bits(), 0x7fc0).to_le_bytes().to_vec()
            }
        })
        .collect()
}

/// A packed tensor full of garbage, so that what a kernel leaves out shows.
pub fn garbage(
    ctx: &Context,
    desc: &QuantizeDesc,
    rows: usize,
    cols: usize,
) -> Result<DeviceMxTensor, Error> {
    let layout = Layout::new(desc.spec, desc.axis, rows, cols)?;
    let fill = |n| (0..n).map(|i| (i as u8).wrapping_mul(37) | 0x81).collect();
    ctx.upload_mx(&MxTensor::from_parts(
        layout,
        fill(layout.codes_len()),
        fill(layout.scales_len()),
        1.0,
    )?)
}

/// Whether a check panics, as one of what is wrong must; nothing is printed of it.
pub fn panics<T>(check: impl FnOnce() -> T) -> bool {
    static HOOK: Once = Once::new();
    thread_local!(static QUIET: Cell<bool> = const { Cell::new(false) });
    HOOK.call_once(|| {
        let usual = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !QUIET.get() {
                usual(info);
            }
        }));
    });
    QUIET.set(true);
    let result = panic::catch_unwind(AssertUnwindSafe(check));
    QUIET.set(false);
    result.is_err()
}

/// Asserts that two byte strings are equal, and says where they are not.
#[track_caller]
pub fn assert_bytes(what: &str, got: &[u8], want: &[u8]) {
    assert_eq!(got.len(), want.len(), "{what}: lengths");
    if let Some(i) = (0..got.len()).find(|i| got[*i] != want[*i]) {
        let wrong = got.iter().zip(want).filter(|(a, b)| a != b).count();
        panic!(
            "{what}: {wrong} of {} bytes differ, the first at {i}: {:#04x}, want {:#04x}",
            got.len(),
            got[i],
            want[i]
        );
    }
}
