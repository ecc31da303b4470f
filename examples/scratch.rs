use microscaling::*;
use std::time::Instant;
fn main() -> Result<(), Box<dyn std::error::Error>> {
    let device = std::env::args().nth(1).unwrap_or("gpu".into());
    let ctx = Context::open_blocking(&Options { device: device.parse()?, ..Default::default() })?;
    println!("{}", ctx.caps().name);
    let scale: f64 = std::env::args().nth(2).map_or(1.0, |s| s.parse().unwrap());
    let shapes = [
        [512, 512, 512],
        [1024, 1024, 1024],
        [2048, 2048, 2048],
        [4096, 4096, 4096],
        [8192, 8192, 8192],
        [16384, 16384, 16384],
        [512, 4096, 14336],
        [64, 4096, 14336],
        [2048, 2880, 2880],
        [32768, 640, 640],
        [32768, 1792, 640],
        [32768, 640, 1792],
        [640, 640, 32768],
        [1792, 640, 32768],
    ];
    for [m, n, k] in shapes {
        let [m, n, k] = [m, n, k]
            .map(|s: usize| (((s as f64 * scale) as usize).next_multiple_of(128)).max(128));
        let make = |rows: usize, seed: u64| -> Result<DeviceMxTensor, Box<dyn std::error::Error>> {
            // Normal values.
            let mut state = seed;
            let mut next = || {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                ((state >> 40) as f64 + 0.5) / (1u64 << 24) as f64
            };
            let period = 1 << 20;
            let base: Vec<f32> = (0..period)
                .map(|_| {
                    let (a, b) = (next(), next());
                    ((-2.0 * a.ln()).sqrt() * (6.283185307 * b).cos()) as f32
                })
                .collect();
            let spec = MXFP4;
            let layout = Layout::new(spec, Axis::One, rows, k)?;
            let x: Vec<f32> =
                base.iter().cycle().take((rows * k).min(base.len())).copied().collect();
            // Quantize a part and repeat it.
            let part = Layout::new(spec, Axis::One, (x.len() / k).max(1).min(rows), k)?;
            let r = part.lines();
            let mut stream = ctx.stream();
            let t = ctx.upload(DType::F32, r, k, bytemuck::cast_slice(&x[..r * k]))?;
            let q = Quantize::new(&ctx, &QuantizeDesc::default())?;
            let mut y = ctx.upload_mx(&MxTensor::from_parts(
                part,
                vec![0; part.codes_len()],
                vec![127; part.scales_len()],
                1.0,
            )?)?;
            q.record(&mut stream, &t, &mut y)?;
            ctx.submit(stream)?;
            let y = ctx.read_mx_blocking(&y)?;
            let codes: Vec<u8> =
                y.codes().iter().cycle().take(layout.codes_len()).copied().collect();
            let scales: Vec<u8> =
                y.scales().iter().cycle().take(layout.scales_len()).copied().collect();
            Ok(ctx.upload_mx(&MxTensor::from_parts(layout, codes, scales, 1.0)?)?)
        };
        let (a, b) = (make(m, 1)?, make(n, 2)?);
        let mut y = ctx.zeros(DType::F32, m, n)?;
        let desc = MatmulDesc { m, n, k, tier: Tier::Tensor, ..Default::default() };
        let base = Matmul::new(&ctx, &desc)?;
        if (m, n) == (8192, 8192) {
            println!("{}", base.why());
        }
        let mut line = format!("{m}x{n}x{k} {:?}", base.tile(&ctx));
        let mut outs = vec![];
        for (name, mm) in [
            ("bytes", base.clone()),
            ("alone", base.clone().bytes_alone()),
            ("f16", base.clone().without_bytes()),
        ] {
            let run = |count: usize, y: &mut Tensor| -> Result<f64, Box<dyn std::error::Error>> {
                let mut stream = ctx.stream();
                for _ in 0..count {
                    mm.record(&mut stream, &a, &b, &mut *y)?;
                }
                let t = Instant::now();
                ctx.submit(stream)?;
                let one = ctx.zeros(DType::F32, 1, 4)?;
                ctx.read_blocking(&one)?;
                Ok(t.elapsed().as_secs_f64())
            };
            run(1, &mut y)?;
            let once = run(1, &mut y)?;
            let count = ((0.25 / once) as usize).clamp(1, 400);
            run(count, &mut y)?;
            let t =
                (0..3).map(|_| run(count, &mut y).unwrap() / count as f64).fold(f64::MAX, f64::min);
            line += &format!(
                "  {name} {:.4} ms {:.0} TF",
                t * 1e3,
                2.0 * (m * n * k) as f64 / t / 1e12
            );
            if m * n <= 1 << 26 {
                outs.push(ctx.read_blocking(&y)?);
            }
        }
        if outs.len() == 3 {
            let diff =
                |a: &[u8], b: &[u8]| a.chunks(4).zip(b.chunks(4)).filter(|(a, b)| a != b).count();
            line += &format!(
                "  differ {} alone {}",
                diff(&outs[0], &outs[2]),
                diff(&outs[1], &outs[2])
            );
        }
        println!("{line}");
    }
    Ok(())
}
