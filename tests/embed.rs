//! The crate on a host's device: it records and does not submit, asks for nothing, and says when the device is gone.
//! Stamped on every adapter; without one the tests show as ignored. `MX_TEST_GPU` as in tests/kernels.rs.

mod common;

use libtest_mimic::{Arguments, Failed, Trial};
use microscaling::{
    Axis, Block, Context, DType, Error, MXFP4, MxTensor, NVFP4, Options, Quantize, QuantizeDesc,
    Rounding, Tensor, engine, selftest,
};

type Test = fn(&wgpu::Adapter) -> Result<(), Failed>;

const SUITE: &[(&str, Test)] = &[
    ("recording_submits_nothing", recording_submits_nothing),
    ("buffers_that_do_not_fit_are_refused", buffers_are_checked),
    ("a_lost_device_is_an_error", lost_device),
    ("a_device_of_minimal_limits", minimal_limits),
];

fn main() {
    let args = Arguments::from_args();
    let mode = std::env::var("MX_TEST_GPU").unwrap_or_else(|_| "auto".into());
    let adapters =
        if mode == "off" { Vec::new() } else { pollster::block_on(engine::adapters(false)) };
    assert!(
        mode != "require" || !adapters.is_empty(),
        "MX_TEST_GPU=require, but no adapter answers"
    );
    let mut trials = Vec::new();
    for (name, test) in SUITE {
        if adapters.is_empty() {
            trials.push(
                Trial::test(format!("[no adapter] {name}"), || Ok(())).with_ignored_flag(true),
            );
        }
        for adapter in &adapters {
            let (adapter, test) = (adapter.clone(), *test);
            let label =
                format!("{:?} {} {name}", adapter.get_info().backend, adapter.get_info().name);
            trials.push(Trial::test(label, move || test(&adapter)));
        }
    }
    libtest_mimic::run(&args, trials).exit();
}

/// A device as a host might open it: no feature, WebGPU's default limits.
fn open(adapter: &wgpu::Adapter) -> Result<(wgpu::Device, wgpu::Queue), Failed> {
    Ok(pollster::block_on(adapter.request_device(&wgpu::DeviceDescriptor::default()))?)
}

fn host_buffer(device: &wgpu::Device, size: u64, usage: wgpu::BufferUsages) -> wgpu::Buffer {
    device.create_buffer(&wgpu::BufferDescriptor {
        label: None,
        size,
        usage,
        mapped_at_creation: false,
    })
}

fn recording_submits_nothing(adapter: &wgpu::Adapter) -> Result<(), Failed> {
    use wgpu::BufferUsages as Usage;
    let (device, queue) = open(adapter)?;
    let ctx = Context::from_wgpu(device.clone(), queue.clone(), adapter);
    let (rows, cols) = (48, 96);
    let bytes = selftest::input(DType::F32, rows, cols);
    // The host's buffer is longer than the tensor: what lies behind it is the host's.
    let buffer = host_buffer(
        &device,
        bytes.len() as u64 + 64,
        Usage::STORAGE | Usage::COPY_DST | Usage::COPY_SRC,
    );
    queue.write_buffer(&buffer, 0, &bytes);
    queue.write_buffer(&buffer, bytes.len() as u64, &[0xa5; 64]);
    let x = Tensor::from_buffer(&ctx, DType::F32, rows, cols, buffer.clone())?;
    let desc = QuantizeDesc::default();
    let mut packed = ctx.zeros_mx(MXFP4, Axis::One, rows, cols)?;
    let quantize = Quantize::new(&ctx, &desc)?;
    let mut encoder = device.create_command_encoder(&Default::default());
    {
        let mut stream = ctx.stream_onto(&mut encoder)?;
        quantize.record(&mut stream, &x, &mut packed)?;
    }
    let before = ctx.read_mx_blocking(&packed)?;
    assert!(
        before.codes().iter().chain(before.scales()).all(|b| *b == 0),
        "something ran before the host submitted"
    );
    queue.submit([encoder.finish()]);
    let want = MxTensor::quantize(&common::to_f32(DType::F32, &bytes), rows, cols, &desc)?;
    assert_eq!(ctx.read_mx_blocking(&packed)?, want);
    let after = pollster::block_on(ctx.read_buffer(&buffer, buffer.size()))?;
    common::assert_bytes("the host's buffer", &after[..bytes.len()], &bytes);
    common::assert_bytes("behind the tensor", &after[bytes.len()..], &[0xa5; 64]);
    Ok(())
}

fn buffers_are_checked(adapter: &wgpu::Adapter) -> Result<(), Failed> {
    let (device, queue) = open(adapter)?;
    let ctx = Context::from_wgpu(device.clone(), queue, adapter);
    let short = host_buffer(&device, 60, wgpu::BufferUsages::STORAGE);
    let error = Tensor::from_buffer(&ctx, DType::F32, 4, 4, short).unwrap_err().to_string();
    assert!(error.contains("60 bytes") && error.contains("[4, 4]"), "{error}");
    let wrong = host_buffer(&device, 64, wgpu::BufferUsages::COPY_DST);
    let error = Tensor::from_buffer(&ctx, DType::F32, 4, 4, wrong).unwrap_err().to_string();
    assert!(error.contains("STORAGE"), "{error}");
    let cpu = Context::cpu();
    let right = host_buffer(&device, 64, wgpu::BufferUsages::STORAGE);
    assert!(
        Tensor::from_buffer(&cpu, DType::F32, 4, 4, right).is_err(),
        "a GPU's buffer on the CPU engine"
    );
    let mut encoder = device.create_command_encoder(&Default::default());
    assert!(matches!(cpu.stream_onto(&mut encoder), Err(Error::Unsupported { .. })));
    // A stream into the host's encoder is the host's to submit.
    let stream: microscaling::Stream<'_> = ctx.stream_onto(&mut encoder)?;
    drop(stream);
    Ok(())
}

fn lost_device(adapter: &wgpu::Adapter) -> Result<(), Failed> {
    let ctx = pollster::block_on(Context::on_adapter(adapter, &Options::default()))?;
    let bytes = selftest::input(DType::F32, 4, 64);
    let x = ctx.upload(DType::F32, 4, 64, &bytes)?;
    let mut packed = ctx.zeros_mx(MXFP4, Axis::One, 4, 64)?;
    let Some((device, _)) = ctx.wgpu() else { return Err("not a GPU".into()) };
    device.destroy();
    // The loss is told by a callback, which runs when the device is next polled.
    let _ = device.poll(wgpu::PollType::Poll);
    let errors = [
        ctx.zeros(DType::F32, 4, 4).map(|_| ()),
        ctx.upload(DType::F32, 4, 64, &bytes).map(|_| ()),
        Quantize::new(&ctx, &QuantizeDesc::default())?.record(&mut ctx.stream(), &x, &mut packed),
        ctx.read_blocking(&x).map(|_| ()),
        ctx.submit(ctx.stream()),
        ctx.wait_blocking(),
    ];
    for (i, result) in errors.into_iter().enumerate() {
        assert!(matches!(result, Err(Error::DeviceLost(_))), "call {i}: {result:?}");
    }
    Ok(())
}

fn minimal_limits(adapter: &wgpu::Adapter) -> Result<(), Failed> {
    let (device, queue) = open(adapter)?;
    let ctx = Context::from_wgpu(device, queue, adapter);
    let (rows, cols) = (130, 96);
    let bytes = selftest::input(DType::F32, rows, cols);
    let rounding = Rounding::Stochastic { seed: 1, stream: 1 };
    for (spec, axis) in
        [(MXFP4, Axis::One), (MXFP4, Axis::Zero), (NVFP4.with_block(Block::Square(32)), Axis::One)]
    {
        let desc = QuantizeDesc { spec, axis, rounding, ..Default::default() };
        let x = ctx.upload(DType::F32, rows, cols, &bytes)?;
        let mut packed = ctx.zeros_mx(spec, axis, rows, cols)?;
        let mut stream = ctx.stream();
        Quantize::new(&ctx, &desc)?.record(&mut stream, &x, &mut packed)?;
        ctx.submit(stream)?;
        let want = MxTensor::quantize(&common::to_f32(DType::F32, &bytes), rows, cols, &desc)?;
        assert_eq!(ctx.read_mx_blocking(&packed)?, want, "{spec} axis {axis}");
    }
    Ok(())
}
