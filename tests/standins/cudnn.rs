//! A stand-in for cuDNN's backend: it records every attribute, refuses what cuDNN documents as wrong, and runs the one graph that
//! the crate makes on the host, from the attributes alone. Written from NVIDIA's documentation and sample, not from the crate.
//! tests/native_cuda.rs compiles and drives it.
#![allow(non_snake_case, clippy::missing_safety_doc)]

mod log;

use std::collections::BTreeMap;
use std::ffi::{c_char, c_uint, c_void};
use std::sync::atomic::{AtomicU64, Ordering};

use log::{gone, last, log, made, setting};

type Status = c_uint;
const BAD_PARAM: Status = 2000;
const NOT_SUPPORTED: Status = 3000;
const FAILED: Status = 5000;
const HANDLE: usize = 0x7000;

/// What the suite sets, by number.
static SETTINGS: [AtomicU64; 2] = [
    // 0, bits: 1 the heuristic offers engines; 2 the first engine has no plan; 4 plans want more memory than there is; 8 products
    // fail; 16 scales are read row by row, which is wrong; 32 the graph is refused.
    AtomicU64::new(1),
    AtomicU64::new(91_500), // 1: the version.
];
/// Engines that were made, to tell the first.
static ENGINES: AtomicU64 = AtomicU64::new(0);

fn mode(bit: u64) -> bool {
    setting(0) & bit != 0
}

/// A descriptor: its attributes as 64-bit numbers.
pub struct Desc {
    kind: c_uint,
    finalized: bool,
    attributes: BTreeMap<c_uint, Vec<i64>>,
    /// Of an engine: which.
    engine: u64,
    /// Of an engine: its graph.
    graph: *const Desc,
}

/// Bytes of an element of an attribute's type: handles, types, booleans, integers, pointers, modes, descriptors.
fn size_of(ty: c_uint) -> Option<usize> {
    Some(match ty {
        0 | 3 | 6 | 15 => 8,
        1 | 8 | 20 | 23 => 4,
        2 => 1,
        _ => return None,
    })
}

/// The type that an attribute is documented with.
fn type_of(name: c_uint) -> Option<c_uint> {
    Some(match name {
        900 | 902 | 903 | 906 | 402 | 1000 => 3,
        901 | 1500 | 2603 => 1,
        907 => 2,
        909 => 20,
        2604 => 23,
        200 => 8,
        400 | 800 => 0,
        201 | 202 | 401 | 801 | 1520..=1523 | 2600..=2602 => 15,
        1001 | 1003 => 6,
        _ => return None,
    })
}

/// The attributes that a descriptor needs before it is finalized.
fn needs(kind: c_uint) -> &'static [c_uint] {
    match kind {
        17 => &[900, 901, 902, 903, 906],
        37 => &[2600, 2601, 2602, 2603, 2604],
        18 => &[1500],
        19 => &[1520, 1521, 1522, 1523],
        15 => &[800, 801],
        4 => &[200, 201],
        5 => &[400, 401],
        16 => &[1000, 1001],
        _ => &[],
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn cudnnGetVersion() -> usize {
    setting(1) as usize
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cudnnCreate(handle: *mut *mut c_void) -> Status {
    made("handle", HANDLE as u64);
    unsafe { *handle = HANDLE as *mut c_void };
    0
}

#[unsafe(no_mangle)]
pub extern "C" fn cudnnDestroy(handle: *mut c_void) -> Status {
    last("handle", handle as u64);
    0
}

#[unsafe(no_mangle)]
pub extern "C" fn cudnnSetStream(handle: *mut c_void, stream: *mut c_void) -> Status {
    log(format!("stream {stream:?} of {handle:?}"));
    0
}

#[unsafe(no_mangle)]
pub extern "C" fn cudnnGetErrorString(status: Status) -> *const c_char {
    match status {
        BAD_PARAM => c"CUDNN_STATUS_BAD_PARAM",
        NOT_SUPPORTED => c"CUDNN_STATUS_NOT_SUPPORTED",
        FAILED => c"CUDNN_STATUS_EXECUTION_FAILED",
        _ => c"CUDNN_STATUS_INTERNAL_ERROR",
    }
    .as_ptr()
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cudnnBackendCreateDescriptor(kind: c_uint, out: *mut *mut Desc) -> Status {
    let engine = if kind == 3 { ENGINES.fetch_add(1, Ordering::SeqCst) } else { 0 };
    let desc = Desc {
        kind,
        finalized: false,
        attributes: BTreeMap::new(),
        engine,
        graph: std::ptr::null(),
    };
    unsafe { *out = Box::into_raw(Box::new(desc)) };
    made(if kind == 5 { "plan" } else { "descriptor" }, unsafe { *out } as u64);
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cudnnBackendDestroyDescriptor(desc: *mut Desc) -> Status {
    let kind = unsafe { &*desc }.kind;
    gone(if kind == 5 { "plan" } else { "descriptor" }, desc as u64);
    drop(unsafe { Box::from_raw(desc) });
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cudnnBackendSetAttribute(
    desc: *mut Desc,
    name: c_uint,
    ty: c_uint,
    count: i64,
    elements: *const u8,
) -> Status {
    let desc = unsafe { &mut *desc };
    let (Some(wants), Some(size)) = (type_of(name), size_of(ty)) else { return BAD_PARAM };
    if desc.finalized || wants != ty || count < 1 {
        log(format!("refused: attribute {name} type {ty} count {count} of {}", desc.kind));
        return BAD_PARAM;
    }
    let values: Vec<i64> = (0..count as usize)
        .map(|i| {
            let mut bytes = [0u8; 8];
            unsafe {
                std::ptr::copy_nonoverlapping(elements.add(i * size), bytes.as_mut_ptr(), size)
            };
            i64::from_le_bytes(bytes)
        })
        .collect();
    // Only what is finalized can be part of something.
    if ty == 15 && values.iter().any(|value| !unsafe { &*(*value as *const Desc) }.finalized) {
        log(format!("refused: attribute {name} of {} is not finalized", desc.kind));
        return BAD_PARAM;
    }
    if ty == 15 || ty == 6 {
        log(format!("set {} {name} type {ty} count {count}", desc.kind));
    } else {
        log(format!("set {} {name} type {ty} {values:?}", desc.kind));
    }
    desc.attributes.insert(name, values);
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cudnnBackendFinalize(desc: *mut Desc) -> Status {
    let desc = unsafe { &mut *desc };
    if let Some(lacks) = needs(desc.kind).iter().find(|name| !desc.attributes.contains_key(name)) {
        log(format!("refused: {} lacks {lacks}", desc.kind));
        return BAD_PARAM;
    }
    log(format!("finalize {}", desc.kind));
    if desc.kind == 15 && mode(32) {
        return NOT_SUPPORTED;
    }
    if desc.kind == 5 {
        let engine = unsafe { &*(desc.attributes[&401][0] as *const Desc) };
        if mode(2) && engine.engine % 2 == 0 {
            return NOT_SUPPORTED;
        }
    }
    desc.finalized = true;
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cudnnBackendGetAttribute(
    desc: *mut Desc,
    name: c_uint,
    ty: c_uint,
    room: i64,
    count: *mut i64,
    out: *mut c_void,
) -> Status {
    let desc = unsafe { &*desc };
    if !desc.finalized || type_of(name) != Some(ty) {
        return BAD_PARAM;
    }
    match (desc.kind, name) {
        (4, 202) => {
            let engines = if mode(1) { 2 } else { 0 };
            let given = if room == 0 { engines } else { room.min(engines) };
            unsafe { *count = given };
            if room > 0 {
                let engines = out.cast::<*mut Desc>();
                for i in 0..given as usize {
                    let engine = unsafe { &mut **engines.add(i) };
                    if engine.kind != 3 {
                        return BAD_PARAM;
                    }
                    engine.finalized = true;
                    engine.engine = i as u64;
                    engine.graph = desc.attributes[&201][0] as *const Desc;
                }
            }
        }
        (5, 402) => unsafe {
            *count = 1;
            *out.cast::<i64>() = if mode(4) { 1 << 40 } else { 4096 };
        },
        _ => return BAD_PARAM,
    }
    0
}

unsafe fn part(desc: &Desc, name: c_uint) -> &'static Desc {
    unsafe { &*(desc.attributes[&name][0] as *const Desc) }
}

fn e2m1(code: u8) -> f64 {
    let magnitude = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0][usize::from(code & 7)];
    if code & 8 != 0 { -magnitude } else { magnitude }
}

/// An operand as `[lines][k]`, from the dequantization that makes it.
unsafe fn operand(
    node: &Desc,
    pointers: &BTreeMap<i64, i64>,
    lines_at: usize,
) -> Option<Vec<Vec<f64>>> {
    let [x, scales, y] = unsafe { [part(node, 2600), part(node, 2601), part(node, 2602)] };
    let dims = &x.attributes[&902];
    let (lines, k) = (dims[lines_at] as usize, dims[3 - lines_at] as usize);
    let block = &node.attributes[&2604];
    // Codes: E2M1, contiguous along k. Scales: E8M0 in tiles, 32 elements along k. The result: virtual, f32.
    let strides = &x.attributes[&903];
    let scale_dims = &scales.attributes[&902];
    let (rows, groups) = (scale_dims[lines_at] as usize, scale_dims[3 - lines_at] as usize);
    let fits = x.attributes[&901] == [16]
        && scales.attributes[&901] == [15]
        && scales.attributes.get(&909) == Some(&vec![3])
        && y.attributes[&901] == [0]
        && y.attributes.get(&907) == Some(&vec![1])
        && y.attributes[&902] == *dims
        && strides[3 - lines_at] == 1
        && strides[lines_at] == k as i64
        && block[2 - lines_at] == 32
        && block[lines_at - 1] == 1
        && rows == lines.next_multiple_of(128)
        && groups == (k / 32).next_multiple_of(4)
        && scales.attributes[&903][3 - lines_at] == 1
        && scales.attributes[&903][lines_at] == groups as i64;
    if !fits {
        return None;
    }
    let codes = *pointers.get(&x.attributes[&906][0])? as *const u8;
    let bytes = *pointers.get(&scales.attributes[&906][0])? as *const u8;
    let value = |line: usize, at: usize| {
        let place = line * k + at;
        let code = unsafe { *codes.add(place / 2) } >> (4 * (place % 2)) & 15;
        let (r, c) = (line, at / 32);
        let offset = if mode(16) {
            r * groups + c
        } else {
            (r / 128 * (groups / 4) + c / 4) * 512 + r % 32 * 16 + r % 128 / 32 * 4 + c % 4
        };
        let exponent = i32::from(unsafe { *bytes.add(offset) }) - 127;
        e2m1(code) * 2f64.powi(exponent)
    };
    Some((0..lines).map(|line| (0..k).map(|at| value(line, at)).collect()).collect())
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cudnnBackendExecute(
    handle: *mut c_void,
    plan: *const Desc,
    pack: *const Desc,
) -> Status {
    if mode(8) {
        return FAILED;
    }
    let (plan, pack) = unsafe { (&*plan, &*pack) };
    if handle as usize != HANDLE || !plan.finalized || !pack.finalized {
        return BAD_PARAM;
    }
    let ids = &pack.attributes[&1000];
    let pointers: BTreeMap<i64, i64> =
        ids.iter().copied().zip(pack.attributes[&1001].iter().copied()).collect();
    let engine = unsafe { part(plan, 401) };
    let nodes = &unsafe { &*engine.graph }.attributes[&801];
    let nodes: Vec<&Desc> = nodes.iter().map(|node| unsafe { &*(*node as *const Desc) }).collect();
    let Some(product) = nodes.iter().find(|node| node.kind == 19) else { return BAD_PARAM };
    let from = |name: c_uint| {
        let of = product.attributes[&name][0];
        nodes.iter().find(|node| node.kind == 37 && node.attributes[&2602][0] == of)
    };
    let (Some(a), Some(b)) = (from(1520), from(1521)) else { return BAD_PARAM };
    let (a, b) = unsafe { (operand(a, &pointers, 1), operand(b, &pointers, 2)) };
    let (Some(a), Some(b)) = (a, b) else { return BAD_PARAM };
    let y = unsafe { part(product, 1522) };
    let dims = [1, a.len() as i64, b.len() as i64];
    let strides = [(a.len() * b.len()) as i64, b.len() as i64, 1];
    if y.attributes[&901] != [0] || y.attributes[&902] != dims || y.attributes[&903] != strides {
        return BAD_PARAM;
    }
    let Some(out) = pointers.get(&y.attributes[&906][0]) else { return BAD_PARAM };
    let out = *out as *mut f32;
    for (i, a) in a.iter().enumerate() {
        for (j, b) in b.iter().enumerate() {
            let sum: f64 = a.iter().zip(b).map(|(a, b)| a * b).sum();
            unsafe { *out.add(i * dims[2] as usize + j) = sum as f32 };
        }
    }
    log(format!("product by engine {} with tensors {ids:?}", engine.engine));
    0
}
