//! `mma.sync.aligned.m16n8k64.row.col.kind::mxf4.block_scale.scale_vec::2X.f32.e2m1.e2m1.f32.ue8m0`, from the PTX ISA's
//! sections "Matrix Fragments for mma.m16n8k64" and "Block Scaling for mma.sync"; thread-id-a = thread-id-b = 0.
//!
//! How a device adds up is not documented. Here the two halves of k under one pair of scales each are added in ascending
//! order, each sum rounded to nearest: what the crate's exact tier does.

use super::{Lane, accumulate, e2m1};

/// Row and column of A's element i, 0 to 31, eight to a register, in a lane.
pub fn place_in_a(lane: usize, i: usize) -> (usize, usize) {
    let (group, thread) = (lane >> 2, lane % 4);
    let row = if i < 8 || (16..24).contains(&i) { group } else { group + 8 };
    (row, thread * 8 + (i & 7) + if i < 16 { 0 } else { 32 })
}

/// Row and column of B's element i, 0 to 15.
pub fn place_in_b(lane: usize, i: usize) -> (usize, usize) {
    let (group, thread) = (lane >> 2, lane % 4);
    (thread * 8 + (i & 7) + if i < 8 { 0 } else { 32 }, group)
}

/// Row and column of the sum i, 0 to 3.
pub fn place_in_d(lane: usize, i: usize) -> (usize, usize) {
    let (group, thread) = (lane >> 2, lane % 4);
    (if i < 2 { group } else { group + 8 }, thread * 2 + (i & 1))
}

/// The row of A whose scales a lane gives: thread-id-a = 0 selects the lower two threads of each quad, for its two rows.
pub fn row_of_scales(lane: usize) -> Option<usize> {
    (lane % 4 < 2).then_some((lane >> 2) + 8 * (lane % 4))
}

/// The column of B whose scales a lane gives: thread-id-b = 0 selects the first thread of each quad.
pub fn column_of_scales(lane: usize) -> Option<usize> {
    lane.is_multiple_of(4).then_some(lane >> 2)
}

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
        for i in 0..32 {
            let (row, col) = place_in_a(id, i);
            a[row][col] = e2m1(lane.a[i / 8] >> (4 * (i % 8)));
        }
        for i in 0..16 {
            let (row, col) = place_in_b(id, i);
            b[row][col] = e2m1(lane.b[i / 8] >> (4 * (i % 8)));
        }
        // Of the two bytes the lower one is the first half of k's.
        for half in 0..2 {
            let shift = 8 * (byte as usize + half);
            if let Some(row) = row_of_scales(id) {
                scale_a[row][half] = (lane.sa >> shift) as u8;
            }
            if let Some(col) = column_of_scales(id) {
                scale_b[half][col] = (lane.sb >> shift) as u8;
            }
        }
    }
    for (id, lane) in lanes.iter_mut().enumerate() {
        for i in 0..4 {
            let (row, col) = place_in_d(id, i);
            for half in 0..2 {
                let sum = (32 * half..32 * half + 32).map(|k| a[row][k] * b[k][col]).sum();
                let scales = [scale_a[row][half], scale_b[half][col]];
                lane.d[i] = accumulate(lane.d[i], sum, scales);
            }
        }
    }
}
