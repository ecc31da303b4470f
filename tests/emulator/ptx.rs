//! `mma.sync.aligned.m16n8k64.row.col.kind::mxf4.block_scale.scale_vec::2X.f32.e2m1.e2m1.f32.ue8m0`, from the PTX ISA's
//! sections "Matrix Fragments for mma.m16n8k64" and "Block Scaling for mma.sync"; thread-id-a = thread-id-b = 0.
//!
//! How a device adds up is not documented. Here the two halves of k under one pair of scales each are added in ascending
//! order, each sum rounded to nearest: what the crate's exact tier does.

use super::{Lane, accumulate, e2m1};

/// Executes it for a warp; `selector` is byte-id-a and byte-id-b.
pub extern "C" fn m16n8k64(lanes: *mut Lane) {
    // SAFETY: the harness passes a warp's lanes.
    let lanes = unsafe { std::slice::from_raw_parts_mut(lanes, 32) };
    let mut a = [[0; 64]; 16];
    let mut b = [[0; 8]; 64];
    let mut scale_a = [[0; 2]; 16];
    let mut scale_b = [[0; 8]; 2];
    let byte = lanes[0].selector;
    assert!(byte == 0 || byte == 2, "byte-id selects the lower or the upper two bytes: 0 or 2");
    assert!(lanes.iter().all(|lane| lane.selector == byte), "selectors are the same in all lanes");
    for (id, lane) in lanes.iter().enumerate() {
        let (group, thread) = (id >> 2, id % 4);
        // A: a0 … a31, eight to a register, low bits first.
        for i in 0..32 {
            let row = if i < 8 || (16..24).contains(&i) { group } else { group + 8 };
            let col = thread * 8 + (i & 7) + if i < 16 { 0 } else { 32 };
            a[row][col] = e2m1(lane.a[i / 8] >> (4 * (i % 8)));
        }
        // B: b0 … b15.
        for i in 0..16 {
            let row = thread * 8 + (i & 7) + if i < 8 { 0 } else { 32 };
            b[row][group] = e2m1(lane.b[i / 8] >> (4 * (i % 8)));
        }
        // thread-id-a = 0: the lower two threads of a quad give the scales of its two rows. thread-id-b = 0: its first thread
        // gives those of its column. Two bytes each, the first half of k in the lower one.
        for half in 0..2 {
            let shift = 8 * (byte as usize + half);
            if thread < 2 {
                scale_a[group + 8 * thread][half] = (lane.sa >> shift) as u8;
            }
            if thread == 0 {
                scale_b[half][group] = (lane.sb >> shift) as u8;
            }
        }
    }
    for (id, lane) in lanes.iter_mut().enumerate() {
        let (group, thread) = (id >> 2, id % 4);
        for i in 0..4 {
            let row = if i < 2 { group } else { group + 8 };
            let col = thread * 2 + (i & 1);
            for half in 0..2 {
                let products = (32 * half..32 * half + 32).map(|k| a[row][k] * b[k][col]);
                lane.d[i] =
                    accumulate(lane.d[i], products.sum(), [scale_a[row][half], scale_b[half][col]]);
            }
        }
    }
}
