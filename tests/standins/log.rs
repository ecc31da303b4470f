//! What all stand-ins share: settings that a suite makes, a log of calls that it reads, and what was made and not yet destroyed.
//! `crate::SETTINGS` are a stand-in's own.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::sync::Mutex;
use std::sync::atomic::Ordering;

static LOG: Mutex<String> = Mutex::new(String::new());
/// Kind and handle of what is alive, and what was destroyed wrongly.
static LIVE: Mutex<(BTreeSet<(&'static str, u64)>, String)> =
    Mutex::new((BTreeSet::new(), String::new()));

pub fn setting(key: usize) -> u64 {
    crate::SETTINGS[key].load(Ordering::SeqCst)
}

#[unsafe(no_mangle)]
pub extern "C" fn standin_set(key: u32, value: u64) {
    crate::SETTINGS[key as usize].store(value, Ordering::SeqCst);
}

pub fn log(line: impl Display) {
    let mut log = LOG.lock().unwrap_or_else(|e| e.into_inner());
    *log += &format!("{line}\n");
}

/// Something was made.
pub fn made(kind: &'static str, handle: u64) {
    let mut live = LIVE.lock().unwrap_or_else(|e| e.into_inner());
    if !live.0.insert((kind, handle)) {
        live.1 += &format!("{kind} {handle:#x} made twice\n");
    }
}

/// Something was destroyed, once and after it was made.
pub fn gone(kind: &'static str, handle: u64) {
    let mut live = LIVE.lock().unwrap_or_else(|e| e.into_inner());
    if !live.0.remove(&(kind, handle)) {
        live.1 += &format!("{kind} {handle:#x} destroyed, but not alive\n");
    }
}

/// The last to go: nothing else may be alive.
#[allow(dead_code)]
pub fn last(kind: &'static str, handle: u64) {
    gone(kind, handle);
    let mut live = LIVE.lock().unwrap_or_else(|e| e.into_inner());
    let early: String = live.0.iter().map(|(what, _)| format!("{kind} before {what}\n")).collect();
    live.1 += &early;
}

/// Copies the text's end into `out` and returns its whole length.
unsafe fn copy(text: &str, out: *mut u8, room: usize) -> usize {
    let n = text.len().min(room);
    if n > 0 {
        unsafe { std::ptr::copy_nonoverlapping(text[text.len() - n..].as_ptr(), out, n) };
    }
    text.len()
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn standin_log(out: *mut u8, room: usize) -> usize {
    unsafe { copy(&LOG.lock().unwrap_or_else(|e| e.into_inner()), out, room) }
}

/// A line for each thing that is alive, and each wrong destruction.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn standin_left(out: *mut u8, room: usize) -> usize {
    let live = LIVE.lock().unwrap_or_else(|e| e.into_inner());
    let left = live.0.iter().map(|(kind, handle)| format!("{kind} {handle:#x}\n"));
    unsafe { copy(&(left.collect::<String>() + &live.1), out, room) }
}
