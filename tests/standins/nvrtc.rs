//! A stand-in for NVRTC. tests/native_kernel.rs compiles it.
#![allow(non_snake_case, clippy::missing_safety_doc)]

mod kernels;
mod log;

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::atomic::AtomicU64;

use log::{gone, log, made, setting};

/// 0: what nvrtcCompileProgram returns; 1: as how large code and log are given out.
static SETTINGS: [AtomicU64; 2] = [AtomicU64::new(0), AtomicU64::new(0)];

compiler!(nvrtcCreateProgram nvrtcCompileProgram nvrtcGetCUBINSize nvrtcGetCUBIN nvrtcGetProgramLogSize nvrtcGetProgramLog
    nvrtcDestroyProgram, compile 0, message b"mxf4(1): error: of the stand-in\0");
