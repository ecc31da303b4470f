//! What native routes do to operands on the host: orders of scales against torchao and the published formulas, MXFP4 as NVFP4
//! against exact arithmetic.
#![cfg(not(target_arch = "wasm32"))]

mod common;

use common::{assert_bytes, golden, reference::magnitudes, words};
use microscaling::kernels::native_pack::pack;
use microscaling::native::{Codes, Packing, RouteScale, ScaleLayout, Scales};
use microscaling::{Axis, Element, Error, Layout, MXFP4, MxTensor};
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

/// Shapes that no memory holds.
#[test]
fn scales_beyond_memory_are_refused() {
    for layout in ScaleLayout::ALL {
        for shape in [[usize::MAX, 2], [1 << 63, 2], [usize::MAX; 2], [3, usize::MAX]] {
            assert_eq!(layout.bytes(shape), usize::MAX, "{layout:?} {shape:?}");
            assert!(matches!(layout.arrange(&[], shape), Err(Error::Mismatch { .. })));
            assert!(matches!(layout.restore(&[], shape), Err(Error::Mismatch { .. })));
        }
    }
}

// ---- MXFP4 as NVFP4 --------------------------------------------------------------------------------------------------

/// Two scales of 16 for each of 32, in positive E4M3, relative to the line's largest.
const NVFP4: Packing = Packing {
    codes: Codes::Same,
    scales: Some(Scales { format: RouteScale::Ue4m3, group: 16, layout: ScaleLayout::Rows }),
    lines: 1,
    k: 32,
};

/// Random codes, zeros rare, three blocks in a line under the scales given.
fn tensor(seed: u64, scales: [u8; 3]) -> MxTensor {
    let layout = Layout::new(MXFP4, Axis::One, 2, 96).unwrap();
    let codes: Vec<u8> =
        words(seed, layout.codes_len() / 4).into_iter().flat_map(u32::to_le_bytes).collect();
    MxTensor::from_parts(layout, codes, scales.repeat(2), 1.0).unwrap()
}

/// Every span and every place of it on the whole range of scales: UE4M3 has eighteen powers of two.
#[test]
fn a_span_of_17_is_exact_and_one_of_18_raises_the_flag() {
    let table = magnitudes(Element::E4M3);
    for least in 0..=254u8 {
        for span in [0, 1, 9, 16, 17, 18, 19, 40] {
            let Some(most) = least.checked_add(span).filter(|most| *most < 255) else { continue };
            let scales = [least, most, least + span / 2];
            let packed = pack(&tensor(u64::from(least), scales), &NVFP4).unwrap();
            assert_eq!(packed.inexact, span > 17, "{least} {most}");
            if packed.inexact {
                continue;
            }
            for (i, byte) in packed.scales[..12].iter().enumerate() {
                // 2^8 is the line's largest.
                let value = table[usize::from(*byte)] * 2f64.powi(i32::from(most) - 8);
                assert_eq!(value, 2f64.powi(scales[i / 2 % 3].into()), "{least} {most} {i}");
            }
        }
    }
}

#[test]
fn blocks_of_zeros_may_have_any_scale() {
    for byte in 0..=130 {
        let (mut codes, scales, _) = tensor(3, [130, byte, 130]).into_parts();
        for line in codes.chunks_exact_mut(48) {
            // Zeros of both signs.
            line[16..32].copy_from_slice(&[0x80, 0x08, 0x88, 0x00].repeat(4));
        }
        let layout = Layout::new(MXFP4, Axis::One, 2, 96).unwrap();
        let x = MxTensor::from_parts(layout, codes, scales, 1.0).unwrap();
        assert!(!pack(&x, &NVFP4).unwrap().inexact, "{byte}");
    }
}
