//! The layer kernels of training on every engine (tests/common/engines.rs), against f64 references of the forward passes and
//! their finite differences. Bounds are derived from the data: a sum of n terms is off by at most n · 2^-24 · Σ|terms|; what
//! WGSL allows exp, log, inverseSqrt and division ("Accuracy of expressions") is added where a kernel uses them.

mod common;

use common::engines::{self, Form, PLAIN, Test};
use common::{assert_bytes, gaussian, narrowed, panics, to_f32, words};
use libtest_mimic::{Failed, Trial};
use microscaling::kernels::add::{add, cast};
use microscaling::kernels::cross_entropy::{IGNORED, cross_entropy};
use microscaling::kernels::embedding::{self, EmbeddingGradient, PIECE};
use microscaling::kernels::reduce::Reduce;
use microscaling::kernels::rmsnorm::{MAX_COLS, RmsNorm};
use microscaling::kernels::sort::Sort;
use microscaling::kernels::swiglu;
use microscaling::{Context, DType, Error, Options, Tensor, wgpu};

use DType::{BF16, F16, F32};

const SUITE: &[(&str, Test)] = &[
    ("rmsnorm_forward", rmsnorm_forward),
    ("rmsnorm_backward", rmsnorm_backward),
    ("swiglu_both_ways", swiglu_both_ways),
    ("swiglu_at_its_limits", swiglu_at_its_limits),
    ("embedding_forward", embedding_forward),
    ("embedding_backward", embedding_backward),
    ("sorts", sorts),
    ("cross_entropy_and_its_gradient", cross_entropy_and_its_gradient),
    ("cross_entropy_of_marked_rows", cross_entropy_of_marked_rows),
    ("sums_and_means", sums_and_means),
    ("adds_and_casts", adds_and_casts),
    ("the_same_bits_every_time", the_same_bits_every_time),
    ("mismatches_are_errors", mismatches_are_errors),
];

fn main() {
    let forms = [Form {
        what: PLAIN,
        options: Options::default(),
        steps: [1, 5],
        needs: (wgpu::Features::empty(), ""),
    }];
    let alone = vec![
        Trial::test("a_comparison_that_must_fail_fails", comparison_fails),
        Trial::test("finite_differences_are_gradients", finite_differences),
    ];
    engines::run(|_| SUITE.to_vec(), &forms, alone);
}

// ---- Comparison ----------------------------------------------------------------------------------------------------

/// Half an f32's last place, relative; WGSL's ULP are twice that.
const U: f64 = 1.0 / 16777216.0;
const ULP: f64 = 2.0 * U;
/// What may be flushed to zero.
const TINY: f64 = f32::MIN_POSITIVE as f64;

/// What an output must be, and how far off it may be before it is rounded to its type.
#[derive(Clone, Copy, Debug)]
struct Expected {
    value: f64,
    error: f64,
}

#[track_caller]
fn compare(what: &str, dtype: DType, got: &[f32], want: &[Expected]) {
    assert_eq!(got.len(), want.len(), "{what}: lengths");
    let mut worst = 0f64;
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let rounding = if dtype == BF16 { 1.0 / 256.0 } else { U };
        let error = want.error + rounding * (want.value.abs() + want.error) + TINY;
        let off = (f64::from(*got) - want.value).abs();
        assert!(
            off <= error,
            "{what}: [{i}] is {got:e}, want {:e}, off by {off:e}, allowed {error:e}",
            want.value
        );
        worst = worst.max(off / error);
    }
    // A bound that nothing comes near to does not test anything; no error at all is none too much.
    let near = worst > 1e-5 || worst == 0.0 || want.len() < 8;
    assert!(near, "{what}: the worst error is {worst:e} of its bound");
}

/// The derivative of `f` where its argument is `x`: central differences of two steps, so that f's fifth derivative is what is
/// left out.
fn derivative(x: f64, mut f: impl FnMut(f64) -> f64) -> f64 {
    let h = 1e-3 * x.abs().max(1.0);
    let mut central = |h: f64| (f(x + h) - f(x - h)) / (2.0 * h);
    (4.0 * central(h / 2.0) - central(h)) / 3.0
}

/// What `derivative` may be off by, where values and derivatives are of this size.
fn differences(size: f64) -> f64 {
    1e-10 * size
}

// ---- Tensors -------------------------------------------------------------------------------------------------------

/// A tensor, and its values as the kernel sees them.
fn upload(
    ctx: &Context,
    dtype: DType,
    [rows, cols]: [usize; 2],
    values: &[f32],
) -> Result<(Tensor, Vec<f32>), Error> {
    let bytes = narrowed(dtype, values);
    Ok((ctx.upload(dtype, rows, cols, &bytes)?, to_f32(dtype, &bytes)))
}

fn random(
    ctx: &Context,
    dtype: DType,
    shape: [usize; 2],
    seed: u64,
) -> Result<(Tensor, Vec<f32>), Error> {
    upload(ctx, dtype, shape, &gaussian(seed, shape[0] * shape[1]))
}

/// An output: NaN all over.
fn nans(ctx: &Context, dtype: DType, [rows, cols]: [usize; 2]) -> Result<Tensor, Error> {
    ctx.upload(dtype, rows, cols, &narrowed(dtype, &vec![f32::NAN; rows * cols]))
}

fn read(ctx: &Context, x: &Tensor) -> Result<Vec<f32>, Error> {
    Ok(to_f32(x.dtype(), &ctx.read_blocking(x)?))
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(*x)).collect()
}

/// Every combination of f32 and bf16.
fn types<const N: usize>() -> impl Iterator<Item = [DType; N]> {
    (0..1usize << N).map(|bits| std::array::from_fn(|i| [F32, BF16][bits >> i & 1]))
}

// ---- RMSNorm -------------------------------------------------------------------------------------------------------

const EPS: f32 = 1e-5;

/// Rows of each way that invocations share them, ragged, and one of a single quad.
const NORMS: [[usize; 2]; 6] = [[37, 132], [1, 4], [9, 640], [5, 644], [3, 1500], [2, 2564]];

fn norm(x: &[f64], gain: &[f64]) -> Vec<f64> {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    let r = 1.0 / (mean + f64::from(EPS)).sqrt();
    x.iter().zip(gain).map(|(x, gain)| x * r * gain).collect()
}

fn rmsnorm_forward(ctx: &Context, step: usize) -> Result<(), Failed> {
    for (i, [x_type, branch_type, sum_type, y_type]) in types().enumerate().step_by(step) {
        let [rows, cols] = NORMS[i % 6];
        let branched = i % 4 != 3;
        let what = format!("{x_type} {branch_type} {sum_type} {y_type} {rows}x{cols} {branched}");
        // Every third row so small that eps matters, the first one too where it is alone.
        let small = |seed| -> Vec<f32> {
            let by = |i: usize| if (i / cols).is_multiple_of(3) { 1.0 / 256.0 } else { 1.0 };
            gaussian(seed, rows * cols).iter().enumerate().map(|(i, x)| x * by(i)).collect()
        };
        let (x, xs) = upload(ctx, x_type, [rows, cols], &small(1))?;
        let (branch, branches) = upload(ctx, branch_type, [rows, cols], &small(2))?;
        let (gain, gains) = random(ctx, F32, [1, cols], 3)?;
        let mut sum = nans(ctx, sum_type, [rows, cols])?;
        let mut y = nans(ctx, y_type, [rows, cols])?;
        let mut rstd = nans(ctx, F32, [rows, 1])?;
        let kernel = RmsNorm::new(ctx, rows, cols, EPS)?;
        let mut stream = ctx.stream();
        let pair = branched.then_some((&branch, &mut sum));
        kernel.forward(&mut stream, &x, pair, &gain, &mut y, &mut rstd)?;
        ctx.submit(stream)?;
        // What is normed is the sum as it is kept, exactly.
        let normed = if branched {
            let sums: Vec<f32> = xs.iter().zip(&branches).map(|(a, b)| a + b).collect();
            let want = narrowed(sum_type, &sums);
            assert_bytes(&format!("sum {what}"), &ctx.read_blocking(&sum)?, &want);
            to_f32(sum_type, &want)
        } else {
            xs
        };
        let (gains, mut ys, mut rs) = (wide(&gains), Vec::new(), Vec::new());
        // The sum of squares and the mean are off by a unit a term and some, its root by half of that, inverseSqrt by 2 ULP.
        let relative = (cols as f64 + 6.0) / 2.0 * U + 2.0 * ULP;
        for row in wide(&normed).chunks(cols) {
            let mean = row.iter().map(|x| x * x).sum::<f64>() / cols as f64;
            let r = 1.0 / (mean + f64::from(EPS)).sqrt();
            rs.push(Expected { value: r, error: r * relative });
            ys.extend(
                norm(row, &gains)
                    .into_iter()
                    .map(|value| Expected { value, error: value.abs() * (relative + 3.0 * U) }),
            );
        }
        compare(&format!("rstd {what}"), F32, &read(ctx, &rstd)?, &rs);
        compare(&format!("y {what}"), y_type, &read(ctx, &y)?, &ys);
    }
    Ok(())
}

/// The loss whose gradients are dx and dgain is Σ dy · norm(x) + Σ dres · x.
fn rmsnorm_backward(ctx: &Context, step: usize) -> Result<(), Failed> {
    let types = types().chain(types());
    let mut cases: Vec<_> = types.zip(NORMS.into_iter().cycle()).step_by(step).collect();
    // Rows for more than one round of a workgroup's slots.
    cases.push(([F32, BF16, F32], [4200, 8]));
    for (i, ([x_type, dy_type, dx_type], [rows, cols])) in cases.into_iter().enumerate() {
        let (with_dres, accumulate) = (i % 4 != 3, i % 3 == 1);
        let what = format!("{x_type} {dy_type} {dx_type} {rows}x{cols} {i}");
        let (x, xs) = random(ctx, x_type, [rows, cols], 4)?;
        let (gain, gains) = random(ctx, F32, [1, cols], 5)?;
        let (dy, dys) = random(ctx, dy_type, [rows, cols], 6)?;
        let (mut dx, dress) = random(ctx, dx_type, [rows, cols], 7)?;
        let mut dress = wide(&dress);
        if !with_dres {
            dx = nans(ctx, dx_type, [rows, cols])?;
            dress.fill(0.0);
        }
        let (mut dgain, before) = random(ctx, F32, [1, cols], 8)?;
        let (xs, gains, dys) = (wide(&xs), wide(&gains), wide(&dys));
        // rstd as the forward pass would leave it, but in f64's accuracy.
        let rs: Vec<f32> = xs
            .chunks(cols)
            .map(|row| {
                let mean = row.iter().map(|x| x * x).sum::<f64>() / cols as f64;
                (1.0 / (mean + f64::from(EPS)).sqrt()) as f32
            })
            .collect();
        let (rstd, _) = upload(ctx, F32, [rows, 1], &rs)?;
        let mut kernel = RmsNorm::new(ctx, rows, cols, EPS)?;
        let mut stream = ctx.stream();
        kernel.backward(
            &mut stream,
            &x,
            &gain,
            &rstd,
            &dy,
            with_dres,
            &mut dx,
            &mut dgain,
            accumulate,
        )?;
        ctx.submit(stream)?;

        let mut dxs = Vec::new();
        let mut dgains: Vec<Expected> = before
            .iter()
            .map(|b| Expected { value: if accumulate { f64::from(*b) } else { 0.0 }, error: 0.0 })
            .collect();
        // A long row's differences cost its length squared: test some of its elements.
        let stride = (rows * cols * cols / 2_000_000).max(1);
        let got = read(ctx, &dx)?;
        let mut tested = Vec::new();
        for t in 0..rows {
            let row = t * cols..(t + 1) * cols;
            let (dy, dres, r) = (&dys[row.clone()], &dress[row.clone()], f64::from(rs[t]));
            let mut x = xs[row.clone()].to_vec();
            let products: Vec<f64> = (0..cols).map(|i| dy[i] * gains[i] * x[i] * r).collect();
            let size = products.iter().map(|p| p.abs()).sum::<f64>() / cols as f64;
            for i in 0..cols {
                let n = x[i] * r;
                // Rows of a workgroup one after the other, then the parts of at most 512 workgroups.
                dgains[i].value += dy[i] * n;
                dgains[i].error += (rows.min(600) as f64 + 6.0) * U * (dy[i] * n).abs();
                if (t * cols + i) % stride != 0 {
                    continue;
                }
                let at = x[i];
                let value = derivative(at, |moved| {
                    x[i] = moved;
                    let y = norm(&x, &gains);
                    (0..cols).map(|j| y[j] * dy[j] + x[j] * dres[j]).sum()
                });
                x[i] = at;
                // r (w − n mean(w n)) + dres: the mean is a sum of `cols` products of a few factors; rstd itself was rounded.
                let w = (dy[i] * gains[i]).abs();
                let error = r * (8.0 * U * w + (cols as f64 + 12.0) * U * n.abs() * size)
                    + 2.0 * U * dres[i].abs()
                    + differences(size * cols as f64 + r * w + dres[i].abs());
                dxs.push(Expected { value, error });
                tested.push(got[t * cols + i]);
            }
        }
        compare(&format!("dx {what}"), dx_type, &tested, &dxs);
        for (dgain, b) in dgains.iter_mut().zip(&before) {
            dgain.error += U * f64::from(b.abs());
        }
        compare(&format!("dgain {what}"), F32, &read(ctx, &dgain)?, &dgains);
    }
    Ok(())
}

// ---- SwiGLU --------------------------------------------------------------------------------------------------------

fn silu(g: f64) -> f64 {
    g / (1.0 + (-g).exp())
}

/// exp(−|g|) is off by 3 + 2|g| ULP, the quotient by 2.5; some products.
fn sigmoid_error(g: f64) -> f64 {
    (3.0 + 2.0 * g.abs() + 2.5 + 4.0) * ULP
}

fn swiglu_both_ways(ctx: &Context, step: usize) -> Result<(), Failed> {
    let shapes = [[5, 12], [33, 68], [1, 4], [7, 1024]];
    let types = [[F32, F32], [BF16, BF16], [F32, BF16], [BF16, F32]];
    for (i, [gu_type, h_type]) in types.into_iter().enumerate().step_by(step) {
        let [rows, cols] = shapes[i % 4];
        let what = format!("{gu_type} {h_type} {rows}x{cols}");
        let mut values = gaussian(11, rows * 2 * cols);
        values.iter_mut().step_by(3).for_each(|g| *g *= 8.0);
        let (mut gu, gus) = upload(ctx, gu_type, [rows, 2 * cols], &values)?;
        let (dh, dhs) = random(ctx, h_type, [rows, cols], 12)?;
        let mut h = nans(ctx, h_type, [rows, cols])?;
        let mut stream = ctx.stream();
        swiglu::forward(&mut stream, &gu, &mut h)?;
        swiglu::backward(&mut stream, &mut gu, &dh)?;
        ctx.submit(stream)?;
        let (gus, dhs) = (wide(&gus), wide(&dhs));
        let (mut hs, mut dgus) = (Vec::new(), Vec::new());
        for (gu, dh) in gus.chunks(2 * cols).zip(dhs.chunks(cols)) {
            let (g, u) = gu.split_at(cols);
            hs.extend(g.iter().zip(u).map(|(g, u)| {
                let value = silu(*g) * u;
                Expected { value, error: value.abs() * sigmoid_error(*g) + TINY * u.abs() }
            }));
            for ((g, u), dh) in g.iter().zip(u).zip(dh) {
                let value = derivative(*g, |g| silu(g) * u * dh);
                let sigmoid = 1.0 / (1.0 + (-g).exp());
                let size = (dh * u).abs() * sigmoid * (1.0 + g.abs() * (1.0 - sigmoid));
                let error = 2.0 * sigmoid_error(*g) * size + differences((dh * u).abs());
                dgus.push(Expected { value, error });
            }
            for (g, dh) in g.iter().zip(dh) {
                let value = silu(*g) * dh;
                let error = value.abs() * sigmoid_error(*g) + TINY * dh.abs();
                dgus.push(Expected { value, error });
            }
        }
        compare(&format!("h {what}"), h_type, &read(ctx, &h)?, &hs);
        compare(&format!("dgu {what}"), gu_type, &read(ctx, &gu)?, &dgus);
    }
    Ok(())
}

fn swiglu_at_its_limits(ctx: &Context, _: usize) -> Result<(), Failed> {
    let large = [89.0, 104.0, 127.0, 128.0, 129.0, 1e4, 3e38, f32::INFINITY];
    let (u, d) = (0.75f32, 0.5f32);
    let mut row: Vec<f32> = large.into_iter().flat_map(|g| [g, -g]).collect();
    row.extend([u; 16]);
    let (mut gu, _) = upload(ctx, F32, [1, 32], &row)?;
    let (dh, _) = upload(ctx, F32, [1, 16], &[d; 16])?;
    let mut h = nans(ctx, F32, [1, 16])?;
    let mut stream = ctx.stream();
    swiglu::forward(&mut stream, &gu, &mut h)?;
    swiglu::backward(&mut stream, &mut gu, &dh)?;
    ctx.submit(stream)?;
    let (h, dgu) = (read(ctx, &h)?, read(ctx, &gu)?);
    for (i, g) in large.into_iter().enumerate() {
        let near = |what: &str, got: f32, want: f32| {
            // Where σ is 1 up to an exponential below f32's last place.
            let close = (got - want).abs() <= want.abs() * 4.0 * ULP as f32;
            assert!(got == want || close, "{what} at {g}: {got}, want {want}");
        };
        near("h", h[2 * i], g * u);
        near("dg", dgu[2 * i], d * u);
        near("du", dgu[16 + 2 * i], d * g);
        let zeros = [h[2 * i + 1], dgu[2 * i + 1], dgu[16 + 2 * i + 1]];
        assert!(zeros.iter().all(|z| z.abs() < 1e-35), "at -{g}: {zeros:?}");
        assert!(g < 105.0 || zeros == [0.0; 3], "at -{g}: {zeros:?}");
    }
    // What is not a number stays so.
    let (gu, _) = upload(ctx, F32, [1, 8], &[f32::NAN, 1.0, 1.0, 1.0, 1.0, f32::NAN, 1.0, 1.0])?;
    let mut h = nans(ctx, F32, [1, 4])?;
    let mut stream = ctx.stream();
    swiglu::forward(&mut stream, &gu, &mut h)?;
    ctx.submit(stream)?;
    let h = read(ctx, &h)?;
    assert_eq!(h.iter().map(|h| h.is_nan()).collect::<Vec<_>>(), [true, true, false, false]);
    Ok(())
}

// ---- Embedding -----------------------------------------------------------------------------------------------------

fn embedding_forward(ctx: &Context, _: usize) -> Result<(), Failed> {
    for [table_type, x_type] in types() {
        let ([vocabulary, cols], rows) = ([260, 20], 301);
        let (table, values) = random(ctx, table_type, [vocabulary, cols], 21)?;
        let mut tokens: Vec<u32> = words(22, rows).iter().map(|w| w % vocabulary as u32).collect();
        tokens[7] = vocabulary as u32;
        tokens[300] = u32::MAX;
        let mut x = nans(ctx, x_type, [rows, cols])?;
        let mut stream = ctx.stream();
        embedding::forward(&mut stream, &ctx.upload_ids(&tokens)?, &table, &mut x)?;
        ctx.submit(stream)?;
        let want: Vec<f32> = tokens
            .iter()
            .flat_map(|token| match values.chunks(cols).nth(*token as usize) {
                Some(row) => row.to_vec(),
                None => vec![f32::NAN; cols],
            })
            .collect();
        let got = ctx.read_blocking(&x)?;
        assert_bytes(&format!("{table_type} {x_type}"), &got, &narrowed(x_type, &want));
    }
    Ok(())
}

/// Tokens as a text has them: some far more often than others, the last ones never; a few out of range.
fn text(seed: u64, len: usize, vocabulary: usize) -> Vec<u32> {
    words(seed, len)
        .iter()
        .map(|w| {
            let u = f64::from(*w) / 4294967296.0;
            let token = (u * u * u * 0.9 * vocabulary as f64) as u32;
            if w % 97 == 0 { vocabulary as u32 + w % 2 } else { token }
        })
        .collect()
}

fn embedding_backward(ctx: &Context, _: usize) -> Result<(), Failed> {
    // One pass of the sort and two; one token alone, so in many pieces; fewer tokens than the vocabulary.
    for (i, (rows, vocabulary, cols)) in
        [(2500, 256, 20), (1100, 700, 4), (1025, 1, 8), (3, 300, 12)].into_iter().enumerate()
    {
        let dx_type = [F32, BF16][i % 2];
        let tokens = match vocabulary {
            1 => vec![0; rows],
            _ => text(31, rows, vocabulary),
        };
        let (dx, dxs) = random(ctx, dx_type, [rows, cols], 32)?;
        let ids = ctx.upload_ids(&tokens)?;
        let mut kernel = EmbeddingGradient::new(ctx, rows + 100, vocabulary, cols)?;
        let (mut added, before) = random(ctx, F32, [vocabulary, cols], 33)?;
        let mut written = nans(ctx, F32, [vocabulary, cols])?;
        let mut stream = ctx.stream();
        kernel.record(&mut stream, &ids, &dx, &mut written, false)?;
        kernel.record(&mut stream, &ids, &dx, &mut added, true)?;
        ctx.submit(stream)?;

        // In the order that is documented, hence the same bits; and the sum in f64.
        let mut pieces: Vec<Vec<f32>> = vec![Vec::new(); vocabulary * cols];
        let mut exact = vec![Expected { value: 0.0, error: 0.0 }; vocabulary * cols];
        let mut seen = vec![0; vocabulary];
        for (token, dx) in tokens.iter().zip(dxs.chunks(cols)) {
            let Some(seen) = seen.get_mut(*token as usize) else { continue };
            for (c, dx) in dx.iter().enumerate() {
                let at = *token as usize * cols + c;
                if *seen % PIECE == 0 {
                    pieces[at].push(0.0);
                }
                *pieces[at].last_mut().unwrap() += dx;
                exact[at].value += f64::from(*dx);
                exact[at].error += U * rows as f64 * f64::from(dx.abs());
            }
            *seen += 1;
        }
        let sums: Vec<Option<f32>> =
            pieces.into_iter().map(|p| p.into_iter().reduce(|a, b| a + b)).collect();
        let what = format!("{dx_type} {rows} of {vocabulary}");
        let got = read(ctx, &written)?;
        compare(&what, F32, &got, &exact);
        let want: Vec<f32> = sums.iter().map(|s| s.unwrap_or(0.0)).collect();
        assert_bytes(&what, bytemuck::cast_slice(&got), bytemuck::cast_slice(&want));
        let want: Vec<f32> =
            sums.iter().zip(before).map(|(s, before)| s.map_or(before, |s| before + s)).collect();
        let got = ctx.read_blocking(&added)?;
        assert_bytes(&format!("{what} added"), &got, bytemuck::cast_slice(&want));
    }
    Ok(())
}

fn sorts(ctx: &Context, _: usize) -> Result<(), Failed> {
    // One, two and three passes; one chunk and several, whole and ragged.
    for (len, bound) in
        [(1, 1), (3000, 256), (1024, 257), (2049, 70_000), (1500, 1 << 16), (5, 3), (7, 250)]
    {
        let ids: Vec<u32> = words(41, len).iter().map(|w| w % (bound as u32 + 2)).collect();
        let mut sort = Sort::new(ctx, len + 7, bound)?;
        let mut stream = ctx.stream();
        sort.record(&mut stream, &ctx.upload_ids(&ids)?)?;
        ctx.submit(stream)?;
        let mut want: Vec<u32> =
            (0..len as u32).filter(|i| ids[*i as usize] < bound as u32).collect();
        want.sort_by_key(|i| ids[*i as usize]);
        let order = ctx.read_ids_blocking(sort.order())?;
        let what = format!("{len} below {bound}");
        assert_eq!(order[..want.len()], want, "{what}");
        let starts = ctx.read_ids_blocking(sort.starts())?;
        assert_eq!(starts.len(), bound + 1);
        let sorted: Vec<u32> = want.iter().map(|i| ids[*i as usize]).collect();
        for (id, start) in starts.iter().enumerate().step_by(bound / 1000 + 1) {
            assert_eq!(*start as usize, sorted.partition_point(|s| (*s as usize) < id), "{what}");
        }
        assert_eq!(starts[bound] as usize, want.len(), "{what}");
    }
    Ok(())
}

// ---- Cross entropy -------------------------------------------------------------------------------------------------

fn cross_entropy_reference(logits: &[f64], target: usize) -> f64 {
    let top = logits.iter().copied().fold(f64::MIN, f64::max);
    logits.iter().map(|x| (x - top).exp()).sum::<f64>().ln() - (logits[target] - top)
}

fn cross_entropy_and_its_gradient(ctx: &Context, step: usize) -> Result<(), Failed> {
    let shapes = [[19, 256], [5, 4], [3, 1028], [9, 100], [2, 5000], [1, 1024]];
    for (i, [x_type, d_type]) in types().chain(types()).enumerate().step_by(step) {
        for [rows, cols] in [shapes[i % 6], shapes[(i + 3) % 6]] {
            let what = format!("{x_type} {d_type} {rows}x{cols}");
            let spread = [1.0, 20.0][i / 4];
            let values: Vec<f32> =
                gaussian(51, rows * cols).iter().map(|x| x * spread + 50.0).collect();
            let (logits, xs) = upload(ctx, x_type, [rows, cols], &values)?;
            let targets: Vec<u32> = words(52, rows).iter().map(|w| w % cols as u32).collect();
            let scale = 1024.0 / rows as f32;
            let mut loss = nans(ctx, F32, [rows, 1])?;
            let mut alone = nans(ctx, F32, [rows, 1])?;
            let mut dlogits = nans(ctx, d_type, [rows, cols])?;
            let ids = ctx.upload_ids(&targets)?;
            let mut stream = ctx.stream();
            let gradient = Some((&mut dlogits, scale));
            cross_entropy(&mut stream, &logits, &ids, &mut loss, gradient)?;
            cross_entropy(&mut stream, &logits, &ids, &mut alone, None)?;
            ctx.submit(stream)?;
            let (mut losses, mut ds, mut tested) = (Vec::new(), Vec::new(), Vec::new());
            let got = read(ctx, &dlogits)?;
            for (t, row) in wide(&xs).chunks(cols).enumerate() {
                let target = targets[t] as usize;
                let top = row.iter().copied().fold(f64::MIN, f64::max);
                // A term e^−d: its exponent is rounded, exp is off by 3 + 2d ULP, and it is multiplied by an exponential for
                // each larger maximum that its lane meets, whose exponents come to d at most.
                let rounds = cols as f64 / 128.0 + 3.0;
                let off = |d: f64| (d + 2.0 * (3.0 + 2.0 * d) + 4.0 * rounds) * ULP;
                let terms: Vec<f64> = row.iter().map(|x| (x - top).exp()).collect();
                let sum: f64 = terms.iter().sum();
                let of_sum = terms.iter().map(|e| e * off(-e.max(1e-300).ln())).sum::<f64>() / sum
                    + cols as f64 * U;
                let log = 2f64.powi(-21).max(3.0 * ULP * sum.ln());
                let value = cross_entropy_reference(row, target);
                let depth = top - row[target];
                let error = of_sum + log + U * (2.0 * depth + sum.ln());
                losses.push(Expected { value, error });
                let mut x = row.to_vec();
                for j in (t % 3..cols).step_by(1 + cols / 90) {
                    let at = x[j];
                    let value = derivative(at, |moved| {
                        x[j] = moved;
                        f64::from(scale) * cross_entropy_reference(&x, target)
                    });
                    x[j] = at;
                    let p = terms[j] / sum;
                    let error = p * (off(top - row[j]) + of_sum + 4.0 * ULP)
                        + 2.0 * U * f64::from(u8::from(j == target))
                        + differences(1.0 + cols as f64 / 100.0);
                    ds.push(Expected { value, error: f64::from(scale) * error });
                    tested.push(got[t * cols + j]);
                }
            }
            let loss = read(ctx, &loss)?;
            compare(&format!("loss {what}"), F32, &loss, &losses);
            assert_eq!(loss, read(ctx, &alone)?, "without its gradient");
            compare(&format!("dlogits {what}"), d_type, &tested, &ds);
        }
    }
    Ok(())
}

fn cross_entropy_of_marked_rows(ctx: &Context, _: usize) -> Result<(), Failed> {
    for cols in [36, 1040] {
        let (logits, _) = random(ctx, F32, [5, cols], 53)?;
        let targets = ctx.upload_ids(&[0, IGNORED, cols as u32, cols as u32 - 1, IGNORED - 1])?;
        let mut loss = nans(ctx, F32, [5, 1])?;
        let mut dlogits = nans(ctx, BF16, [5, cols])?;
        let mut stream = ctx.stream();
        cross_entropy(&mut stream, &logits, &targets, &mut loss, Some((&mut dlogits, 1.0)))?;
        ctx.submit(stream)?;
        let (loss, d) = (read(ctx, &loss)?, read(ctx, &dlogits)?);
        assert_eq!(loss[1].to_bits(), 0, "an ignored row's loss");
        assert!(d[cols..2 * cols].iter().all(|d| d.to_bits() == 0), "an ignored row's gradient");
        for row in [2, 4] {
            assert!(loss[row].is_nan(), "a target that is no column: {}", loss[row]);
            assert!(d[row * cols..(row + 1) * cols].iter().all(|d| d.is_nan()));
        }
        assert!(loss[0] > 0.0 && loss[3] > 0.0, "{loss:?}");
        assert!(d[0] < 0.0 && d[4 * cols - 1] < 0.0);
    }
    // Logits of any size, and columns that are masked out.
    let mut row = [0f32; 8];
    row[..5].copy_from_slice(&[3e38, -3e38, f32::NEG_INFINITY, 1.0, 3e38]);
    let (logits, _) = upload(ctx, F32, [1, 8], &row)?;
    let mut loss = nans(ctx, F32, [1, 1])?;
    let mut dlogits = nans(ctx, F32, [1, 8])?;
    let mut stream = ctx.stream();
    let targets = ctx.upload_ids(&[0])?;
    cross_entropy(&mut stream, &logits, &targets, &mut loss, Some((&mut dlogits, 2.0)))?;
    ctx.submit(stream)?;
    let loss = read(ctx, &loss)?[0];
    assert!((f64::from(loss) - 2f64.ln()).abs() <= 4.0 * 2f64.powi(-21), "{loss}");
    let d = read(ctx, &dlogits)?;
    for (d, want) in d.iter().zip([-1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]) {
        assert!((d - want).abs() <= 8.0 * ULP as f32, "{d}, want {want}");
    }
    Ok(())
}

// ---- Sums ----------------------------------------------------------------------------------------------------------

fn sums_and_means(ctx: &Context, _: usize) -> Result<(), Failed> {
    for rows in [1, 255, 4097, 20_000] {
        let (x, mut xs) = random(ctx, F32, [rows, 1], 61)?;
        let mut reduce = Reduce::new(ctx, rows + 5)?;
        let mut outs = Vec::new();
        for _ in 0..4 {
            outs.push(nans(ctx, F32, [1, 1])?);
        }
        let mut stream = ctx.stream();
        reduce.sum(&mut stream, &x, &mut outs[0])?;
        reduce.mean(&mut stream, &x, None, &mut outs[1])?;
        ctx.submit(stream)?;
        assert_eq!(ctx.read_ids_blocking(reduce.count())?, [rows as u32]);
        let check = |what: &str, xs: &[f32], count: usize, out: &Tensor| {
            let sum: f64 = xs.iter().map(|x| f64::from(*x)).sum();
            let size: f64 = xs.iter().map(|x| f64::from(x.abs())).sum();
            // A lane's additions, two trees, and a quotient.
            let depth = rows.div_ceil(256).min(16) as f64 + 8.0 + 8.0 + 32.0;
            let value = sum / count as f64;
            let error = (depth * U * size + 2.5 * ULP * sum.abs()) / count as f64;
            compare(what, F32, &read(ctx, out).unwrap(), &[Expected { value, error }]);
        };
        check("sum", &xs, 1, &outs[0]);
        check("mean", &xs, rows, &outs[1]);

        // Losses, of which every third row's is ignored, and then all.
        let targets: Vec<u32> =
            (0..rows as u32).map(|t| if t % 3 == 0 { IGNORED } else { t }).collect();
        xs.iter_mut().step_by(3).for_each(|x| *x = 0.0);
        let (x, _) = upload(ctx, F32, [rows, 1], &xs)?;
        let mut stream = ctx.stream();
        let ids = ctx.upload_ids(&targets)?;
        reduce.mean(&mut stream, &x, Some(&ids), &mut outs[2])?;
        ctx.submit(stream)?;
        let count = rows - rows.div_ceil(3);
        assert_eq!(ctx.read_ids_blocking(reduce.count())?, [count as u32]);
        check("mean of losses", &xs, count.max(1), &outs[2]);
        let (x, _) = upload(ctx, F32, [rows, 1], &vec![0.0; rows])?;
        let mut stream = ctx.stream();
        let ids = ctx.upload_ids(&vec![IGNORED; rows])?;
        reduce.mean(&mut stream, &x, Some(&ids), &mut outs[3])?;
        ctx.submit(stream)?;
        assert_eq!(read(ctx, &outs[3])?, [0.0], "the mean of nothing");
    }
    Ok(())
}

fn adds_and_casts(ctx: &Context, _: usize) -> Result<(), Failed> {
    for [x_type, y_type] in types() {
        let shape = [41, 132];
        let mut values = gaussian(71, shape[0] * shape[1]);
        values[3] = f32::INFINITY;
        values[5] = -0.0;
        // A tie, to even both ways; what rounds to infinity; NaN, of which nothing but that it is one is promised.
        for (at, bits) in [(6, 0x3f80_8000), (7, 0x3f81_8000), (8, 0x7f7f_ffff), (9, 0xffc0_0001)] {
            values[at] = f32::from_bits(bits);
        }
        let (x, xs) = upload(ctx, x_type, shape, &values)?;
        let (mut y, ys) = random(ctx, y_type, shape, 72)?;
        let mut copy = nans(ctx, y_type, shape)?;
        let mut stream = ctx.stream();
        add(&mut stream, &x, &mut y)?;
        cast(&mut stream, &x, &mut copy)?;
        ctx.submit(stream)?;
        let what = format!("{x_type} {y_type}");
        let sums: Vec<f32> = xs.iter().zip(&ys).map(|(x, y)| x + y).collect();
        for (name, got, want) in [("add", &y, &sums), ("cast", &copy, &xs)] {
            let mut got = read(ctx, got)?;
            assert!(got[9].is_nan(), "{name} {what}");
            got[9] = f32::NAN;
            let mut want = want.clone();
            want[9] = f32::NAN;
            let want = to_f32(y_type, &narrowed(y_type, &want));
            let (got, want) = (narrowed(F32, &got), narrowed(F32, &want));
            // All NaN are one for `narrowed` but f32's.
            assert_bytes(&format!("{name} {what}"), &got, &want);
        }
    }
    Ok(())
}

/// Twice the same in one stream and again in another.
fn the_same_bits_every_time(ctx: &Context, _: usize) -> Result<(), Failed> {
    let (rows, cols) = (700, 36);
    let (x, _) = random(ctx, F32, [rows, cols], 81)?;
    let (dy, _) = random(ctx, BF16, [rows, cols], 82)?;
    let (gain, _) = random(ctx, F32, [1, cols], 83)?;
    let (rstd, _) = random(ctx, F32, [rows, 1], 84)?;
    let targets = ctx.upload_ids(&text(85, rows, cols))?;
    let mut norm = RmsNorm::new(ctx, rows, cols, EPS)?;
    let mut embedding = EmbeddingGradient::new(ctx, rows, cols, cols)?;
    let mut reduce = Reduce::new(ctx, rows)?;
    let mut results: Vec<Vec<Vec<u8>>> = Vec::new();
    for _ in 0..3 {
        let mut dx = nans(ctx, BF16, [rows, cols])?;
        let mut dgain = nans(ctx, F32, [1, cols])?;
        let mut dtable = nans(ctx, F32, [cols, cols])?;
        let mut loss = nans(ctx, F32, [rows, 1])?;
        let mut mean = nans(ctx, F32, [1, 1])?;
        let mut stream = ctx.stream();
        norm.backward(&mut stream, &x, &gain, &rstd, &dy, false, &mut dx, &mut dgain, false)?;
        embedding.record(&mut stream, &targets, &x, &mut dtable, false)?;
        cross_entropy(&mut stream, &x, &targets, &mut loss, None)?;
        reduce.mean(&mut stream, &rstd, None, &mut mean)?;
        ctx.submit(stream)?;
        let all = [&dx, &dgain, &dtable, &loss, &mean];
        results.push(all.into_iter().map(|x| ctx.read_blocking(x)).collect::<Result<_, _>>()?);
    }
    assert!(results.iter().all(|r| *r == results[0]), "other bits");
    Ok(())
}

fn mismatches_are_errors(ctx: &Context, _: usize) -> Result<(), Failed> {
    let mut stream = ctx.stream();
    let act = |rows, cols| ctx.zeros(F32, rows, cols);
    let says = |result: Result<(), Error>, parts: &[&str]| {
        let error = result.unwrap_err();
        assert!(matches!(error, Error::Mismatch { .. }), "{error}");
        let error = error.to_string();
        assert!(parts.iter().all(|part| error.contains(part)), "{error}, expected {parts:?}");
    };
    let (x, gain) = (act(4, 8)?, act(1, 8)?);
    let (mut y, mut rstd) = (act(4, 8)?, act(4, 1)?);
    let mut norm = RmsNorm::new(ctx, 4, 8, EPS)?;
    let result = norm.forward(&mut stream, &act(4, 12)?, None, &gain, &mut y, &mut rstd);
    says(result, &["RmsNorm::forward", "[4, 12]", "8 columns"]);
    let result = norm.forward(&mut stream, &act(5, 8)?, None, &gain, &mut y, &mut rstd);
    says(result, &["[5, 8]", "4 rows"]);
    let result = norm.forward(&mut stream, &x, None, &act(8, 1)?, &mut y, &mut rstd);
    says(result, &["gain", "[8, 1]", "[1, 8]"]);
    let mut half = ctx.zeros(F16, 4, 8)?;
    let result = norm.forward(&mut stream, &x, None, &gain, &mut half, &mut rstd);
    says(result, &["y is f16", "f32 or bf16"]);
    let (mut dx, mut dgain) = (act(4, 4)?, act(1, 8)?);
    let result = norm.backward(&mut stream, &x, &gain, &rstd, &x, true, &mut dx, &mut dgain, false);
    says(result, &["RmsNorm::backward", "dx", "[4, 4]", "[4, 8]"]);
    says(RmsNorm::new(ctx, 4, 6, EPS).map(|_| ()), &["6 columns"]);
    says(RmsNorm::new(ctx, 4, MAX_COLS + 4, EPS).map(|_| ()), &["5124 columns", "5120"]);

    says(swiglu::forward(&mut stream, &act(4, 12)?, &mut act(4, 6)?), &["[4, 12]", "two times"]);
    says(swiglu::forward(&mut stream, &act(4, 16)?, &mut act(4, 16)?), &["h", "[4, 8]"]);
    let result = swiglu::backward(&mut stream, &mut act(4, 16)?, &act(4, 16)?);
    says(result, &["dh", "[4, 8]", "[4, 16]"]);

    let ids = ctx.upload_ids(&[1, 2, 3])?;
    let result = embedding::forward(&mut stream, &ids, &act(4, 8)?, &mut act(4, 8)?);
    says(result, &["embedding::forward", "[4, 8]", "[3, 8]"]);
    let mut gradient = EmbeddingGradient::new(ctx, 3, 4, 8)?;
    let result = gradient.record(&mut stream, &ids, &act(4, 8)?, &mut act(4, 8)?, false);
    says(result, &["3 tokens", "4 rows"]);
    let result = gradient.record(&mut stream, &ids, &act(3, 8)?, &mut act(5, 8)?, false);
    says(result, &["dtable", "[5, 8]", "[4, 8]"]);
    let four = ctx.upload_ids(&[0; 4])?;
    let result = gradient.record(&mut stream, &four, &act(4, 8)?, &mut act(4, 8)?, false);
    says(result, &["4 ids", "1 to 3"]);

    let mut loss = act(3, 1)?;
    let result = cross_entropy(&mut stream, &act(3, 6)?, &ids, &mut loss, None);
    says(result, &["[3, 6]", "four columns"]);
    let result = cross_entropy(&mut stream, &act(4, 8)?, &ids, &mut loss, None);
    says(result, &["3 targets", "4 rows"]);
    let result =
        cross_entropy(&mut stream, &act(3, 8)?, &ids, &mut loss, Some((&mut act(3, 4)?, 1.0)));
    says(result, &["dlogits", "[3, 4]", "[3, 8]"]);
    let result = Reduce::new(ctx, 3)?.sum(&mut stream, &act(4, 1)?, &mut act(1, 1)?);
    says(result, &["Reduce::sum", "4 rows", "1 to 3"]);
    says(add(&mut stream, &act(2, 8)?, &mut act(2, 12)?), &["add", "[2, 8]", "[2, 12]"]);
    if ctx.wgpu().is_some() {
        let elsewhere = Context::cpu().zeros(F32, 2, 8)?;
        says(cast(&mut stream, &elsewhere, &mut act(2, 8)?), &["CPU engine"]);
    }
    Ok(())
}

// ---- The tests' own ------------------------------------------------------------------------------------------------

fn comparison_fails() -> Result<(), Failed> {
    let ctx = Context::cpu();
    let (rows, cols) = (6, 68);
    let (gu, gus) = random(&ctx, F32, [rows, 2 * cols], 91)?;
    let mut h = nans(&ctx, F32, [rows, cols])?;
    swiglu::forward(&mut ctx.stream(), &gu, &mut h)?;
    let want: Vec<Expected> = wide(&gus)
        .chunks(2 * cols)
        .flat_map(|gu| (0..cols).map(|i| (gu[i], gu[cols + i])).collect::<Vec<_>>())
        .map(|(g, u)| {
            let value = silu(g) * u;
            Expected { value, error: value.abs() * sigmoid_error(g) }
        })
        .collect();
    let mut got = read(&ctx, &h)?;
    compare("sound", F32, &got, &want);
    got[100] *= 1.0 + 1e-5;
    assert!(panics(|| compare("", F32, &got, &want)), "1e-5 passes");
    got[100] = f32::NAN;
    assert!(panics(|| compare("", F32, &got, &want)), "NaN passes");
    Ok(())
}

fn finite_differences() -> Result<(), Failed> {
    for x in [-9.0, -1.3, 0.0, 0.2, 7.0] {
        let s = 1.0 / (1.0 + f64::exp(-x));
        let got = derivative(x, silu);
        assert!((got - s * (1.0 + x * (1.0 - s))).abs() < differences(1.0), "{x}: {got}");
    }
    Ok(())
}
