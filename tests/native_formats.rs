//! What native routes do to operands on the host: orders of scales against torchao and the published formulas, MXFP4 as NVFP4
//! against exact arithmetic.
#![cfg(not(target_arch = "wasm32"))]

mod common;

use common::{assert_bytes, golden, reference::magnitudes, words};
use microscaling::native::ScaleLayout;
use microscaling::native::rescale::{EXPONENTS, alpha, exponents, rescale, ue4m3_power};
use microscaling::{
    Axis, Context, DType, DeviceChoice, Element, Error, Layout, MXFP4, MXFP8_E4M3, Matmul,
    MatmulDesc, MxTensor, NVFP4, Options, Tier,
};
use safetensors::SafeTensors;

// ---- Orders of scales ------------------------------------------------------------------------------------------------

#[test]
fn scales_lie_as_torchao_and_amd_have_them() {
    let bytes = golden("layouts.safetensors");
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut shapes = 0;
    for name in file.names().into_iter().filter(|name| name.ends_with(".rows")) {
        let rows = file.tensor(name).unwrap();
        let shape = [rows.shape()[0], rows.shape()[1]];
        let base = name.trim_end_matches("rows");
        for (layout, order) in
            [(ScaleLayout::Tiles128x4, "128x4"), (ScaleLayout::Tiles32x8, "32x8")]
        {
            let want = file.tensor(&format!("{base}{order}")).unwrap();
            let got = layout.arrange(rows.data(), shape).unwrap();
            assert_bytes(&format!("{base}{order}"), &got, want.data());
            assert_eq!(got.len(), layout.bytes(shape));
            assert_bytes(name, &layout.restore(&got, shape).unwrap(), rows.data());
        }
        assert_eq!(ScaleLayout::Rows.arrange(rows.data(), shape).unwrap(), rows.data());
        shapes += 1;
    }
    assert_eq!(shapes, 7);
}

/// The formulas as published, with the tile's number and the place in it apart.
#[test]
fn offsets_are_the_published_formulas_and_a_permutation() {
    for [lines, groups] in [[128, 4], [32, 8], [300, 13], [1, 1], [129, 33]] {
        for layout in ScaleLayout::ALL {
            let [padded_lines, padded_groups] = layout.padded([lines, groups]);
            let mut seen = vec![false; padded_lines * padded_groups];
            for r in 0..padded_lines {
                for c in 0..padded_groups {
                    let want = match layout {
                        ScaleLayout::Rows => r * groups + c,
                        ScaleLayout::Tiles128x4 => {
                            ((r / 128) * groups.div_ceil(4) + c / 4) * 512
                                + (r % 32) * 16
                                + ((r % 128) / 32) * 4
                                + c % 4
                        }
                        ScaleLayout::Tiles32x8 => {
                            ((r / 32) * groups.div_ceil(8) + c / 8) * 256
                                + (c % 4) * 64
                                + (r % 16) * 4
                                + ((c % 8) / 4) * 2
                                + (r % 32) / 16
                        }
                    };
                    let at = layout.offset(groups, r, c);
                    assert_eq!(at, want, "{layout:?} {r} {c}");
                    assert!(!std::mem::replace(&mut seen[at], true), "{layout:?}: {at} twice");
                }
            }
        }
    }
}

#[test]
fn scales_of_another_length_are_refused() {
    for layout in ScaleLayout::ALL {
        assert!(matches!(layout.arrange(&[0; 7], [2, 4]), Err(Error::Mismatch { .. })));
        assert!(matches!(layout.restore(&[0; 7], [2, 4]), Err(Error::Mismatch { .. })));
        assert_eq!(layout.arrange(&[], [0, 5]).unwrap(), [0; 0]);
        assert_eq!(layout.arrange(&[], [5, 0]).unwrap(), [0; 0]);
    }
}

// ---- MXFP4 as NVFP4 --------------------------------------------------------------------------------------------------

/// All bytes of UE4M3, from the tables of tests/common/reference.rs.
#[test]
fn ue4m3_has_eighteen_powers_of_two() {
    let table = magnitudes(Element::E4M3);
    let mut powers = 0;
    for exponent in -140..=140 {
        let value = 2f64.powi(exponent);
        let byte = table.iter().position(|v| *v == value);
        assert_eq!(ue4m3_power(exponent).map(usize::from), byte, "2^{exponent}");
        assert_eq!(byte.is_some(), EXPONENTS.contains(&exponent));
        powers += usize::from(byte.is_some());
    }
    assert_eq!((powers, EXPONENTS), (18, -9..=8));
}

/// Random codes, zeros rare, under the scales given.
fn tensor(seed: u64, rows: usize, cols: usize, scale: impl Fn(usize) -> u8) -> MxTensor {
    let layout = Layout::new(MXFP4, Axis::One, rows, cols).unwrap();
    let codes: Vec<u8> =
        words(seed, layout.codes_len() / 4).into_iter().flat_map(u32::to_le_bytes).collect();
    let scales = (0..layout.scales_len()).map(scale).collect();
    MxTensor::from_parts(layout, codes, scales, 1.0).unwrap()
}

#[track_caller]
fn same_values(a: &MxTensor, b: &MxTensor) {
    let Layout { rows, cols, .. } = *a.layout();
    assert_eq!((b.layout().rows, b.layout().cols), (rows, cols));
    for row in 0..rows {
        for col in 0..cols {
            let [x, y] = [a, b].map(|t| t.get(row, col).to_bits());
            assert_eq!(x, y, "({row}, {col})");
        }
    }
}

fn has(result: Result<MxTensor, Error>) -> String {
    match result {
        Err(Error::Unsupported { has, .. }) => has,
        other => panic!("{other:?}"),
    }
}

/// Every span and every place of it on the whole range of scales.
#[test]
fn a_span_of_17_is_exact_and_one_of_18_refused() {
    for least in 0..=254u8 {
        for span in [0, 1, 9, 16, 17, 18, 19, 40] {
            let Some(most) = least.checked_add(span).filter(|most| *most < 255) else { continue };
            let x = tensor(u64::from(least), 2, 96, |i| [least, most, least + span / 2][i % 3]);
            assert_eq!(
                exponents(&x).unwrap(),
                Some([i32::from(least) - 127, i32::from(most) - 127])
            );
            if span > 17 {
                let text = has(rescale(&x));
                assert!(text.contains(&format!("span {span}")), "{text}");
                continue;
            }
            let y = rescale(&x).unwrap();
            assert_eq!(y.layout().spec, NVFP4);
            // f32 itself cannot hold the smallest values; those are compared as factors.
            if least >= 2 {
                same_values(&x, &y);
            }
            let table = magnitudes(Element::E4M3);
            for (i, scale) in x.scales().iter().enumerate() {
                for half in 0..2 {
                    let byte = y.scales()[2 * i + half];
                    let value = table[usize::from(byte)] * f64::from(y.tensor_scale());
                    assert_eq!(value, 2f64.powi(i32::from(*scale) - 127), "block {i}");
                }
            }
        }
    }
}

#[test]
fn ragged_lines_lose_their_padding() {
    for cols in [1, 15, 16, 17, 31, 32, 33, 47, 48, 49, 100] {
        let x = tensor(cols as u64, 5, cols, |i| 120 + (i % 15) as u8);
        same_values(&x, &rescale(&x).unwrap());
    }
    for shape in [[0, 40], [40, 0]] {
        let x = tensor(1, shape[0], shape[1], |_| 127);
        assert_eq!(rescale(&x).unwrap().tensor_scale(), 1.0);
    }
    // Along the other axis too.
    let layout = Layout::new(MXFP4, Axis::Zero, 70, 3).unwrap();
    let codes = (0..layout.codes_len()).map(|i| (i * 37) as u8).collect();
    let scales = (0..layout.scales_len()).map(|i| 125 + (i % 4) as u8).collect();
    let x = MxTensor::from_parts(layout, codes, scales, 1.0).unwrap();
    same_values(&x, &rescale(&x).unwrap());
}

#[test]
fn blocks_of_zeros_may_have_any_scale() {
    for byte in 0..=254 {
        let x = tensor(3, 2, 96, |i| if i % 3 == 1 { byte } else { 130 });
        let (mut codes, scales, _) = x.into_parts();
        for line in codes.chunks_exact_mut(48) {
            // Zeros of both signs.
            line[16..32].copy_from_slice(&[0x80, 0x08, 0x88, 0x00].repeat(4));
        }
        let layout = Layout::new(MXFP4, Axis::One, 2, 96).unwrap();
        let x = MxTensor::from_parts(layout, codes, scales, 1.0).unwrap();
        assert_eq!(exponents(&x).unwrap(), Some([3, 3]));
        same_values(&x, &rescale(&x).unwrap());
    }
    let layout = Layout::new(MXFP4, Axis::One, 2, 64).unwrap();
    let zeros = MxTensor::from_parts(layout, vec![0x80; 64], vec![9, 200, 0, 254], 1.0).unwrap();
    assert_eq!(exponents(&zeros).unwrap(), None);
    same_values(&zeros, &rescale(&zeros).unwrap());
}

#[test]
fn nan_and_other_formats_are_refused() {
    // Also above zeros: the block is NaN, whatever its codes.
    for codes in [0x00, 0x21] {
        let layout = Layout::new(MXFP4, Axis::One, 2, 64).unwrap();
        let x =
            MxTensor::from_parts(layout, vec![codes; 64], vec![127, 127, 127, 255], 1.0).unwrap();
        assert_eq!(has(rescale(&x)), "block 1 of line 1 is NaN");
    }
    for spec in [MXFP8_E4M3, NVFP4, MXFP4.with_block(microscaling::Block::Vector(64))] {
        let layout = Layout::new(spec, Axis::One, 2, 64).unwrap();
        let parts = (vec![1; layout.codes_len()], vec![100; layout.scales_len()]);
        let x = MxTensor::from_parts(layout, parts.0, parts.1, 1.0).unwrap();
        assert!(matches!(rescale(&x), Err(Error::Mismatch { .. })), "{spec}");
    }
}

#[test]
fn factors_are_normal_or_refused() {
    let power = |byte: u8| rescale(&tensor(5, 1, 64, move |_| byte)).unwrap();
    for a in 0..=254u8 {
        for b in [0u8, 1, 60, 127, 190, 253, 254] {
            let (x, y) = (power(a), power(b));
            let exact = f64::from(x.tensor_scale()) * f64::from(y.tensor_scale());
            match alpha(&x, &y) {
                Ok(factor) => assert_eq!(f64::from(factor), exact),
                Err(error) => {
                    let log = exact.log2();
                    assert!(!(-126.0..128.0).contains(&log), "2^{log}: {error}");
                }
            }
        }
    }
    // Scales near one need no factor.
    assert_eq!(alpha(&power(127), &power(130)).unwrap(), 1.0);
}

/// The product of what was rescaled, against f64: sums of few terms near each other, which f32 holds.
#[test]
fn products_keep_their_value() {
    let ctx = Context::open_blocking(&Options { device: DeviceChoice::Cpu, ..Default::default() })
        .unwrap();
    let (m, n, k) = (5, 7, 160);
    let x = tensor(8, m, k, |i| 60 + (i % 4) as u8);
    let w = tensor(9, n, k, |i| 180 + (i % 3) as u8);
    let (xn, wn) = (rescale(&x).unwrap(), rescale(&w).unwrap());
    assert!(alpha(&xn, &wn).unwrap() != 1.0);
    let desc = MatmulDesc {
        m,
        n,
        k,
        a: NVFP4.into(),
        b: NVFP4.into(),
        tier: Tier::Exact,
        ..Default::default()
    };
    let matmul = Matmul::new(&ctx, &desc).unwrap();
    let mut y = ctx.zeros(DType::F32, m, n).unwrap();
    let mut stream = ctx.stream();
    let (a, b) = (ctx.upload_mx(&xn).unwrap(), ctx.upload_mx(&wn).unwrap());
    matmul.record(&mut stream, &a, &b, &mut y).unwrap();
    ctx.submit(stream).unwrap();
    let y = common::to_f32(DType::F32, &ctx.read_blocking(&y).unwrap());
    for i in 0..m {
        for j in 0..n {
            let value = |t: &MxTensor, row, at| f64::from(t.get(row, at));
            let want: f64 = (0..k).map(|at| value(&x, i, at) * value(&w, j, at)).sum();
            assert_eq!(f64::from(y[i * n + j]), want, "({i}, {j})");
        }
    }
}
