//! `cargo bench --bench matmul [-- FILTER]`: the products' main cases, for work on one kernel. `--example bench` measures
//! all of them against the machine's peaks, and verifies them.
//!
//! `MX_BENCH_DEVICE` chooses the device as `--device` does in the examples. Tiers that the device lacks are named and left
//! out.

use std::time::Duration;

use criterion::{Criterion, Throughput};
use microscaling::{
    Context, DType, MXFP4, MXFP8_E4M3, Matmul, MatmulDesc, MxSpec, MxTensor, NVFP4, Operand,
    Options, QuantizeDesc, Tier, report,
};

/// Operands take turns, so that no product finds the last one's in a cache.
const SETS: usize = 3;

fn main() {
    let device = std::env::var("MX_BENCH_DEVICE").unwrap_or_else(|_| "auto".into());
    let options = Options { device: device.parse().unwrap(), ..Default::default() };
    let ctx = Context::open_blocking(&options).unwrap_or_else(|error| panic!("{error}"));
    let caps = ctx.caps();
    println!("{} ({}), clock: {}", caps.name, caps.driver, report::clock(&ctx).name());
    let mut criterion = Criterion::default()
        .configure_from_args()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .sample_size(20);
    // A product of a software adapter may take a second.
    let shapes: &[[usize; 3]] = if caps.software {
        &[[1, 1024, 2048], [8, 1024, 2048], [256, 256, 256], [512, 512, 512]]
    } else {
        &[
            [1, 4096, 14336],
            [8, 4096, 14336],
            [512, 4096, 14336],
            [1, 16384, 16384],
            [1024, 1024, 1024],
            [4096, 4096, 4096],
            [8192, 8192, 8192],
        ]
    };
    for shape in shapes {
        for (a, b) in [(Some(MXFP4), Some(MXFP4)), (None, Some(MXFP4)), (None, None)] {
            for tier in [Tier::Exact, Tier::Tensor, Tier::Alu] {
                product(&ctx, &mut criterion, *shape, a, b, tier);
            }
        }
    }
    let [m, n, k] = shapes[shapes.len() - 2];
    for spec in [MXFP8_E4M3, NVFP4] {
        for tier in [Tier::Exact, Tier::Tensor, Tier::Alu] {
            product(&ctx, &mut criterion, [m, n, k], Some(spec), Some(spec), tier);
        }
    }
    criterion.final_summary();
}

/// One case; `None` is f16.
fn product(
    ctx: &Context,
    criterion: &mut Criterion,
    [m, n, k]: [usize; 3],
    a: Option<MxSpec>,
    b: Option<MxSpec>,
    tier: Tier,
) {
    let operand = |spec: Option<MxSpec>| spec.map_or(DType::F16.into(), Operand::from);
    let desc = MatmulDesc { m, n, k, a: operand(a), b: operand(b), tier, ..Default::default() };
    let name = format!("{m}x{n}x{k} {tier} {} x {}", desc.a.values, desc.b.values);
    // Integer codes on both sides or not: an exact tier of dense operands would only fill the screen.
    if tier == Tier::Exact && (a.is_none() || b.is_none()) {
        return;
    }
    let kernel = match Matmul::new(ctx, &desc) {
        Ok(kernel) => kernel,
        Err(error) => return println!("{name}: lacking: {error}"),
    };
    let mut group = criterion.benchmark_group("matmul");
    group.throughput(Throughput::Elements(desc.flops() as u64));
    // Uploaded when the case is not filtered out.
    let mut sets: Vec<Set> = Vec::new();
    group.bench_function(name, |bencher| {
        if sets.is_empty() {
            sets = (0..SETS as u64).map(|seed| Set::new(ctx, &desc, a, b, seed)).collect();
        }
        bencher.iter_custom(|iterations| {
            // Criterion asks for many iterations of short ones: keep a command buffer within bounds.
            let mut total = Duration::ZERO;
            let mut left = iterations;
            while left > 0 {
                let now = left.min(50);
                let run = report::time(ctx, now, |stream, i| {
                    let set = &mut sets[i as usize % SETS];
                    kernel.record(stream, set.a.input(), set.b.input(), &mut set.y)
                });
                total += pollster::block_on(run).expect("a product");
                left -= now;
            }
            total
        });
    });
    group.finish();
}

struct Set {
    a: Device,
    b: Device,
    y: microscaling::Tensor,
}

enum Device {
    Mx(microscaling::DeviceMxTensor),
    Dense(microscaling::Tensor),
}

impl Set {
    fn new(
        ctx: &Context,
        desc: &MatmulDesc,
        a: Option<MxSpec>,
        b: Option<MxSpec>,
        seed: u64,
    ) -> Set {
        Set {
            a: Device::new(ctx, a, desc.m, desc.k, 2 * seed),
            b: Device::new(ctx, b, desc.n, desc.k, 2 * seed + 1),
            y: ctx.zeros(DType::F32, desc.m, desc.n).expect("y"),
        }
    }
}

impl Device {
    fn new(ctx: &Context, spec: Option<MxSpec>, rows: usize, cols: usize, seed: u64) -> Device {
        let data = gaussian(seed, rows * cols);
        match spec {
            Some(spec) => {
                let desc = QuantizeDesc { spec, ..Default::default() };
                let packed = MxTensor::quantize(&data, rows, cols, &desc).expect("quantize");
                Device::Mx(ctx.upload_mx(&packed).expect("upload"))
            }
            None => {
                let halves: Vec<u8> =
                    data.iter().flat_map(|x| half::f16::from_f32(*x).to_le_bytes()).collect();
                Device::Dense(ctx.upload(DType::F16, rows, cols, &halves).expect("upload"))
            }
        }
    }

    fn input(&self) -> microscaling::kernels::matmul::Input<'_> {
        match self {
            Device::Mx(x) => x.into(),
            Device::Dense(x) => x.into(),
        }
    }
}

/// Sums of four uniforms, from a small generator: the distribution matters little, the spread does.
fn gaussian(seed: u64, n: usize) -> Vec<f32> {
    let mut state = 0x2545_f491_4f6c_dd1d ^ seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (0..n)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let sum: i64 = (0..4).map(|i| i64::from((state >> (16 * i)) as u16) - 32768).sum();
            sum as f32 / 37837.0
        })
        .collect()
}
