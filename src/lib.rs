#![doc = include_str!("../README.md")]
//!
//! # Where to look
//!
//! | For | see |
//! |---|---|
//! | formats, blocks, scale rules, rounding | [`formats`] |
//! | a packed tensor on the host | [`MxTensor`] |
//! | opening a GPU or the CPU engine, tensors, streams | [`engine`], [`Context`] |
//! | what an adapter offers, and why not | [`engine::caps`] |
//! | kernels: descriptor, recording, CPU twin | [`kernels`] |
//! | the random numbers of stochastic rounding | [`rng`] |
//! | timing recorded work | [`report`] |
//! | what a machine's units can do at most | [`kernels::peak`] |
//! | what `info --selftest` runs | [`selftest`] |
//! | .safetensors files | [`interop`] |
//! | training | [`train`] |

pub mod engine;
pub mod error;
pub mod formats;
pub mod interop;
pub mod kernels;
pub mod native;
pub mod report;
pub mod rng;
pub mod selftest;
pub mod train;

pub use engine::buffer::{DType, DeviceMxTensor, Ids, Tensor};
pub use engine::{Context, DeviceChoice, Options, Stream};
pub use error::{Error, Result};
pub use formats::{
    Axis, Block, Element, Layout, MXFP4, MXFP6_E2M3, MXFP6_E3M2, MXFP8_E4M3, MXFP8_E5M2, MXINT8,
    MxSpec, MxTensor, NVFP4, Rounding, ScaleFormat, ScaleRule,
};
pub use kernels::{
    Dequantize, DequantizeDesc, Groups, Matmul, MatmulDesc, Operand, Output, Quantize,
    QuantizeDesc, Router, RouterDesc, Routes, Tier, Tuning,
};
/// The graphics API that the crate's public types come from.
pub use wgpu;
