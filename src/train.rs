//! Training small decoder transformers in MX formats.

#[cfg(feature = "safetensors")]
pub mod checkpoint;
pub mod data;
