//! What cuBLASLt and hipBLASLt share: layouts, preferences, elements, sums.

use std::ffi::c_int;

/// A matrix, counted columns first.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    pub kind: c_int,
    pub rows: u64,
    pub columns: u64,
    pub ld: i64,
}

/// …LtMatmulHeuristicResult_t.
#[repr(C)]
pub struct Choice<A> {
    pub algorithm: A,
    pub workspace: usize,
    pub state: c_int,
    pub waves: f32,
    pub reserved: [c_int; 4],
}

/// The functions that make and destroy. `desc`: a product's descriptor as it is made.
#[macro_export]
macro_rules! descriptors {
    ($create:ident $destroy:ident $desc_create:ident $desc_destroy:ident $layout_create:ident $layout_destroy:ident
     $preference_create:ident $preference_destroy:ident $preference_set:ident, desc $desc:expr) => {
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $create(handle: *mut *mut c_void) -> c_int {
            made("handle", 0x3000);
            unsafe { *handle = 0x3000 as *mut c_void };
            0
        }

        #[unsafe(no_mangle)]
        pub extern "C" fn $destroy(handle: *mut c_void) -> c_int {
            gone("handle", handle as u64);
            0
        }

        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $desc_create(
            desc: *mut *mut Desc,
            compute: c_int,
            scale: c_int,
        ) -> c_int {
            log(format!("desc compute {compute} scale {scale}"));
            unsafe { *desc = Box::into_raw(Box::new(Desc { compute, ..$desc })) };
            made("desc", unsafe { *desc } as u64);
            0
        }

        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $desc_destroy(desc: *mut Desc) -> c_int {
            log("desc destroyed");
            gone("desc", desc as u64);
            drop(unsafe { Box::from_raw(desc) });
            0
        }

        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $layout_create(
            layout: *mut *mut Layout,
            kind: c_int,
            rows: u64,
            columns: u64,
            ld: i64,
        ) -> c_int {
            log(format!("layout type {kind} {rows}x{columns} ld {ld}"));
            unsafe { *layout = Box::into_raw(Box::new(Layout { kind, rows, columns, ld })) };
            made("layout", unsafe { *layout } as u64);
            0
        }

        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $layout_destroy(layout: *mut Layout) -> c_int {
            log("layout destroyed");
            gone("layout", layout as u64);
            drop(unsafe { Box::from_raw(layout) });
            0
        }

        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $preference_create(preference: *mut *mut c_void) -> c_int {
            made("preference", 0x4000);
            unsafe { *preference = 0x4000 as *mut c_void };
            0
        }

        #[unsafe(no_mangle)]
        pub extern "C" fn $preference_destroy(preference: *mut c_void) -> c_int {
            log("preference destroyed");
            gone("preference", preference as u64);
            0
        }

        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $preference_set(
            _: *mut c_void,
            attribute: c_int,
            value: *const c_void,
            size: usize,
        ) -> c_int {
            log(format!("preference {attribute} size {size} value {}", unsafe {
                value.cast::<u64>().read_unaligned()
            }));
            if (attribute, size) == (1, 8) { 0 } else { INVALID_VALUE }
        }
    };
}

/// An FP8 number; the largest magnitude of E4M3 is NaN.
pub fn fp8(byte: u8, mantissa: u32, bias: i32) -> f64 {
    let (e, f) = (i32::from((byte & 0x7f) >> mantissa), f64::from(byte & ((1 << mantissa) - 1)));
    let f = f / f64::from(1 << mantissa);
    let value = match byte & 0x7f {
        0x7f if mantissa == 3 => f64::NAN,
        _ if e == 0 => f * 2f64.powi(1 - bias),
        _ => (1.0 + f) * 2f64.powi(e - bias),
    };
    if byte & 0x80 != 0 { -value } else { value }
}

/// The element at a place: 28 is E4M3, 29 E5M2, 33 E2M1, two in a byte. `wrong`: a code that is taken for a larger number, plus
/// 256 times its type, plus one.
pub unsafe fn element(kind: c_int, at: *const u8, place: usize, wrong: u64) -> f64 {
    const E2M1: [f64; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let (code, value) = match kind {
        28 | 29 => {
            let code = unsafe { at.add(place).read() };
            (code, if kind == 28 { fp8(code, 3, 7) } else { fp8(code, 2, 15) })
        }
        _ => {
            let code = unsafe { at.add(place / 2).read() } >> (4 * (place % 2)) & 15;
            let value = E2M1[usize::from(code & 7)];
            (code, if code & 8 != 0 { -value } else { value })
        }
    };
    if wrong == kind as u64 * 256 + u64::from(code) + 1 { value + 0.5 } else { value }
}

/// Sums of `left` (D's rows) and `right` (its columns), D's columns one after the other.
pub unsafe fn multiply(left: &[f64], right: &[f64], k: usize, to: *mut f32, ld: usize) {
    for (j, y) in right.chunks_exact(k).enumerate() {
        for (i, x) in left.chunks_exact(k).enumerate() {
            let sum: f64 = x.iter().zip(y).map(|(x, y)| x * y).sum();
            unsafe { to.add(j * ld + i).write(sum as f32) };
        }
    }
}
