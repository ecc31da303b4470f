//! `v_mfma_scale_f32_16x16x128_f8f6f4` and `…32x32x64…` with both formats FP4 and the scales in byte 0, from AMD's CDNA 4
//! instruction set and matrix-core guides: a lane holds 32 consecutive elements of one line and that block's scale. The
//! order of additions is as in [`super::ptx`].

use super::{Lane, accumulate, e2m1};

/// Executes it for a wave; `SIDE` is 16 or 32.
pub extern "C" fn mfma<const SIDE: usize>(lanes: *mut Lane) {
    // SAFETY: the harness passes a wave's lanes.
    let lanes = unsafe { std::slice::from_raw_parts_mut(lanes, 64) };
    let blocks = 64 / SIDE;
    // [line][block] of both operands: elements and scale.
    let mut operands = [(); 2].map(|()| vec![vec![([0; 32], 0u8); blocks]; SIDE]);
    for (id, lane) in lanes.iter().enumerate() {
        for (operand, registers, scale) in [(0, lane.a, lane.sa), (1, lane.b, lane.sb)] {
            let elements = std::array::from_fn(|i| e2m1(registers[i / 8] >> (4 * (i % 8))));
            operands[operand][id % SIDE][id / SIDE] = (elements, scale as u8);
        }
    }
    let [a, b] = operands;
    for (id, lane) in lanes.iter_mut().enumerate() {
        let col = id % SIDE;
        for (i, d) in lane.d[..SIDE * SIDE / 64].iter_mut().enumerate() {
            // 16x16: a lane's four rows are consecutive. 32x32: four consecutive rows out of every eight.
            let row =
                if SIDE == 16 { 4 * (id / 16) + i } else { 8 * (i / 4) + 4 * (id / 32) + i % 4 };
            for ((x, scale_x), (y, scale_y)) in a[row].iter().zip(&b[col]) {
                let sum = x.iter().zip(y).map(|(x, y)| x * y).sum();
                *d = accumulate(*d, sum, [*scale_x, *scale_y]);
            }
        }
    }
}
